"""Models of the transformers library: `from_pretrained` that reads through weightstream, and models built on meta."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from weightstream.config import LoaderConfig
from weightstream.device.accelerator import on_callers_streams
from weightstream.device.config import DeviceConfig
from weightstream.errors import CheckpointError, UnsupportedFormatError
from weightstream.integrations.conversion import Weights, converted_names, loading
from weightstream.prefetch.checkpoint import open_checkpoint
from weightstream.prefetch.finding import find_checkpoint
from weightstream.prefetch.header import TensorSpec
from weightstream.ranks import ranked_logger
from weightstream.scheduler.handle import apart, in_own_thread, insist, settle

__all__ = ["build_on_meta", "from_pretrained", "from_pretrained_async"]

logger = ranked_logger(__name__)

#: Its own annotations leave too much open to be checked against.
transformers: Any = import_module("transformers")
_mapping: Any = import_module("transformers.conversion_mapping")

#: torch's names of the format's floating-point types; a model is declared in one of these.
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}

#: Implementations that are part of torch and transformers: a configuration may choose among these.
_BUILT_IN = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")

#: What tells transformers which files of which repository are meant.
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    auto_class: type | None = None,
    config: LoaderConfig | None = None,
    model_config: object = None,
    **kwargs: object,
) -> nn.Module:
    """Do what transformers' `from_pretrained` does, with the weights read through weightstream.

    Everything but reading is transformers' own: the choice of the class, conversions of the checkpoint's names and
    tensors (experts that the model fuses, for one), dtype, ties, computed buffers, what happens to missing tensors,
    the generation configuration. The weights are the same, bit by bit. What cannot be read this way (quantised models,
    several devices, `.bin` files) transformers reads itself, after a warning that says why.

    Stays offline unless `local_files_only=False` is given: a name on the hub is looked up in the local cache. Runs no
    code that comes with the checkpoint unless `trust_remote_code=True` is given, and uses no kernels that only the
    checkpoint names.

    Args:
        path: a folder, or a name on the Hugging Face hub (`org/name`).
        auto_class: a class of transformers (`AutoModelForCausalLM`, `LlamaModel`); None: the one that config.json names
            in `architectures`, else `AutoModel`.
        config: how to read, and where the model goes (`device.target`; a `device_map` goes before it).
        model_config: what transformers calls `config`: a configuration instead of the checkpoint's own.
        kwargs: of transformers' `from_pretrained`.

    Returns:
        The model in evaluation mode; with `output_loading_info=True` a tuple, as transformers returns it.

    Raises:
        CheckpointError: `path` is neither a folder nor in the local cache.
        WeightstreamError: the load failed; see `weightstream.errors`.
        TypeError: `config` is not a LoaderConfig.
        ValueError: it sets what transformers has arguments for: `device.dtype`, `device.rename`, `prefetch.variant`, ...
        Exception: whatever transformers raises.
    """
    weights = _weights(config, kwargs)
    return _load(path, auto_class, weights, model_config, kwargs)


async def from_pretrained_async(
    path: str | os.PathLike[str],
    *,
    auto_class: type | None = None,
    config: LoaderConfig | None = None,
    model_config: object = None,
    **kwargs: object,
) -> nn.Module:
    """Await `from_pretrained`, which runs on a thread of its own, with the caller's device and streams current there.

    Cancellation: the load is cancelled, and everything is cleaned up, before this returns; transformers' own part, which
    cannot be interrupted, is waited for.
    """
    weights = _weights(config, kwargs)
    work = functools.partial(_load, path, auto_class, weights, model_config, kwargs)
    result, thread = in_own_thread(on_callers_streams(work))
    try:
        return await settle(result)
    except BaseException:
        weights.stop()
        await insist(result)
        result.exception()
        raise
    finally:
        thread.join()  # which ends with its result


def _weights(config: object, kwargs: dict[str, object]) -> Weights:
    if config is not None and not isinstance(config, LoaderConfig):
        raise TypeError(
            f"config: expected a weightstream.LoaderConfig, found {type(config).__qualname__}; "
            "a configuration of transformers is passed as `model_config`"
        )
    used = LoaderConfig() if config is None else config
    decided = [
        f"device.{name}"
        for name, field in DeviceConfig.model_fields.items()
        if name != "target" and getattr(used.device, name) != field.get_default()
    ]
    decided += ["prefetch.variant"] if used.prefetch.variant is not None else []
    if decided:
        raise ValueError(f"{', '.join(decided)}: transformers decides that; it has arguments of its own for it")
    return Weights(used, variant=cast("str | None", kwargs.get("variant")))


def _load(
    path: str | os.PathLike[str],
    auto_class: type | None,
    weights: Weights,
    model_config: object,
    kwargs: dict[str, object],
) -> nn.Module:
    kwargs = {"local_files_only": True, "trust_remote_code": False, **kwargs}
    if model_config is not None:
        kwargs["config"] = model_config
    if auto_class is None:
        where = {name: kwargs[name] for name in (*_WHERE, "trust_remote_code") if name in kwargs}
        auto_class = _architecture(model_config or _from(transformers.AutoConfig, path, where))
    chosen = model_config is not None or not kwargs.keys().isdisjoint(("attn_implementation", "experts_implementation"))
    reading = functools.partial(_reading, weights=weights, chosen=chosen)
    if issubclass(auto_class, transformers.PreTrainedModel):
        kind = reading(auto_class)
    else:
        mapping = _Mapped(cast("Any", auto_class)._model_mapping, reading)  # noqa: SLF001 - it has no other way in
        kind = type(auto_class.__name__, (auto_class,), {"_model_mapping": mapping})
    loaded = _from(kind, path, kwargs)
    model: Any = cast("tuple[Any, object]", loaded)[0] if isinstance(loaded, tuple) else loaded
    made: Any = model.__class__
    if _READS in vars(made):
        model.__class__ = made.__base__
    else:
        logger.warning("%s: transformers reads the weights itself: the class is the checkpoint's own", path)
    return cast("nn.Module", loaded)


def _from(kind: Any, path: str | os.PathLike[str], kwargs: dict[str, object]) -> Any:  # noqa: ANN401
    """Call transformers' `from_pretrained`; say what is the matter where it blames the network that it may not ask."""
    try:
        return kind.from_pretrained(path, **kwargs)
    except OSError as error:
        if not kwargs["local_files_only"] or Path(path).exists():
            raise
        raise CheckpointError(
            "neither a folder nor a name in the local Hugging Face cache",
            file=path,
            hint="local_files_only=False downloads it",
        ) from error


class _Mapped:
    """The classes that an automatic class chooses from, each as one that reads through weightstream."""

    def __init__(self, mapping: Any, reading: Callable[[type], type]) -> None:  # noqa: ANN401
        self._mapping = mapping
        self._reading = reading

    def __getitem__(self, key: object) -> type | tuple[type, ...]:
        found: type | tuple[type, ...] = self._mapping[key]
        return self._reading(found) if isinstance(found, type) else tuple(map(self._reading, found))

    def __contains__(self, key: object) -> bool:
        return key in self._mapping

    def __iter__(self) -> Iterator[object]:
        return iter(self._mapping)


#: Marks the classes that `_reading` makes.
_READS = "_reads_through_weightstream"


def _reading(kind: type, *, weights: Weights, chosen: bool) -> type:
    """Return a subclass of one model class, of the same name, whose `from_pretrained` fills the model through `weights`.

    A subclass, because transformers has no hook for this and to patch its class would change it for everybody. The
    model is given its true class in the end.

    Args:
        kind: the model's true class.
        weights: what to fill it through.
        chosen: whether the caller has chosen the configuration, and so the kernels.
    """
    base = cast("Any", kind)
    elsewhere = False

    def placed(settings: Any) -> Any:  # noqa: ANN401 - transformers' LoadStateDictConfig
        return dataclasses.replace(settings, device_map={"": weights.device(settings)})

    def start(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        weights.check()
        if not chosen:
            _refuse_kernels(config)
        base.__init__(self, config, *args, **kwargs)

    def read(model: Any, state_dict: Any, files: Any, settings: Any, *args: Any) -> Any:  # noqa: ANN401
        nonlocal elsewhere
        reason = weights.why_not(files, state_dict, settings)
        if reason is None:
            return weights.fill(model, files, placed(settings)), None
        logger.warning("%s: transformers reads the weights itself: %s", settings.pretrained_model_name_or_path, reason)
        elsewhere = True
        return base._load_pretrained_model(model, state_dict, files, settings, *args)  # noqa: SLF001

    def finish(model: Any, settings: Any, info: Any) -> Any:  # noqa: ANN401
        return base._finalize_model_loading(model, settings if elsewhere else placed(settings), info)  # noqa: SLF001

    methods = {
        "__init__": start,
        "_load_pretrained_model": staticmethod(read),
        "_finalize_model_loading": staticmethod(finish),
    }
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**methods, **names, _READS: True})


def _refuse_kernels(config: Any) -> None:  # noqa: ANN401
    """Leave kernels to transformers where a configuration names others than torch's: it could fetch them and run them."""
    parts = [config, *filter(None, (getattr(config, key, None) for key in config.sub_configs))]
    names = [name for part in parts for name in (part._attn_implementation, part._experts_implementation)]  # noqa: SLF001
    if any(name is not None and name not in _BUILT_IN for name in names):
        _choose_no_kernels(config)


def build_on_meta(
    path: str | os.PathLike[str],
    *,
    auto_class: type | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
) -> nn.Module:
    """Build the model that a checkpoint's config.json describes, without memory for its weights.

    After a load it equals what `from_pretrained` makes, bit by bit: tied weights are tied, and the buffers that no
    checkpoint holds (rotary tables, position numbers) have been computed by transformers' own code. It is in evaluation
    mode. Reads local files only, and runs no code that comes with the checkpoint.

    Args:
        path: the checkpoint: its folder, a file in it, or `org/name` in the local Hugging Face cache.
        auto_class: a class of transformers (`AutoModelForCausalLM`, `LlamaModel`); None: the one that config.json names
            in `architectures`, else `AutoModel`.
        dtype: None: what config.json says, else that of the checkpoint's first floating-point tensor.
        device: where the computed buffers go; the parameters are on meta.
        variant: which of the checkpoints in the folder, as in `prefetch.variant`.

    Raises:
        CheckpointError: there is no checkpoint or no config.json beside it, or transformers cannot work with that.
        WeightstreamError: from opening the checkpoint, where config.json has no dtype; see `open_checkpoint`.
        UnsupportedFormatError: the checkpoint is quantised, which takes more than the model's own modules; or transformers
            would convert its tensors (merge experts, for one), which only `from_pretrained` lets it do.
    """
    folder = find_checkpoint(path, variant=variant).path.parent
    config = _read_config(folder)
    wanted = dtype or config.dtype or _stored_dtype(path, variant)
    with torch.device("meta"):
        model = _make(auto_class or _architecture(config), config, wanted, folder)
    _refuse_conversion(model, path, variant)
    _keep_in_float32(model, wanted)
    _compute_buffers(model, torch.device(device))
    module: nn.Module = model.eval()
    return module


def _read_config(folder: Path) -> Any:  # noqa: ANN401 - see above
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            "transformers needs the model's configuration beside the weights", file=file, actual="no such file"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _choose_no_kernels(config)
    except Exception as error:  # of many classes, not all of them its own
        raise CheckpointError(f"transformers cannot work with it: {error}", file=file) from error
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedFormatError("the checkpoint is quantised", file=file, hint="Load it through transformers")
    return config


def _choose_no_kernels(config: Any) -> None:  # noqa: ANN401
    """Leave the choice of kernels to transformers: a name in config.json can have it fetch code from the hub."""
    config._attn_implementation = None  # noqa: SLF001 - setting it sets it for the parts of composed models too
    config._experts_implementation = None  # noqa: SLF001


def _stored_dtype(path: str | os.PathLike[str], variant: str | None) -> torch.dtype:
    floats = (_FLOATS.get(spec.dtype) for spec in _tensors(path, variant).values())
    return next((dtype for dtype in floats if dtype is not None), torch.get_default_dtype())


def _tensors(path: str | os.PathLike[str], variant: str | None) -> dict[str, TensorSpec]:
    """Return what is in a checkpoint. On another thread: a signal must not leave its files open."""

    def look() -> dict[str, TensorSpec]:
        with open_checkpoint(path, variant=variant) as checkpoint:
            return checkpoint.tensors

    return apart(look)


def _architecture(config: Any) -> type:  # noqa: ANN401
    listed: object = config.architectures
    names = [name for name in cast("list[object]", listed) if isinstance(name, str)] if isinstance(listed, list) else []
    found: type = next(
        (getattr(transformers, name) for name in names if hasattr(transformers, name)), transformers.AutoModel
    )
    return found


def _make(kind: Any, config: Any, dtype: torch.dtype, folder: Path) -> Any:  # noqa: ANN401
    try:
        if issubclass(kind, transformers.PreTrainedModel):
            return kind._from_config(config, dtype=dtype)  # noqa: SLF001 - only automatic classes have a public one
        return kind.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # likewise
        raise CheckpointError(
            f"transformers cannot build {kind.__name__} from it: {error}", file=folder / "config.json"
        ) from error


def _refuse_conversion(model: Any, path: str | os.PathLike[str], variant: str | None) -> None:  # noqa: ANN401
    """Refuse a checkpoint of whose tensors transformers would make others. Those that it only renames are left alone."""
    rules = _mapping.get_model_conversion_mapping(model)
    if not any(isinstance(rule, loading.WeightConverter) for rule in rules):
        return
    converted = converted_names(list(_tensors(path, variant)), model, rules)
    if converted:
        raise UnsupportedFormatError(
            f"transformers makes other tensors of {len(converted)} of this checkpoint's, and a load takes them as they are",
            file=path,
            tensor=converted[0],
            hint="Load it with weightstream.integrations.transformers.from_pretrained, which lets transformers convert them",
        )


def _keep_in_float32(model: Any, dtype: torch.dtype) -> None:  # noqa: ANN401
    """Declare those parameters as float32 that transformers keeps so in a model of half precision (T5's `wo`)."""
    names = set(model._keep_in_fp32_modules_strict or ())  # noqa: SLF001
    if dtype == torch.float16:
        names |= set(model._keep_in_fp32_modules or ())  # noqa: SLF001
    if not names or dtype not in (torch.float16, torch.bfloat16):
        return
    loading: Any = import_module("transformers.core_model_loading")  # its patterns have a syntax of their own
    pattern = loading.build_glob_alternation(sorted(names))[0]
    for name, parameter in model.named_parameters():
        if pattern.search(name):
            parameter.data = parameter.data.float()


def _compute_buffers(model: Any, device: torch.device) -> None:  # noqa: ANN401
    """Give the buffers that no checkpoint holds their values, as `from_pretrained` does at its end.

    transformers initialises what lacks a mark; everything that the checkpoint holds is marked, so only those buffers
    are left. The marks stay, as they do after `from_pretrained`: they protect loaded weights from a later
    initialisation.
    """
    computed: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            if key in module._non_persistent_buffers_set:  # noqa: SLF001 - nn.Module has no other way to ask
                setattr(module, key, torch.empty_like(buffer, device="cpu"))
                computed.append((module, key))
            else:
                buffer._is_hf_initialized = True  # noqa: SLF001
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # noqa: SLF001
    model.initialize_weights()
    for module, key in computed:
        setattr(module, key, getattr(module, key).to(device))
