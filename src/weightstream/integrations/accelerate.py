"""A drop-in for accelerate's `load_checkpoint_in_model`: the same signature, and the same model afterwards.

Does not import accelerate. What its function can do and this one cannot is an error that says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import nn

from weightstream.api import load_sync
from weightstream.config import LoaderConfig
from weightstream.device.config import DeviceConfig, Pattern
from weightstream.errors import PlacementError
from weightstream.ranks import ranked_logger

__all__ = ["load_checkpoint_in_model"]

logger = ranked_logger(__name__)


def load_checkpoint_in_model(  # noqa: PLR0913, PLR0917 (the signature is accelerate's)
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: Mapping[str, int | str | torch.device] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,  # noqa: ARG001 (nothing is offloaded)
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool = False,  # noqa: ARG001, FBT001, FBT002
    offload_buffers: bool = False,  # noqa: ARG001, FBT001, FBT002
    keep_in_fp32_modules: list[str] | None = None,
    offload_8bit_bnb: bool = False,  # noqa: FBT001, FBT002
    strict: bool = False,  # noqa: FBT001, FBT002
    full_state_dict: bool = True,  # noqa: FBT001, FBT002
    broadcast_from_rank0: bool = False,  # noqa: FBT001, FBT002
) -> None:
    """Load a checkpoint into a model as accelerate's function does, and block until it is there.

    May be called where an event loop runs: it blocks that loop.

    Args:
        model: on meta or materialised.
        checkpoint: a folder, an `*.index.json` or a file.
        device_map: devices by name of module; see `device.device_map`. None: parameters on meta go to the CPU.
        offload_folder: for modules on `disk`, which are refused.
        offload_buffers: likewise.
        dtype: for floating-point tensors on meta, with a `device_map`; accelerate ignores it without one.
        offload_state_dict: bounds host memory in accelerate. It is bounded here in any case.
        keep_in_fp32_modules: refused.
        offload_8bit_bnb: refused.
        strict: fail for names that the model lacks, and, without a `device_map`, for those that the checkpoint lacks.
        full_state_dict: False is refused.
        broadcast_from_rank0: refused.

    Raises:
        PlacementError: something is asked for that is refused, or does not fit the model.
        WeightstreamError: see `weightstream.errors`; the model then is as it was before, as far as `load_sync` says.
    """
    refused = {
        'device_map with "disk"': device_map is not None and "disk" in device_map.values(),
        "keep_in_fp32_modules": bool(keep_in_fp32_modules),
        "offload_8bit_bnb": offload_8bit_bnb,
        "full_state_dict=False": not full_state_dict,
        "broadcast_from_rank0": broadcast_from_rank0,
    }
    for what, is_asked_for in refused.items():
        if is_asked_for:
            raise PlacementError(
                f"load_checkpoint_in_model: {what} is not supported here", hint="Use accelerate's own function for it"
            )
    config = _device_config(model, device_map, dtype, strict=strict)
    report = load_sync(model, checkpoint, config=LoaderConfig(device=config), device_map=device_map)
    if report.unexpected_keys:
        logger.warning(
            "%d tensors of %s are not in %s and were not used: %s",
            *(len(report.unexpected_keys), checkpoint, type(model).__name__, ", ".join(report.unexpected_keys[:5])),
        )


def _device_config(
    model: nn.Module, device_map: Mapping[str, object] | None, dtype: str | torch.dtype | None, *, strict: bool
) -> DeviceConfig:
    if device_map is None:
        # What is on meta takes the checkpoint's dtype, on the CPU; what has storage keeps its own.
        on_meta = all(parameter.is_meta for parameter in model.parameters())
        return DeviceConfig(target="cpu" if on_meta else "auto", dtype="checkpoint", strict=strict)
    name = "model" if dtype is None else str(dtype).removeprefix("torch.")
    ignored: tuple[Pattern, ...] = (".",)
    return DeviceConfig.model_validate({"dtype": name, "strict": strict, "ignore_missing": ignored})
