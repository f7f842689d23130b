"""Binding: parameters take the tensors that were loaded, and give them back if the load fails.

A parameter on meta stays the object that it is: only what is behind it is exchanged, as `torch.utils.swap_tensors` does
it. So its class, its attributes, its ties and every reference that somebody holds stay true, and binding 46,000
parameters leaves not one new object to the garbage collector. `requires_grad` belongs to what is exchanged and is
copied. Runs on the load's own thread.

An atomic load changes nothing before `finish`, when everything is there. What can be undone comes first then: ties are
compared; what is on meta is exchanged; memory that several tensors have is written, and modules load themselves, after their
tensors have been copied so that they can be put back. All else that has storage is written to in the end, which only a
device that breaks can stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch

from weightstream.device.accelerator import foreach_copy
from weightstream.device.dtypes import are_same_bits
from weightstream.device.exchange import Original
from weightstream.device.exchange import exchange as _exchange
from weightstream.device.placement import Place, Placement, is_adopted, tensor_of
from weightstream.device.selfloading import Keys, described, load_subtree, made_dtype
from weightstream.device.sharded import is_sharded, local_parts, split_like
from weightstream.device.stage import DeviceStage
from weightstream.device.targets import Subtree
from weightstream.device.turns import Turn
from weightstream.errors import PlacementError
from weightstream.ranks import ranked_logger

__all__ = ["Binder"]

logger = ranked_logger(__name__)


class Binder:
    """Carries out a placement, tensor by tensor or all at once, and undoes it.

    Args:
        placement: what goes where.
        stage: where the tensors come from.
        versions: what the checkpoint says of modules, by their names.
        atomic: change nothing before `finish`.
    """

    def __init__(
        self,
        placement: Placement,
        stage: DeviceStage,
        *,
        versions: Mapping[str, Mapping[str, object]] | None = None,
        atomic: bool = False,
    ) -> None:
        self._placement = placement
        self._stage = stage
        self._versions = versions or {}
        self._is_atomic = atomic
        #: What is to be exchanged in the end: parameters, and the tensors for them; and the names that become usable.
        self._waiting: list[torch.Tensor] = []
        self._loaded: list[torch.Tensor] = []
        self._ready: list[str] = []
        self._originals: list[Original] = []
        self._kept: set[int] = set()
        self._staged: dict[str, torch.Tensor] = {}
        #: What modules that came in turns said, by their identity; looked at in the end, in the order of the model.
        self._said: dict[int, Keys] = {}
        self._sharded = {place.name for place in placement.sharded}
        self._adopted: list[torch.Tensor] = []
        self._on_meta: list[torch.Tensor] = []
        self._written: list[str] = []

    @property
    def written(self) -> list[str]:
        """Materialised tensors that hold loaded bytes, or some, by now."""
        touched = (self._placement.places[index].name for index in sorted(self._stage.touched))
        return list(dict.fromkeys((*touched, *self._written)))

    def bind(self, places: list[int]) -> list[str]:
        """Place tensors whose bytes are all there; return the names, in the model, that may be used from now on."""
        all_places = self._placement.places
        ready: list[str] = []
        filled = [index for index in places if all_places[index].mode == "fill"]
        if filled:
            self._stage.filled(filled)
            for index in filled:
                ready += all_places[index].names
            places = [index for index in places if all_places[index].mode != "fill"]
        tensors: list[torch.Tensor] = []
        adopted: list[torch.Tensor] = []
        for index, taken in zip(places, self._stage.take(places), strict=True):
            place = all_places[index]
            if place.mode == "stage" and not is_adopted(place):
                self._staged[place.name] = taken  # of an expanded tensor, a copy could be of any size
                continue
            loaded = taken if place.stride is None else self._in_order(taken)
            if place.mode == "stage":
                self._staged[place.name] = loaded
                continue
            tensors.append(tensor_of(place))
            adopted.append(loaded)
            if place.target is None:
                ready.append(place.name)
            else:
                ready += place.target.names
        self._adopt(tensors, adopted)
        if self._is_atomic:
            self._ready += ready
            return []
        if self._sharded:
            whole = [all_places[index] for index in places if all_places[index].name in self._sharded]
            if whole:
                self._stage.run(partial(self._write, whole, ready))
        return ready

    def _in_order(self, view: torch.Tensor) -> torch.Tensor:
        """Copy a view with strides, as files of torch.save have them, so that its elements lie in order."""
        copies: list[torch.Tensor] = []
        self._stage.run(lambda: copies.append(view.contiguous()))
        return copies[0]

    def place(self, turn: Turn) -> list[str]:
        """Place a turn, all of which has been bound; return the names that became usable. Its tensors are gone then.

        What a module says of missing and unexpected keys counts at the end, as with modules that do not come in turns.

        Raises:
            PlacementError: two names of one tied tensor have different bytes, or a module's own hooks failed.
        """
        ready: list[str] = []
        if turn.subtree is None:
            self._stage.run(partial(self._place, turn, ready))
            self._stage.free(turn.beside)
            return ready
        given = [(index, self._staged[self._placement.places[index].name].data_ptr()) for index in turn.places]
        self._stage.run(partial(self._place, turn, ready))
        kept = {target.tensor.data_ptr() for target in turn.subtree.targets if target.on_meta}
        self._stage.free(index for index, pointer in given if pointer not in kept)
        return ready

    def finish(self, check: Callable[[], None] = lambda: None) -> list[str]:
        """Place what could not be placed tensor by tensor, or everything; return the names that became usable.

        Args:
            check: called before each module that loads itself. What it raises ends the load.

        Raises:
            PlacementError: two names of one tied tensor have different bytes, or a module's own hooks failed.
        """
        ready, self._ready = self._ready, []
        placement = self._placement
        if self._is_atomic:
            # No closures: frames of what fails keep them, and so would who keeps the error keep the model.
            self._stage.run(partial(self._commit, ready, check))
        elif placement.doubles or placement.strided or placement.shared or placement.subtrees:
            self._stage.run(partial(self._finish_staged, ready, check))
        return ready

    def rollback(self) -> None:
        """Put every parameter that was on meta back there, as it was, and copies back where such were made.

        Copies from slots must have completed.
        """
        self._stage.filled(sorted(self._stage.touched))
        while self._adopted:
            tensor, on_meta = self._adopted.pop(), self._on_meta.pop()
            on_meta.requires_grad_(tensor.requires_grad)
            _exchange(tensor, on_meta)
        self._staged.clear()
        self._waiting.clear()
        self._loaded.clear()
        if self._originals:
            try:
                self._stage.run(self._put_back)
            except Exception:
                logger.warning("what was written to while the model was changed cannot be put back", exc_info=True)

    def release(self) -> None:
        """Let go of what a rollback would need, a few at a time: all at once holds the interpreter's lock for 20 ms."""
        self._originals.clear()
        while self._on_meta:
            del self._on_meta[-1000:], self._adopted[-1000:]

    def _adopt(self, tensors: list[torch.Tensor], loaded: list[torch.Tensor]) -> None:
        """Put loaded tensors behind parameters and buffers that are on meta; if all change at once, do so later."""
        if self._is_atomic:
            self._waiting += tensors
            self._loaded += loaded
        else:
            self._exchange(tensors, loaded)

    def _exchange(self, tensors: list[torch.Tensor], loaded: list[torch.Tensor]) -> None:
        note, note_on_meta = self._adopted.append, self._on_meta.append
        for tensor, other in zip(tensors, loaded, strict=True):
            if tensor.requires_grad:
                other.requires_grad = True
            _exchange(tensor, other)
            note(tensor)
            note_on_meta(other)  # which is what the parameter was before

    @torch.no_grad()
    def _place(self, turn: Turn, ready: list[str]) -> None:
        if turn.subtree is not None:
            self._said[id(turn.subtree)] = self._load_subtree(turn.subtree, ready)
            return
        for first, second in turn.doubles:
            self._compare(first, tensor_of(first), self._staged.pop(second.name), second)
        places = [self._placement.places[index] for index in turn.places]
        self._write([place for place in places if place.name in self._staged], ready)  # `bind` has written parts

    @torch.no_grad()
    def _finish_staged(self, ready: list[str], check: Callable[[], None]) -> None:
        self._write([place for place in self._placement.strided if place.name in self._staged], ready)
        self._write_shared(ready)
        self._compare_doubles()
        self._load_subtrees(ready, check)

    @torch.no_grad()
    def _commit(self, ready: list[str], check: Callable[[], None]) -> None:
        """Change the whole model; see the module for the order."""
        placement = self._placement
        self._compare_doubles()
        self._exchange(self._waiting, self._loaded)
        self._waiting.clear()
        self._loaded.clear()
        self._keep((place.names, tensor_of(place)) for place in placement.shared)
        self._write_shared(ready)
        rest = [*placement.strided, *placement.sharded]
        tied = [place for place in rest if place.target is not None and place.target.decider is not None]
        # Modules look at them as they load themselves.
        self._keep((place.names, tensor_of(place)) for place in tied)
        self._write(tied, ready)
        self._load_subtrees(ready, check)
        self._write_at_once([place for place in rest if place.name in self._staged], ready)

    def _keep(self, tensors: Iterable[tuple[list[str], torch.Tensor]]) -> None:
        for names, tensor in tensors:
            if id(tensor) not in self._kept:
                self._kept.add(id(tensor))
                self._originals.append(Original.of(names, tensor))

    @torch.no_grad()
    def _put_back(self) -> None:
        """Restore tensors with storage that were, or may have been, written to, latest first."""
        back: set[str] = set()
        while self._originals:
            original = self._originals.pop()
            try:
                original.put_back()
            except Exception:
                logger.warning("%s cannot be put back as it was", original.names[0], exc_info=True)
            else:
                back.update(original.names)
        self._written = [name for name in self._written if name not in back]

    def _write_shared(self, ready: list[str]) -> None:
        shared = {place.name: self._staged[place.name] for place in self._placement.shared}
        self._write(self._placement.shared, ready)
        for place in self._placement.shared:
            if not are_same_bits(tensor_of(place), shared[place.name]):
                raise PlacementError(
                    "the model has this tensor in the memory of another one, for which the checkpoint has other values",
                    tensor=place.name,
                    expected="the same bytes for what both hold",
                    hint="Remove one of the two from the checkpoint, or give it memory of its own in the model",
                )

    def _compare_doubles(self) -> None:
        doubles, twins = self._placement.doubles, self._placement.twins
        if not (doubles or twins):
            return
        waiting = {id(tensor): loaded for tensor, loaded in zip(self._waiting, self._loaded, strict=True)}
        for first, second in (*doubles, *twins):
            if second.name not in self._staged:  # it had its turn
                continue
            found = self._staged.get(first.name, waiting.get(id(tensor_of(first))))
            self._compare(first, tensor_of(first) if found is None else found, self._staged[second.name], second)
        for _, second in doubles:
            self._staged.pop(second.name, None)

    def _load_subtrees(self, ready: list[str], check: Callable[[], None]) -> None:
        for subtree in filter(self._placement.wants, self._placement.subtrees):
            keys = self._said.pop(id(subtree), None)
            if keys is None:
                check()
                keys = self._load_subtree(subtree, ready)
            self._note_keys(subtree, described(subtree), keys.missing_keys, keys.unexpected_keys)
            self._placement.loaded_themselves.append(described(subtree))

    @torch.no_grad()
    def _write(self, places: list[Place], ready: list[str]) -> None:
        """Copy staged tensors to the storage that their targets have."""
        for place in places:
            tensor, loaded = tensor_of(place), self._staged.pop(place.name)
            self._written.append(place.name)
            if is_sharded(tensor):
                tensor, loaded = local_parts(tensor, loaded)
            tensor.copy_(loaded)
            ready += place.names

    def _write_at_once(self, places: list[Place], ready: list[str]) -> None:
        """Do what `_write` does, in one call where that is possible."""
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for place in places:
            target, loaded = tensor_of(place), self._staged[place.name]
            odd = is_sharded(target) or not target.is_contiguous() or target.is_conj() or target.is_neg()
            if odd or not loaded.is_contiguous() or target.device != loaded.device:
                self._write([place], ready)
                continue
            self._written.append(place.name)  # before: where it stops, if it does, nobody knows
            targets.append(target.detach().view(-1).view(torch.uint8))  # not every dtype has a copy of its own
            sources.append(self._staged.pop(place.name).view(-1).view(torch.uint8))
            ready += place.names
        if targets:
            foreach_copy(targets, sources)

    def _compare(self, first: Place, loaded: torch.Tensor, second: torch.Tensor, place: Place) -> None:
        if is_sharded(loaded):
            loaded, second = local_parts(loaded, second)
        if not are_same_bits(loaded, second.to(loaded.dtype)):
            raise PlacementError(
                f"the model ties this tensor to {first.name}, but the checkpoint has other values for it",
                tensor=place.name,
                expected="the same bytes under both names",
                hint="Remove one of the two from the checkpoint, or untie them in the model",
            )

    def _load_subtree(self, subtree: Subtree, ready: list[str]) -> Keys:
        """Let a module load its part of the checkpoint itself, as `load_state_dict` of the whole model would."""
        state = self._state_for(subtree)
        whole = {(tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in state.values() if not is_sharded(tensor)}
        materialised = [target for target in subtree.all_targets if not target.on_meta]  # others are exchanged back
        if self._is_atomic:
            self._keep((target.names, target.tensor) for target in materialised)
        self._written.extend(target.name for target in materialised)
        keys, made = load_subtree(subtree, state, self._versions)
        for target, contents in made:
            if not target.tensor.is_meta:  # it had storage, which `assign` does not ask for
                target.tensor.copy_(contents)
                continue
            wanted = made_dtype(target.tensor, contents, self._placement.dtype)
            if contents.dtype is wanted and (contents.data_ptr(), wanted, contents.shape) in whole:
                self._exchange([target.tensor], [contents])
            else:  # a hook's slice holds all of a block
                own = contents.to(wanted).clone(memory_format=torch.contiguous_format)
                self._stage.made(own.nbytes, subtree.places[0].device if subtree.places else 0)
                self._exchange([target.tensor], [own])
        ready.extend(place.name for place in subtree.places if place.target is None)
        overruled = set(map(id, subtree.overruled))
        ready.extend(name for target in subtree.all_targets if id(target) not in overruled for name in target.names)
        return keys

    def _state_for(self, subtree: Subtree) -> dict[str, torch.Tensor]:
        """Return what a module is given, by its own names: a checkpoint may have a tied tensor under one or several."""
        state: dict[str, torch.Tensor] = {}
        firsts: dict[int, tuple[Place, torch.Tensor]] = {}
        for place in subtree.places:
            loaded = self._staged.pop(place.name)
            if place.target is not None:
                first, same = firsts.setdefault(id(place.target), (place, loaded))
                if first is not place:
                    self._compare(first, same, loaded, place)
            state.setdefault(subtree.own_name(place.name, place.target), _split(place, loaded))
        return state

    def _note_keys(self, subtree: Subtree, name: str, missing: list[str], unexpected: list[str]) -> None:
        if missing:
            filled = self._filled_otherwise(subtree, set(missing))
            missing = [key for key in missing if key not in filled]
            missing += [key for target in subtree.all_targets for key in target.names_beside(subtree, missing)]
        self._placement.note_keys(missing, unexpected, says=name)

    def _filled_otherwise(self, subtree: Subtree, missing: set[str]) -> set[str]:
        """Return which of the names that a module misses are those of tensors that were loaded under another name."""
        named = set(self._placement.names)
        filled: set[str] = set()
        for target in subtree.all_targets:
            names = target.names
            own = [name for name in names if name.startswith(subtree.prefix)]
            has_values = not target.tensor.is_meta and (named.intersection(names) or set(own) - missing)
            if has_values or target.is_decided_after(subtree):
                filled.update(names)
        return filled


def _split(place: Place, whole: torch.Tensor) -> torch.Tensor:
    """Return what a module that loads itself gets: of a tensor that is split over several devices, its own part."""
    target = place.target
    if target is not None and is_sharded(target.tensor) and target.tensor.shape == whole.shape:
        return split_like(target.tensor, whole)
    return whole
