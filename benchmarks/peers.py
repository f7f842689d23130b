"""The arms of other loaders, each as its own documentation uses it. None is imported before it is needed.

Where a loader returns tensors, they are assigned to a model on meta, which is what costs it least; "into allocated
parameters" are the ways that copy. `lazy` loaders map the files, and the bytes are read when they are used.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.arms import Arm, Case, SkippedError
from benchmarks.checkpoints import build

__all__ = ["ARMS"]

_LIBRARY = "safetensors.torch"


def _assign(case: Case, tensors: dict[str, torch.Tensor]) -> nn.Module:
    case.model.load_state_dict(tensors, assign=True)
    return case.model


def _accelerate(case: Case, *, device_map: bool) -> nn.Module:
    load: Any = import_module("accelerate").load_checkpoint_in_model
    load(case.model, case.path, device_map={"": str(case.device)} if device_map else None)
    return case.model


def _preload(case: Case) -> nn.Module:
    """The whole checkpoint into host memory, then one `load_state_dict`."""
    load_file: Any = import_module(_LIBRARY).load_file
    tensors: dict[str, torch.Tensor] = {}
    for shard in case.shards:
        tensors.update(load_file(shard))
    case.model.load_state_dict(tensors, strict=False)
    return case.model


def _load_file(case: Case) -> nn.Module:
    load_file: Any = import_module(_LIBRARY).load_file
    tensors: dict[str, torch.Tensor] = {}
    for shard in case.shards:
        tensors.update(load_file(shard, device=str(case.device)))
    return _assign(case, tensors)


def _safe_open(case: Case) -> nn.Module:
    safe_open: Any = import_module("safetensors").safe_open
    parameters = dict(case.model.named_parameters())
    with torch.no_grad():
        for shard in case.shards:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dictionary
                    parameters[name].copy_(file.get_tensor(name))
    return case.model


def _to_empty(case: Case, *, load: Callable[[Case], nn.Module]) -> nn.Module:
    """Give a model on meta memory, which nobody has touched, and then copy into that: what fills it from nothing."""
    case.model.to_empty(device=case.device)
    return load(case)


def _rehearse_to_empty(_case: Case) -> None:
    """From meta, torch imports some 480 modules when it is asked for memory for the first time; 0.3 s."""
    nn.Linear(1, 1, device="meta").to_empty(device="cpu")


def _needs_prefetch(_case: Case) -> None:
    if not hasattr(import_module("safetensors").safe_open, "prefetch"):
        raise SkippedError(f"safetensors {import_module('safetensors').__version__} has no prefetch; 0.9.0rc1 has")


def _prefetch(case: Case) -> nn.Module:
    safe_open: Any = import_module("safetensors").safe_open
    tensors: dict[str, torch.Tensor] = {}
    files = [safe_open(shard, framework="pt", device=str(case.device)) for shard in case.shards]
    for loader in [file.prefetch() for file in files]:
        with loader:
            tensors.update(iter(loader))
    return _assign(case, tensors)


def _instanttensor(case: Case, *, buffered: bool) -> nn.Module:
    """By default it reads past the page cache; `BUFFERED` is what it advises for files that are in there."""
    library: Any = import_module("instanttensor")
    backend = library.BackendPolicy.BUFFERED if buffered else None
    files = [str(shard) for shard in case.shards]
    with library.safe_open(files, framework="pt", device=case.device, backend=backend) as file:
        return _assign(case, dict(file.tensors()))


def _runai(case: Case) -> nn.Module:
    streamer: Any = import_module("runai_model_streamer").SafetensorsStreamer
    with streamer() as stream:
        stream.stream_files([str(shard) for shard in case.shards], device=str(case.device))
        return _assign(case, dict(stream.get_tensors()))


def _fastsafetensors(case: Case) -> nn.Module:
    """With `nogds`, as there is GPUDirect Storage on few machines."""
    library: Any = import_module("fastsafetensors")
    loader = library.SafeTensorsFileLoader(None, str(case.device), nogds=True)
    loader.add_filenames({0: [str(shard) for shard in case.shards]})
    buffers = loader.copy_files_to_device()
    try:
        return _assign(case, {name: buffers.get_tensor(name) for name in loader.get_keys()})
    finally:
        buffers.close()  # the tensors own their share of the memory
        loader.close()


def _convert(case: Case) -> None:
    """Write the model in tensorizer's format, once, beside its checkpoint."""
    file = case.path / "model.tensors"
    if not file.exists():
        model = build(case.recipe, "cpu")
        _safe_open(Case(case.recipe, case.path, case.shards, torch.device("cpu"), start=model))
        part = Path(f"{file}.part")
        serializer: Any = import_module("tensorizer").TensorSerializer(str(part))
        try:
            serializer.write_module(model)
        except (RuntimeError, struct.error) as error:  # 256 KiB for all names, 16 bits for the number of a module
            part.unlink()
            raise SkippedError(f"its format has no room for so many tensors: {error}") from error
        serializer.close()
        part.rename(file)
    case.files = [file]


def _tensorizer(case: Case) -> nn.Module:
    deserializer: Any = import_module("tensorizer").TensorDeserializer(str(case.files[0]), device=case.device)
    deserializer.load_into_module(case.model)
    return case.model


def _from_pretrained(case: Case) -> nn.Module:
    kind: Any = import_module("transformers").LlamaForCausalLM
    model: nn.Module = kind.from_pretrained(case.path, dtype=torch.bfloat16, device_map={"": case.device})
    return model


_cuda = ("cuda",)
ARMS = (
    Arm(
        "accelerate",
        "accelerate load_checkpoint_in_model",
        "peer",
        functools.partial(_accelerate, device_map=True),
        begins="allocated",
        package="accelerate",
        imports=("accelerate",),
    ),
    Arm(
        "accelerate-meta",
        "accelerate load_checkpoint_in_model",
        "peer",
        functools.partial(_accelerate, device_map=True),
        package="accelerate",
        imports=("accelerate",),
    ),
    Arm(
        "accelerate-default",
        "accelerate load_checkpoint_in_model, no device_map",
        "peer",
        functools.partial(_accelerate, device_map=False),
        begins="allocated",
        package="accelerate",
        imports=("accelerate", "torch.distributed.checkpoint.state_dict"),
        default=False,  # several times slower than with a device_map: 0.5 s for every 1,000 tensors
    ),
    Arm(
        "preload",
        "preload all, load_state_dict",
        "peer",
        _preload,
        begins="allocated",
        package="safetensors",
        imports=(_LIBRARY,),
    ),
    Arm(
        "load-file",
        "safetensors load_file, assign",
        "peer",
        _load_file,
        package="safetensors",
        imports=(_LIBRARY,),
    ),
    Arm(
        "safe-open",
        "safetensors safe_open, copy_",
        "peer",
        _safe_open,
        begins="allocated",
        package="safetensors",
        imports=(_LIBRARY,),
    ),
    Arm(
        "preload-meta",
        "to_empty, preload all, load_state_dict",
        "peer",
        functools.partial(_to_empty, load=_preload),
        package="safetensors",
        imports=(_LIBRARY,),
        prepare=_rehearse_to_empty,
    ),
    Arm(
        "safe-open-meta",
        "to_empty, safetensors safe_open, copy_",
        "peer",
        functools.partial(_to_empty, load=_safe_open),
        package="safetensors",
        imports=(_LIBRARY,),
        prepare=_rehearse_to_empty,
    ),
    Arm(
        "prefetch",
        "safetensors 0.9 safe_open.prefetch, assign",
        "peer",
        _prefetch,
        package="safetensors",
        imports=(_LIBRARY,),
        prepare=_needs_prefetch,
        devices=_cuda,
    ),
    Arm(
        "instanttensor",
        "InstantTensor, assign",
        "peer",
        functools.partial(_instanttensor, buffered=False),
        package="instanttensor",
        imports=("instanttensor",),
        devices=_cuda,
    ),
    Arm(
        "instanttensor-buffered",
        "InstantTensor BUFFERED, assign",
        "peer",
        functools.partial(_instanttensor, buffered=True),
        package="instanttensor",
        imports=("instanttensor",),
        devices=_cuda,
        caches=("warm",),
    ),
    Arm(
        "runai",
        "runai-model-streamer, assign",
        "peer",
        _runai,
        package="runai-model-streamer",
        imports=("runai_model_streamer",),
    ),
    Arm(
        "fastsafetensors",
        "fastsafetensors nogds, assign",
        "peer",
        _fastsafetensors,
        package="fastsafetensors",
        imports=("fastsafetensors",),
    ),
    Arm(
        "tensorizer",
        "tensorizer, converted file",
        "peer",
        _tensorizer,
        package="tensorizer",
        imports=("tensorizer",),
        prepare=_convert,
    ),
    Arm(
        "from-pretrained",
        "transformers from_pretrained",
        "peer",
        _from_pretrained,
        begins="nothing",
        package="transformers",
        imports=("transformers.models.llama.modeling_llama", "accelerate"),
        families=("llama",),
    ),
)
