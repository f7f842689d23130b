"""Every strategy, with every format, for every kind of placement: the result is what torch and safetensors make of it.

One reference for all: the files are read by the library that the format belongs to, and given to `load_state_dict` of a
second model. What a new strategy or format needs here is one more entry in `STRATEGIES` or `FORMATS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.builders import INDEX, SINGLE, assert_same, write_checkpoint, write_index
from tests.fakes.rig import DeviceKind, Rig
from tests.models import SmallNet, tensors_of

Tensors = Mapping[str, torch.Tensor]

#: Strategy -> the devices that it serves; `several`: two accelerators and the host at once.
STRATEGIES: dict[str, tuple[DeviceKind | Literal["several"], ...]] = {
    "stream": ("host", "fake", "several", "cuda"),
    "preload": ("host", "fake", "several", "cuda"),
    "direct": ("host", "fake", "several", "cuda"),
    "map": ("host",),
}


# Formats


@dataclass(frozen=True)
class Format:
    """How tensors are written into a folder, which returns the path to load; and read by the format's own library."""

    name: str
    write: Callable[[Path, Tensors], Path]
    read: Callable[[Path], dict[str, torch.Tensor]]


def _folder_with_index(folder: Path, tensors: Tensors) -> Path:
    return write_checkpoint(folder, tensors, num_shards=3)


def _index_by_path(folder: Path, tensors: Tensors) -> Path:
    return (write_checkpoint(folder, tensors, num_shards=2) / INDEX).rename(folder / "other.safetensors.index.json")


def _single_file(folder: Path, tensors: Tensors) -> Path:
    return write_checkpoint(folder, tensors) / SINGLE


def _snapshot_of_the_hub(folder: Path, tensors: Tensors) -> Path:
    folder = folder / "models--org--name"
    snapshot = write_checkpoint(folder / "snapshots" / "0123", tensors, num_shards=2)
    (folder / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.symlink_to(Path("..", "..", "blobs", file.rename(folder / "blobs" / str(number)).name))
    return snapshot


def _torch_file(folder: Path, tensors: Tensors) -> Path:
    path = folder / "model.pt"
    torch.save(dict(tensors), path)
    return path


def _torch_folder_of_old(folder: Path, tensors: Tensors) -> Path:
    torch.save(dict(tensors), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder


def _torch_folder_with_index(folder: Path, tensors: Tensors) -> Path:
    weight_map: dict[str, str] = {}
    for number in range(3):
        file = f"pytorch_model-{number + 1:05d}-of-00003.bin"
        part = dict(list(tensors.items())[number::3])
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map, "pytorch_model.bin.index.json")
    return folder


def _torch(folder: Path) -> dict[str, torch.Tensor]:
    files = [file for file in folder.iterdir() if file.suffix in {".bin", ".pt"}]
    return {name: tensor for file in files for name, tensor in torch.load(file, weights_only=True).items()}


def _safetensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.rglob("*.safetensors") for name, tensor in load_file(file).items()}


FORMATS = [
    Format("folder-with-index", _folder_with_index, _safetensors),
    Format("index-by-path", _index_by_path, _safetensors),
    Format("single-file", _single_file, _safetensors),
    Format("snapshot-of-the-hub", _snapshot_of_the_hub, _safetensors),
    Format("torch-file", _torch_file, _torch),
    Format("torch-folder-of-old", _torch_folder_of_old, _torch),
    Format("torch-folder-with-index", _torch_folder_with_index, _torch),
]


# Placements


@dataclass(frozen=True, eq=False)
class Case:
    """One kind of placement.

    Attributes:
        build: makes the model, on the CPU with values of its own, which differ from those loaded.
        tensors: makes what the checkpoint holds, given the model.
        to_meta: names of the model's tensors that are put on meta before loading, as a pattern.
        settings: of the section `device`.
        state: makes what `load_state_dict` is given out of what the checkpoint holds.
        dtype: of all floating-point tensors in the end; None: the model's.
        holds: what else must be true of the loaded model.
    """

    name: str
    build: Callable[[], nn.Module] = SmallNet
    tensors: Callable[[nn.Module], Tensors] = tensors_of
    to_meta: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    state: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict
    dtype: torch.dtype | None = None
    holds: Callable[[nn.Module], bool] = lambda model: True


NOTHING = "$^"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.embed.weight


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Parameter(torch.ones(5, 3))
        self.part = nn.Parameter(self.whole.data[1:3])


class SelfLoading(nn.Module):
    """A module with code of its own for loading, one with a hook that slices, one that is as any other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.split = nn.Linear(4, 3)
        self.rest = nn.Linear(4, 2)
        register = cast("Callable[..., object]", self.split.register_load_state_dict_pre_hook)
        register(self._slice)

    @staticmethod
    def _slice(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in ("weight", "bias"):
            state[prefix + key] = state[prefix + key][3:6]


def _whole_tensors(model: nn.Module) -> Tensors:
    return tensors_of(model) | {"split.weight": torch.rand(6, 4), "split.bias": torch.rand(6)}


def _half(model: nn.Module) -> Tensors:
    return tensors_of(model, dtype=torch.bfloat16)


def _old_names(model: nn.Module) -> Tensors:
    return {"net." + re.sub("weight$", "gamma", name): tensor for name, tensor in tensors_of(model).items()}


def _new_names(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("net.").replace("gamma", "weight"): tensor for name, tensor in stored.items()}


def _without(*names: str) -> Callable[[nn.Module], Tensors]:
    return lambda model: {name: tensor for name, tensor in tensors_of(model).items() if name not in names}


def _both_names(model: nn.Module) -> Tensors:
    weight = torch.rand(30, 8)
    return {name: weight.clone() for name in model.state_dict()}


def _consistent(model: nn.Module) -> Tensors:
    whole = torch.rand(5, 3)
    return {"whole": whole, "part": whole[1:3].clone()}


def _strided() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))
    return cast("nn.Module", cast("Any", model).to(memory_format=torch.channels_last))


def _layers(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in stored.items() if name.startswith("layers.") and name != "layers.1.bias"}


def _is_tied(model: nn.Module) -> bool:
    return model.get_parameter("head.weight") is model.get_parameter("embed.weight")


RENAME = {"rename": [{"pattern": "^net.", "to": ""}, {"pattern": "gamma$", "to": "weight"}]}
PART = {"include": [r"^layers\."], "exclude": [r"^layers\.1\.bias$"]}

CASES = [
    Case("meta"),
    Case("in-place", to_meta=NOTHING),
    Case("partly-on-meta", to_meta="^(layers.1|large|steps)"),
    Case("cast-onto-meta", tensors=_half),
    Case("cast-in-place", tensors=_half, to_meta=NOTHING),
    Case("dtype-of-the-checkpoint", tensors=_half, settings={"dtype": "checkpoint"}, dtype=torch.bfloat16),
    Case("dtype-explicit", tensors=_half, settings={"dtype": "float16"}, dtype=torch.float16),
    Case("renamed", tensors=_old_names, settings=RENAME, state=_new_names),
    Case("renamed-in-place", tensors=_old_names, settings=RENAME, state=_new_names, to_meta=NOTHING),
    Case("part", settings=PART, state=_layers),
    Case("part-in-place", settings=PART, state=_layers, to_meta=NOTHING),
    Case("missing", tensors=_without("scale", "layers.0.weight"), settings={"strict": False}),
    Case("missing-and-ignored", tensors=_without("scale"), settings={"ignore_missing": ["^scale$"]}),
    Case("tied-under-one-name", build=Tied, tensors=_without("head.weight"), holds=_is_tied),
    Case("tied-under-both", build=Tied, tensors=_both_names, holds=_is_tied),
    Case("tied-in-place", build=Tied, tensors=_without("embed.weight"), holds=_is_tied, to_meta=NOTHING),
    Case("views-of-one-memory", build=Views, tensors=_consistent, to_meta=NOTHING),
    Case("all-at-once", to_meta="^(layers.1|large|steps)", settings={"commit": "atomic"}),
    Case("all-at-once-and-cast", tensors=_half, to_meta="^(layers.1|large|steps)", settings={"commit": "atomic"}),
    Case("views-all-at-once", build=Views, tensors=_consistent, to_meta=NOTHING, settings={"commit": "atomic"}),
    Case("strided", build=_strided, to_meta=NOTHING),
    Case("modules-that-load-themselves", build=SelfLoading, tensors=_whole_tensors),
    Case("modules-that-load-themselves-in-place", build=SelfLoading, tensors=_whole_tensors, to_meta=NOTHING),
    Case(
        "modules-that-load-themselves-partly-on-meta", build=SelfLoading, tensors=_whole_tensors, to_meta="bias|mean$"
    ),
]


# The tests


class Written(NamedTuple):
    """A checkpoint; what the format's own library finds there, by the model's names; and what torch makes of a model."""

    path: Path
    state: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]


Write = Callable[[Format, Case], Written]


@pytest.fixture(name="write", scope="module")
def fixture_write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Write a checkpoint, once."""

    @cache
    def write(kind: Format, case: Case) -> Written:
        folder = tmp_path_factory.mktemp(kind.name)
        path = kind.write(folder, case.tensors(built(case)))
        state = case.state(kind.read(folder))
        model = built(case).to(case.dtype)
        model.load_state_dict(state, strict=False)
        return Written(path, state, model.state_dict())

    return write


def built(case: Case) -> nn.Module:
    """The model of a case, always with the same values."""
    torch.manual_seed(11)
    return case.build()


def built_on(device: str, case: Case) -> nn.Module:
    """The model of a case with those values, made on a device: to move it there would tear views from what they are of."""
    model = built(case)
    if device == "cpu":
        return model
    with torch.device(device):
        there = case.build()
    values = model.state_dict()
    for name, tensor in there.state_dict().items():
        tensor.copy_(values[name])
    return there


def put_on_meta(model: nn.Module, pattern: str) -> None:
    """Replace tensors whose names match by tensors on meta, and keep ties."""
    replaced: dict[torch.Tensor, torch.Tensor] = {}
    for module_name, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None and re.search(pattern, f"{module_name}.{key}".lstrip(".")):
                    if tensor not in replaced:
                        replaced[tensor] = torch.empty_like(tensor, device="meta")
                        if isinstance(tensor, nn.Parameter):
                            replaced[tensor] = nn.Parameter(replaced[tensor], requires_grad=tensor.requires_grad)
                    cast("dict[str, torch.Tensor]", tensors)[key] = replaced[tensor]


SEVERAL = ("cpu:1", "cpu:2")


def spread(model: nn.Module) -> dict[str, str]:
    """A device map that puts what is on meta onto two devices, module by module, and leaves the rest where it is."""
    devices: dict[str, str] = {}
    of_module: dict[str, str] = {}
    of_tensor: dict[torch.Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        module = name.rpartition(".")[0]
        device = of_module.setdefault(module, SEVERAL[len(of_module) % 2])
        devices[name] = of_tensor.setdefault(tensor, device if tensor.is_meta else "cpu")
    return devices


@pytest.fixture(params=FORMATS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Format:
    return cast("Format", request.param)


@pytest.fixture(
    params=[
        pytest.param((strategy, device), id=f"{strategy}-{device}", marks=pytest.mark.gpu if device == "cuda" else ())
        for strategy, devices in STRATEGIES.items()
        for device in devices
    ]
)
def machine(request: pytest.FixtureRequest) -> Generator[tuple[Rig, str], None, None]:
    """A machine, and the strategy to use there."""
    strategy, device = request.param
    rig = Rig("host", several=SEVERAL) if device == "several" else Rig(device)
    yield rig, strategy
    rig.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_model_is_what_torch_makes_of_it(
    write: Write, machine: tuple[Rig, str], kind: Format, case: Case
) -> None:
    path, state, expected = write(kind, case)
    rig, strategy = machine
    model = built_on("cuda" if rig.device == "cuda" else "cpu", case)
    put_on_meta(model, case.to_meta)
    devices = spread(model) if rig.several else {}
    settings = {**case.settings, "device_map": devices} if devices else case.settings
    async with rig.loader(strategy=strategy, **settings) as loader:
        report = await loader.load(model, path)
    assert (report.strategy, report.unexpected_keys, report.unloaded_keys) == (strategy, (), ())
    assert not devices or set(report.device.split(", ")) <= set(devices.values())
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if tensor.is_meta:
            assert name not in state
        else:
            assert_same(tensor, expected[name])
    assert case.holds(model)


@pytest.mark.parametrize("settings", [{}, RENAME, PART], ids=["all", "renamed", "part"])
async def test_stream_hands_out_what_is_stored(
    write: Write, machine: tuple[Rig, str], kind: Format, settings: dict[str, Any]
) -> None:
    path, state, _ = write(kind, next(case for case in CASES if case.settings == settings))
    rig, strategy = machine
    async with rig.loader(strategy=strategy, **settings) as loader:
        found = {name: tensor async for name, tensor in loader.stream(path)}
    assert found.keys() == state.keys()
    for name, tensor in found.items():
        assert_same(tensor, state[name])
