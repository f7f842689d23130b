"""Names that torch has for dtypes, storages, devices and attributes in its files. Sources: torch/storage.py, torch/_utils.py."""

from __future__ import annotations

__all__ = ["DEVICES", "DTYPES", "OWN_ATTRIBUTES", "STORAGES"]

#: Names of dtypes in torch, and in the safetensors format. torch's other dtypes keep torch's name.
DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "complex32": "complex32",
    "complex128": "complex128",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4",
}

#: Classes of storages, without the "Storage" at the end, and the dtypes in them.
STORAGES = {
    "Bool": "BOOL",
    "Byte": "U8",
    "Char": "I8",
    "Short": "I16",
    "Int": "I32",
    "Long": "I64",
    "Half": "F16",
    "BFloat16": "BF16",
    "Float": "F32",
    "Double": "F64",
    "ComplexFloat": "C64",
    "ComplexDouble": "complex128",
    "QInt8": "qint8",
    "QUInt8": "quint8",
    "QInt32": "qint32",
}

#: Kinds of devices that every torch knows by name, whether or not there is one.
DEVICES = frozenset({"cpu", "cuda", "meta", "mps", "xpu", "hpu", "mtia"})

#: Attributes that torch's own classes of tensors compute, or check when they are set (torch 2.8 to 2.13). Nobody can have
#: given a tensor others under these names, and torch fails at most of them.
OWN_ATTRIBUTES = frozenset(
    """
    H T __class__ __cuda_array_interface__ __dict__ __weakref__ _backward_hooks _base _cdata _grad _grad_fn
    _has_symbolic_sizes_strides _post_accumulate_grad_hooks _python_dispatch _version data device dtype grad grad_dtype
    grad_fn imag is_cpu is_cuda is_ipu is_leaf is_maia is_meta is_mkldnn is_mps is_mtia is_nested is_quantized is_sparse
    is_sparse_csr is_vulkan is_xla is_xpu itemsize layout mH mT name nbytes ndim output_nr real requires_grad retains_grad
    shape volatile
    """.split()  # noqa: SIM905 (shorter)
)
