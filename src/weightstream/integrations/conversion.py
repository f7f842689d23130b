"""The weights of one `from_pretrained`: from safetensors files into a model on meta, with transformers' own conversions.

Owns the engine that they are read with, and decides which of two ways they take. Tensors that keep their names go
straight to their places. As soon as one of them is renamed or converted, all are streamed, collected until everything
that becomes one parameter is there (the experts of one layer, say), and handed to transformers' loading function in
portions. So what is held beside the model is one portion and what is not complete, in whatever order the files are.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from weightstream.config import LoaderConfig
from weightstream.device.accelerator import caller_streams, find_device
from weightstream.device.config import DeviceConfig
from weightstream.errors import LoadCancelledError
from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.scheduler.consumer import ConsumerSink, drain
from weightstream.scheduler.engine import Engine
from weightstream.scheduler.handle import apart, end_alone
from weightstream.scheduler.job import Job
from weightstream.scheduler.loader import make_job
from weightstream.scheduler.looking import look
from weightstream.scheduler.sinks import ModelSink, Sink

__all__ = ["Weights", "converted_names", "loading"]

loading: Any = import_module("transformers.core_model_loading")
_report: Any = import_module("transformers.utils.loading_report")
_integrations: Any = import_module("transformers.integrations")

#: So many bytes are handed over at once. Not measured: each time transformers looks at every name of the model, which
#: takes a millisecond, in which this much is read.
_PORTION_BYTES = 64 * 2**20


class Weights:
    """Fills one model. Blocking; `stop` may be called from any thread, once and for all.

    Args:
        config: how to read; `device.target` is where the model goes unless transformers was told.
        variant: which of the checkpoints in a folder, as transformers has it.
    """

    def __init__(self, config: LoaderConfig, *, variant: str | None = None) -> None:
        self._config = config
        self._variant = variant
        self._lock = threading.Lock()
        self._job: Job | None = None
        self._stopped = False

    def stop(self) -> None:
        """End the load that runs, or the one that is going to."""
        with self._lock:
            self._stopped = True
            if self._job is not None:
                self._job.stop()

    def check(self) -> None:
        """Raise LoadCancelledError if `stop` was called."""
        if self._stopped:
            raise LoadCancelledError("the load was cancelled")

    def why_not(self, files: list[str] | None, state_dict: object, settings: Any) -> str | None:  # noqa: ANN401
        """Return why transformers has to read the weights itself, or None.

        Args:
            files: as transformers has found them.
            state_dict: weights that are there already.
            settings: a `LoadStateDictConfig`.
        """
        places = _places(settings)
        reasons = {
            "the weights were passed as a state_dict": state_dict is not None,
            "the model is quantised": settings.hf_quantizer is not None,
            "the model is distributed over several processes": settings.device_mesh is not None
            or _integrations.is_deepspeed_zero3_enabled(),
            "the model is spread over several devices": len(places) > 1 or "disk" in places,
            "the weights are not in safetensors files": not all(
                file.endswith(".safetensors") for file in files or [""]
            ),
        }
        found = next((reason for reason, holds in reasons.items() if holds), None)
        if found is None and files is not None and len(files) > 1 and not self._indexed(files):
            return "the files are not those that one index lists"
        return found

    def _indexed(self, files: list[str]) -> bool:
        """Tell whether the index that stands for these files is there and lists them and no others."""
        path = self._path(files)
        if not path.is_file():
            return False
        found = _look(self._config, path)
        return {shard.path.name for shard in found.shards} == {Path(file).name for file in files}

    def _path(self, files: list[str]) -> Path:
        """Return what stands for a checkpoint of these files: the only one, or the index beside them."""
        variant = f".{self._variant}" if self._variant else ""
        index = Path(files[0]).with_name(f"model.safetensors.index{variant}.json")
        return Path(files[0]) if len(files) == 1 else index

    def device(self, settings: Any) -> torch.device:  # noqa: ANN401
        """Return where the model goes."""
        for place in _places(settings):
            return torch.device(place)
        return find_device(self._config.device.target)

    def fill(self, model: Any, files: list[str], settings: Any) -> Any:  # noqa: ANN401
        """Load the files into a model on meta; return transformers' `LoadStateDictInfo`.

        Args:
            model: as `from_pretrained` has made it: tensors that the files lack stay on meta.
            files: the shards of one checkpoint.
            settings: a `LoadStateDictConfig`, whose device map names one device.

        Raises:
            WeightstreamError: the load failed; see `weightstream.errors`.
        """
        (device,) = settings.device_map.values()
        target = DeviceConfig(target=str(device), strict=False)
        config = self._config.model_copy(update={"device": target})
        path = self._path(files)
        groups, converted = _group(list(_look(config, path).tensors), model, settings.weight_mapping)
        plain = not converted and all(group == name for name, group in groups.items())
        engine = Engine(config)
        use: Callable[[], Any]
        if plain and not settings.ignore_mismatched_sizes:
            _declare(model, settings)
            job = self._make_job(engine, path, ModelSink(engine, model))
            use = functools.partial(_place, job, model, settings)
        else:
            sink = ConsumerSink(engine)
            job = self._make_job(engine, path, sink)
            use = functools.partial(_convert, job, sink, model, settings, groups)
        try:
            try:
                try:
                    job.start()
                    return use()
                finally:
                    end_alone(job, engine)
            finally:  # once more, because this thread may be interrupted in the middle of it, or before
                end_alone(job, engine)
        finally:  # and then again: Ctrl-C may come twice
            end_alone(job, engine)

    def _make_job(self, engine: Engine, path: Path, sink: Sink) -> Job:
        with self._lock:
            self.check()
            self._job = make_job(engine, path, sink, caller_streams())
            return self._job


def _look(config: LoaderConfig, path: Path) -> Checkpoint:
    return apart(lambda: look(config.model_copy(update={"checkpoint": path})))


def _place(job: Job, model: Any, settings: Any) -> Any:  # noqa: ANN401
    """Load straight into the model's own parameters."""
    report = job.finished.result()
    missing = set(report.missing_keys)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in missing:
            tensor._is_hf_initialized = True  # noqa: SLF001 - or transformers would initialise it
    model._weight_conversions = [rule for rule in settings.weight_mapping or () if rule.was_used()]  # noqa: SLF001
    return _info(missing_keys=missing, unexpected_keys=set(report.unexpected_keys))


def _convert(job: Job, sink: ConsumerSink, model: Any, settings: Any, groups: dict[str, str]) -> Any:  # noqa: ANN401
    """Stream the tensors, and let transformers convert them as soon as their groups are complete."""
    info = _info(missing_keys=set(model.state_dict()))
    for portion in _portions(drain(sink, job.finished), groups):
        found, _ = loading.convert_and_load_state_dict_in_model(model=model, state_dict=portion, load_config=settings)
        info.missing_keys &= found.missing_keys
        info.unexpected_keys |= found.unexpected_keys
        info.mismatched_keys |= found.mismatched_keys
        info.conversion_errors |= found.conversion_errors
        info.error_msgs += found.error_msgs
        portion.clear()
    job.finished.result()
    return info


def _places(settings: Any) -> set[int | str | torch.device]:  # noqa: ANN401
    """Return the devices that transformers was told to use; none if it was not told."""
    device_map: dict[str, int | str | torch.device] = settings.device_map or {}
    return set(device_map.values())


def _info(**known: set[str]) -> Any:  # noqa: ANN401
    empty = {field.name: set[str]() for field in dataclasses.fields(_report.LoadStateDictInfo)}
    return _report.LoadStateDictInfo(**{**empty, "error_msgs": [], "conversion_errors": {}, **known})


def converted_names(names: list[str], model: Any, rules: Any) -> list[str]:  # noqa: ANN401
    """Return those of a checkpoint's tensors of which transformers makes others: it merges, splits or transposes them."""
    return _group(names, model, rules)[1]


def _group(names: list[str], model: Any, rules: Any) -> tuple[dict[str, str], list[str]]:  # noqa: ANN401
    """Return, for each tensor of the checkpoint, the name that it shares with those it has to be converted with.

    And the names of those that are converted, beyond being renamed.
    """
    renamings = [rule for rule in rules or () if isinstance(rule, loading.WeightRenaming)]
    converters = [rule for rule in rules or () if isinstance(rule, loading.WeightConverter)]
    rename = functools.partial(
        loading.rename_source_key, base_model_prefix=model.base_model_prefix, meta_state_dict=model.state_dict()
    )
    found = {name: rename(name, renamings, converters) for name in names}
    groups = {name: group for name, (group, _) in found.items()}
    return groups, [name for name, (_, pattern) in found.items() if pattern is not None]


def _portions(tensors: Iterator[tuple[str, torch.Tensor]], groups: dict[str, str]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect tensors into dictionaries of whole groups, of `_PORTION_BYTES` or more except for the last.

    A tensor that is a group of its own will stay as it is: if it shares memory it is copied, or it would keep the
    neighbours that are going to be converted.
    """
    missing: dict[str, int] = {}
    for group in groups.values():
        missing[group] = missing.get(group, 0) + 1
    sizes = dict(missing)
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    portion: dict[str, torch.Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        group = groups[name]
        is_shared = sizes[group] == 1 and tensor.untyped_storage().nbytes() > 2 * tensor.nbytes
        waiting.setdefault(group, {})[name] = tensor.clone() if is_shared else tensor
        missing[group] -= 1
        if not missing[group]:
            whole = waiting.pop(group)
            portion |= whole
            num_bytes += sum(part.nbytes for part in whole.values())
        if num_bytes >= _PORTION_BYTES:
            yield portion
            portion, num_bytes = {}, 0
    if portion:
        yield portion


def _declare(model: Any, settings: Any) -> None:  # noqa: ANN401
    """Give parameters on meta the dtype that they are to be loaded in, and computed buffers memory.

    The buffers get their values from transformers, after the load.
    """
    (device,) = settings.device_map.values()
    if settings.dtype_plan:
        pattern, plan, _ = loading.build_glob_alternation(list(settings.dtype_plan))
        for name, tensor in model.state_dict(keep_vars=True).items():
            found = pattern.search(name)
            if found is not None:
                tensor.data = tensor.data.to(settings.dtype_plan[plan[found.lastgroup]])
    for module in model.modules():
        for key in module._non_persistent_buffers_set:  # noqa: SLF001 - nn.Module has no other way to ask
            if (buffer := getattr(module, key)) is not None:
                setattr(module, key, torch.empty_like(buffer, device=device))
