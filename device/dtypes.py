"""Dtypes: the names of the safetensors format as torch dtypes, and which casts a load may make."""

from __future__ import annotations

from functools import cache

import torch

from weightstream.device.config import DeviceConfig
from weightstream.errors import DtypeMismatchError, UnsupportedFormatError

__all__ = ["CASTABLE", "are_same_bits", "destination_dtype", "torch_dtype", "torch_shape"]

#: Whole numbers of as many bytes as an element has.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: A load casts among these four and nothing else: `load_state_dict` would turn unscaled FP8 into BF16 silently.
CASTABLE = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

#: safetensors name -> name in torch. The 6-bit formats have no counterpart in torch.
_TORCH_NAMES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}


@cache
def torch_dtype(name: str) -> torch.dtype | None:
    """Return the torch dtype of a safetensors dtype, or None where this torch has none."""
    found = getattr(torch, _TORCH_NAMES.get(name, ""), None)
    return found if isinstance(found, torch.dtype) else None


def unsupported(name: str, tensor: str) -> UnsupportedFormatError:
    """Make the error for a dtype that this torch lacks."""
    return UnsupportedFormatError(
        "this version of torch has no such dtype", tensor=tensor, actual=name, hint=f"torch is {torch.__version__}"
    )


def torch_shape(name: str, shape: tuple[int, ...], *, tensor: str | None = None) -> tuple[int, ...]:
    """Return the shape in torch: F4 is packed there, two elements to one, along the last dimension.

    Raises:
        UnsupportedFormatError: that dimension is odd, so some byte would belong to two rows. `tensor`: who has it.
    """
    if name == "F4" and shape:
        if shape[-1] % 2:
            raise UnsupportedFormatError(
                "torch has F4 in pairs along the last dimension, and this one is odd", tensor=tensor, actual=str(shape)
            )
        return (*shape[:-1], shape[-1] // 2)
    return shape


def destination_dtype(
    stored: torch.dtype, tensor: torch.Tensor, config: DeviceConfig, *, tensor_name: str
) -> torch.dtype:
    """Decide which dtype a tensor has in the model once it is loaded.

    Args:
        stored: the checkpoint's dtype.
        tensor: the model's.
        config: `dtype` is used; it concerns tensors on meta alone.
        tensor_name: its name, for the message.

    Raises:
        DtypeMismatchError: the two differ and no cast between them is allowed, or the tensor requires gradients, which
            torch keeps for floating-point and complex numbers alone.
    """
    wanted = declared = tensor.dtype
    on_meta = tensor.is_meta
    if on_meta and config.dtype == "checkpoint":
        wanted = stored
    elif on_meta and config.dtype != "model" and declared in CASTABLE:
        wanted = getattr(torch, config.dtype)
    if wanted != stored and not (wanted in CASTABLE and stored in CASTABLE):
        raise DtypeMismatchError(
            "the dtypes differ and no cast is allowed between them",
            tensor=tensor_name,
            expected=f"{wanted} (model)",
            actual=f"{stored} (checkpoint)",
            hint="device.dtype: checkpoint takes the checkpoint's dtype, for parameters on meta",
        )
    if tensor.requires_grad and not (wanted.is_floating_point or wanted.is_complex):
        raise DtypeMismatchError(
            "torch keeps no gradients for such a dtype, and the parameter requires them",
            tensor=tensor_name,
            expected=f"{declared} (model)",
            actual=f"{wanted} (checkpoint)",
            hint="Call requires_grad_(False) on it before loading",
        )
    return wanted


def are_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare bits, without a copy: what is not a number equals itself, and zeros may differ in their sign."""
    if one.numel() != other.numel():  # nothing has compared shapes where hooks may reshape
        return False
    first, second = (tensor.resolve_conj().resolve_neg() for tensor in (one, other))
    if first.is_complex():
        first, second = torch.view_as_real(first), torch.view_as_real(second)
    bits = _BITS[first.itemsize]
    return torch.equal(first.view(bits), second.reshape(first.shape).view(bits))  # a scalar may be stored as a vector
