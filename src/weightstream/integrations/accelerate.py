"""A drop-in for accelerate's `load_checkpoint_in_model`: the same signature, and the same model afterwards.

Does not import accelerate. What its function can do and this one cannot is an error that says so. docs/integrations/accelerate.md
has a table of every argument.
"""

# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# Gradient hooks have no public name in `torch.Tensor`.
from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from weightstream.api import load_sync
from weightstream.config import LoaderConfig
from weightstream.device.accelerator import find_device
from weightstream.device.config import DeviceConfig
from weightstream.device.devicemap import DeviceMap
from weightstream.device.dtypes import CASTABLE
from weightstream.device.exchange import exchange
from weightstream.device.targets import Targets, find_targets
from weightstream.errors import PlacementError
from weightstream.ranks import ranked_logger
from weightstream.scheduler.report import LoadReport

__all__ = ["load_checkpoint_in_model"]

logger = ranked_logger(__name__)

Device = int | str | torch.device


def load_checkpoint_in_model(  # noqa: PLR0913, PLR0917 (the signature is accelerate's)
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: Mapping[str, Device] | None = None,
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
        model: on meta or materialised. With a `device_map`, what has storage elsewhere, or of another dtype than asked for,
            is moved and cast; what it had is kept until the load has ended.
        checkpoint: a folder, an `*.index.json` or a file.
        device_map: devices by name of module; see `device.device_map`. Every tensor of the model needs one. None: parameters
            on meta go to the CPU, the others stay where they are.
        offload_folder: for modules on `disk`, which are refused.
        dtype: for what the model declares as a floating-point tensor, with a `device_map`; accelerate ignores it without
            one.
        offload_state_dict: bounds host memory in accelerate. It is bounded here in any case.
        offload_buffers: likewise for modules on `disk`.
        keep_in_fp32_modules: with `dtype` float16, names of modules or tensors that become float32 instead.
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
        "offload_8bit_bnb": offload_8bit_bnb,
        "full_state_dict=False": not full_state_dict,
        "broadcast_from_rank0": broadcast_from_rank0,
    }
    for what, is_asked_for in refused.items():
        if is_asked_for:
            raise PlacementError(
                f"load_checkpoint_in_model: {what} is not supported here", hint="Use accelerate's own function for it"
            )
    path = _only_index(Path(checkpoint))
    if device_map is None:
        # What is on meta takes the checkpoint's dtype, on the CPU; what has storage keeps its own.
        on_meta = all(parameter.is_meta for parameter in model.parameters())
        entries = {"": "cpu", **dict.fromkeys(find_targets(model).own_on_meta, "meta")} if on_meta else None
        config = DeviceConfig(dtype="checkpoint", strict=strict)
        report = load_sync(model, path, config=LoaderConfig(device=config), device_map=entries)
    else:
        report = _load_by_map(model, path, device_map, _casts(dtype, keep_in_fp32_modules or []), strict=strict)
    if report.unexpected_keys:
        logger.warning(
            "%d tensors of %s are not in %s and were not used: %s",
            *(len(report.unexpected_keys), path, type(model).__name__, ", ".join(report.unexpected_keys[:5])),
        )


def _only_index(path: Path) -> Path:
    """Return the index of a folder, whatever its name, as accelerate finds it: where there is one, and no usual file."""
    if not path.is_dir() or any((path / name).exists() for name in ("pytorch_model.bin", "model.safetensors")):
        return path
    indexes = list(path.glob("*.index.json"))
    return indexes[0] if len(indexes) == 1 else path


Casts = Callable[[list[str], torch.dtype], torch.dtype]


def _casts(asked: str | torch.dtype | None, kept: list[str]) -> Casts:
    """Return what makes the dtype that a tensor is to have out of its names and of the one that it has."""
    if asked is None:
        return lambda _, declared: declared
    dtype = getattr(torch, str(asked).removeprefix("torch."), None)
    if dtype not in CASTABLE:
        raise PlacementError(
            "load_checkpoint_in_model: dtype is none that floating-point tensors can be cast to",
            expected=", ".join(sorted(map(str, CASTABLE))),
            actual=str(asked),
        )

    def wanted(names: list[str], declared: torch.dtype) -> torch.dtype:
        if declared not in CASTABLE:
            return declared
        is_kept = dtype is torch.float16 and any(key == name or f"{key}." in name for key in kept for name in names)
        return torch.float32 if is_kept else dtype

    return wanted


def _load_by_map(
    model: nn.Module, path: Path, device_map: Mapping[str, Device], casts: Casts, *, strict: bool
) -> LoadReport:
    found = find_targets(model)
    known = {*(prefix[:-1] for prefix in found.prefixes), *found.index_of, *found.own_buffers}
    strangers = [name for name in device_map if name not in known]
    if strangers:
        logger.warning("device_map names what the model does not have: %s", ", ".join(strangers[:5]))
    entries = {name: device for name, device in device_map.items() if name in known}
    # What no checkpoint holds stays as it is: the model, or whoever made it, computes it afterwards.
    entries |= dict.fromkeys(found.own_on_meta, "meta")
    ignored: tuple[str, ...] = (".",)
    config = DeviceConfig(dtype="model", strict=strict, ignore_missing=ignored).with_device_map(entries)
    aside: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        _put_aside(found, _resolved(entries), casts, aside)
        report = load_sync(model, path, config=LoaderConfig(device=config))
    except BaseException:
        for tensor, had in aside:
            exchange(tensor, had)
        raise
    left = {id(found.get(name)) for name in report.unloaded_keys}
    for tensor, had in aside:
        if tensor.is_meta and id(tensor) not in left:  # the checkpoint lacks it
            exchange(tensor, had)
    return report


def _resolved(entries: Mapping[str, Device]) -> DeviceMap:
    return DeviceMap(
        {
            name: torch.device("meta")
            if str(device) == "meta"
            else find_device(device if isinstance(device, int) else str(device), "device_map")
            for name, device in entries.items()
        }
    )


def _put_aside(
    found: Targets, devices: DeviceMap, casts: Casts, aside: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Put tensors on meta that are to be on another device, or of another dtype: loading makes them anew.

    Args:
        found: the model's tensors.
        devices: where they are to be.
        casts: what dtype they are to have.
        aside: filled in: tensors, and what was behind them.
    """
    for name, position in found.index_of.items():
        tensor = found.tensors[position]
        if name != found.first_name(name) or not _is_plain(tensor):  # a tie, or what is refused by name later
            continue
        special = found.special.get(position)
        names = [name] if special is None else special.names
        index, dtype = devices.index_of(name), casts(names, tensor.dtype)
        device = torch.device("meta") if index is None else devices.devices[index]
        if dtype is tensor.dtype and (tensor.is_meta or tensor.device == device):
            continue
        if tensor._backward_hooks is not None or tensor._post_accumulate_grad_hooks:
            raise PlacementError(
                "the parameter is to be moved or cast and has a gradient hook, which would be lost",
                tensor=name,
                hint="Register hooks on parameters after loading",
            )
        substitute = torch.empty(tensor.shape, dtype=dtype, device="meta", requires_grad=tensor.requires_grad)
        exchange(tensor, substitute)
        aside.append((tensor, substitute))


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has a shape, and memory for what it holds and no more: others are not moved."""
    dispatches = [getattr(kind, "__torch_dispatch__", None) for kind in (type(tensor), torch.Tensor)]
    return not is_lazy(tensor) and dispatches[0] is dispatches[1] and tensor.layout is torch.strided
