"""Models of the transformers library, built on meta so that weightstream can fill them."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from weightstream.errors import CheckpointError, UnsupportedFormatError
from weightstream.prefetch.checkpoint import open_checkpoint
from weightstream.prefetch.finding import find_checkpoint

__all__ = ["build_on_meta"]

#: Its own annotations leave too much open to be checked against.
transformers: Any = import_module("transformers")

#: torch's names of the format's floating-point types; a model is declared in one of these.
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


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
        UnsupportedFormatError: the checkpoint is quantised, which takes more than the model's own modules.
    """
    folder = find_checkpoint(path, variant=variant).path.parent
    config = _read_config(folder)
    wanted = dtype or config.dtype or _stored_dtype(path, variant)
    with torch.device("meta"):
        model = _make(auto_class or _architecture(config), config, wanted, folder)
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
    with open_checkpoint(path, variant=variant) as checkpoint:
        floats = (_FLOATS.get(spec.dtype) for spec in checkpoint.tensors.values())
        return next((dtype for dtype in floats if dtype is not None), torch.get_default_dtype())


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
