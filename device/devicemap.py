"""A device map: which tensors of a model go to which device, as accelerate writes it. Decides; changes nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from weightstream.device.placement import Placement
from weightstream.device.targets import Subtree, Targets
from weightstream.errors import PlacementError

__all__ = ["DeviceMap"]


class DeviceMap:
    """Names of modules or tensors, and their devices. The longest name that a tensor's begins with decides.

    Args:
        entries: name -> device; "" is the whole model. What is on `meta` is left unloaded.

    Attributes:
        devices: those that something is loaded to, each once, in the order of the entries.
    """

    def __init__(self, entries: Mapping[str, torch.device]) -> None:
        self._entries = entries
        self.devices = tuple(dict.fromkeys(device for device in entries.values() if device.type != "meta"))
        self._indices = {device: index for index, device in enumerate(self.devices)}
        #: Of modules that have been asked for, as most tensors are asked for beside others of their module.
        self._found: dict[str, torch.device | None] = {}

    def index_of(self, name: str) -> int | None:
        """Return a tensor's device as an index into `devices`; None: it stays on meta.

        Raises:
            PlacementError: the map says nothing about it.
        """
        device = self._entries.get(name) or self._of_module(name.rpartition(".")[0])
        if device is None:
            raise PlacementError(
                "the device map gives this tensor no device",
                tensor=name,
                hint='Add its module to device.device_map, or "" for everything that is not named',
            )
        return self._indices.get(device)

    def check(self, found: Targets) -> None:
        """Compare the map with the model.

        Raises:
            PlacementError: it names what the model does not have, or says that a parameter with storage is elsewhere.
        """
        modules = {prefix[:-1] for prefix in found.prefixes}
        for name in self._entries:
            if name and name not in modules and name not in found.index_of and name not in found.own_buffers:
                raise PlacementError(f"the device map names {name!r}, and the model has no such module or tensor")
        for name in found.materialised:
            index, actual = self.index_of(name), found.get(name).device
            expected = torch.device("meta") if index is None else self.devices[index]
            if actual != expected:
                raise PlacementError(
                    "the parameter already has storage, on another device than the device map says",
                    tensor=name,
                    expected=str(expected),
                    actual=str(actual),
                    hint="Move it there, or change device.device_map",
                )

    def leave_on_meta(self, placement: Placement, found: Targets) -> list[Subtree]:
        """Note what a map leaves on meta, and which ties it would split; forget, and return, modules that nothing is loaded of.

        Raises:
            PlacementError: a module that loads itself would get a part of its tensors alone.
        """
        unloaded: set[str] = set()
        for name, at in found.index_of.items():
            target = found.special.get(at)
            if target is not None and name != target.name:  # a tie: dealt with under its first name
                continue
            index = self.index_of(name)
            names = [name] if target is None else target.names
            if index is None:
                unloaded.update(names)
            if any(self.index_of(other) != index for other in names[1:]):
                placement.split_ties.append(name)
        placement.unloaded = [name for name in found.index_of if name in unloaded]
        left: list[Subtree] = []
        for subtree in found.subtrees:
            names = [target.name for target in subtree.targets if target.name in unloaded]
            if names and len(names) == len(subtree.targets):
                left.append(subtree)
                found.leave(subtree)
            elif names:
                raise PlacementError(
                    f"the device map leaves this on meta, but {subtree.name or 'the model'} loads all its tensors itself",
                    tensor=names[0],
                    hint="Leave all of that module on meta, or nothing",
                )
        gone = {subtree.rank for subtree in left}
        placement.subtrees = [subtree for subtree in found.subtrees if subtree.rank not in gone]
        return left

    def _of_module(self, name: str) -> torch.device | None:
        if name not in self._found:
            device = self._entries.get(name)
            if device is None and name:
                device = self._of_module(name.rpartition(".")[0])
            self._found[name] = device
        return self._found[name]
