"""Every dtype that safetensors and torch share loads bit for bit, in odd shapes too, from both kinds of file."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tests.builders import assert_same, raw_file
from tests.fakes.rig import Rig
from weightstream.device.dtypes import torch_dtype
from weightstream.errors import UnsupportedFormatError
from weightstream.prefetch.header import DTYPE_BITS

DTYPES = [
    "BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64", "C64",
    "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F4",
]  # fmt: skip
SHAPES = {"scalar": (), "one": (1,), "odd": (3, 5, 7), "empty": (0,), "hollow": (2, 0, 3), "large": (3, 50_001)}


def values(name: str) -> dict[str, torch.Tensor]:
    """Any bits at all, except where a byte must be 0 or 1; a tensor of 3 bytes first, so that nothing is aligned."""
    dtype = torch_dtype(name)
    assert dtype is not None
    generator = torch.Generator().manual_seed(1)
    found = {"a": torch.ones(3, dtype=torch.uint8)}
    for key, shape in SHAPES.items():
        if name == "F4" and key == "scalar":  # two elements to a byte
            continue
        count = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.randint(2 if name == "BOOL" else 256, (count,), dtype=torch.uint8, generator=generator)
        found[key] = raw.view(dtype).reshape(shape)
    return found


def save_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def save_torch(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, path.with_suffix(".bin"))
    return path.with_suffix(".bin")


def test_dtypes_are_all_that_both_have() -> None:
    assert set(DTYPES) == {name for name in DTYPE_BITS if torch_dtype(name) is not None}
    assert set(DTYPE_BITS) - set(DTYPES) == {"F6_E2M3", "F6_E3M2"}


def strategies(rig: Rig) -> list[str]:
    """Those that a machine has: only files of the host can be mapped, and only where they are not read directly."""
    return ["stream", "preload", "direct", *(["map"] if (rig.device, rig.io) == ("host", "buffered") else [])]


@pytest.mark.parametrize("save", [save_safetensors, save_torch], ids=["safetensors", "torch"])
@pytest.mark.parametrize("name", DTYPES)
async def test_dtype_is_loaded_bit_for_bit_with_every_strategy(
    rig: Rig, tmp_path: Path, name: str, save: Callable[[Path, dict[str, torch.Tensor]], Path]
) -> None:
    tensors = values(name)
    path = save(tmp_path / "x", tensors)
    for strategy, where in itertools.product(strategies(rig), ("meta", "cpu")):
        model = nn.Module()
        for key, tensor in tensors.items():
            model.register_buffer(key, torch.empty(tensor.shape, dtype=tensor.dtype, device=where))
        async with rig.loader(strategy=strategy) as loader:
            report = await loader.load(model, path)
        assert report.strategy == strategy
        for key, tensor in model.state_dict().items():
            assert_same(tensor, tensors[key])


@pytest.mark.parametrize("save", [save_safetensors, save_torch], ids=["safetensors", "torch"])
@pytest.mark.parametrize("name", DTYPES)
async def test_dtype_is_streamed_bit_for_bit(
    rig: Rig, tmp_path: Path, name: str, save: Callable[[Path, dict[str, torch.Tensor]], Path]
) -> None:
    tensors = values(name)
    path = save(tmp_path / "x", tensors)
    async with rig.loader() as loader:
        seen = {key: tensor async for key, tensor in loader.stream(path)}
    assert set(seen) == set(tensors)
    for key, tensor in seen.items():
        assert_same(tensor, tensors[key])


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_is_what_the_packages_themselves_read(tmp_path: Path, name: str) -> None:
    """The values of these tests, read back by safetensors and torch: what is compared with above is the truth."""
    tensors = values(name)
    with safe_open(save_safetensors(tmp_path / "x", tensors), "pt") as file:
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            assert_same(file.get_tensor(key), tensors[key])
    for key, tensor in torch.load(save_torch(tmp_path / "x", tensors), weights_only=True).items():
        assert_same(tensor, tensors[key])


@pytest.mark.parametrize("name", ["F6_E2M3", "F6_E3M2"])
async def test_dtype_that_torch_lacks_is_refused_before_anything_moves(rig: Rig, tmp_path: Path, name: str) -> None:
    header = {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "six": {"dtype": name, "shape": [4], "data_offsets": [4, 7]},
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file(header, bytes(7)))
    model = nn.Module()
    model.register_buffer("a", torch.ones(1))
    model.register_buffer("six", torch.ones(4))
    for strategy in (*strategies(rig), "auto"):
        async with rig.loader(strategy=strategy) as loader:
            with pytest.raises(UnsupportedFormatError, match="no such dtype") as caught:
                await loader.load(model, path)
            with pytest.raises(UnsupportedFormatError, match="no such dtype"):
                _ = [name async for name, _ in loader.stream(path)]
        assert (caught.value.tensor, caught.value.actual) == ("six", name)
    assert rig.disk.num_begun == 0
    assert_same(model.get_buffer("a"), torch.ones(1))
