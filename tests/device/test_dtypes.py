"""Casts among the four floats happen on the device and equal torch's; nothing else is cast."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightstream as ws
from tests.builders import FORMAT_NAMES, assert_same, entry, raw_file, write_in_order
from tests.fakes.accelerator import FakeAccelerator
from tests.fakes.rig import Rig
from weightstream.device.backend import Spread
from weightstream.device.dtypes import CASTABLE, torch_dtype, torch_shape
from weightstream.errors import DtypeMismatchError, UnsupportedFormatError
from weightstream.prefetch.header import DTYPE_BITS

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Holder(nn.Module):
    """Tensors of one dtype: a few small ones, and one with storage of its own."""

    SHAPES = ((3, 5), (1,), (600_000,), (7,))

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        for i, shape in enumerate(self.SHAPES):
            self.register_buffer(f"t{i}", torch.zeros(shape, dtype=dtype, device=device))


def values(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Also what another dtype cannot hold: too large, too small, not a number."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {"odd": torch.ones(3, dtype=torch.uint8)}  # what follows is aligned to nothing
    for i, shape in enumerate(Holder.SHAPES):
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64) * 1000
        tensor.view(-1)[0] = float("inf")
        if tensor.numel() > 3:
            tensor.view(-1)[1:4] = torch.tensor([float("nan"), 1e-7, 70000.0])
        found[f"t{i}"] = tensor.to(dtype)
    return found


@pytest.mark.parametrize("where", ["meta", "cpu"], ids=["adopt", "in-place"])
@pytest.mark.parametrize(
    ("stored", "declared"),
    list(itertools.permutations(FLOATS, 2)),
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
async def test_floats_are_cast_as_torch_casts_them(
    rig: Rig, tmp_path: Path, stored: torch.dtype, declared: torch.dtype, where: str
) -> None:
    tensors = values(stored)
    model = Holder(declared, where)
    async with rig.loader(strict=False, num_slots=4) as loader:
        await loader.load(model, write_in_order(tmp_path, tensors))
    for name, tensor in model.state_dict().items():
        # Which NaN a NaN becomes is each device's own, and on some CPUs each loop's of torch (AVX512-FP16).
        torch.testing.assert_close(tensor.cpu(), tensors[name].to(declared), rtol=0, atol=0, equal_nan=True)


class Watched(FakeAccelerator):
    """Adds up what crosses the bus, and notes what it becomes there."""

    num_bytes = 0

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self.num_bytes += source.numel()
        super().copy(destination, source)

    def spread(self, source: torch.Tensor, parts: Sequence[Spread]) -> None:
        self.num_bytes += sum(part.num_bytes for part in parts)
        super().spread(source, parts)


@pytest.mark.parametrize("where", ["meta", "cpu"], ids=["adopt", "in-place"])
@pytest.mark.parametrize("io", ["buffered", "direct"])
async def test_cast_happens_on_the_device_after_the_copy(
    make_rig: Callable[..., Rig], tmp_path: Path, where: str, io: str
) -> None:
    """Half as many bytes are copied as the model has then; what they become is decided there."""
    rig = make_rig("fake", io=io, accelerator=Watched)
    tensors = values(torch.bfloat16)
    model = Holder(torch.float32, where)
    async with rig.loader(strict=False, num_slots=4) as loader:
        report = await loader.load(model, write_in_order(tmp_path, tensors))
    stored = sum(tensor.nbytes for name, tensor in tensors.items() if name != "odd")
    assert isinstance(rig.accelerator, Watched)
    assert rig.accelerator.num_bytes == report.num_bytes == stored
    assert sum(tensor.nbytes for tensor in model.buffers()) == 2 * stored


@pytest.mark.parametrize("dtype", list(FORMAT_NAMES), ids=lambda dtype: str(dtype).removeprefix("torch."))
async def test_every_dtype_arrives_as_it_is_stored(rig: Rig, tmp_path: Path, dtype: torch.dtype) -> None:
    stored = torch.randint(0, 2, (50 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    path = write_in_order(tmp_path, {"odd": torch.ones(3, dtype=torch.uint8), "t": stored})
    for where in ("meta", "cpu"):
        model = nn.Module()
        model.register_buffer("odd", torch.zeros(3, dtype=torch.uint8, device=where))
        model.register_buffer("t", torch.zeros(50, dtype=dtype, device=where))
        async with rig.loader() as loader:
            await loader.load(model, path)
        assert_same(model.t, stored)  # type: ignore[arg-type]  # a buffer


@pytest.mark.parametrize(
    ("stored", "declared"),
    [
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.int32, torch.int64),
        (torch.int64, torch.float32),
        (torch.float32, torch.int8),
        (torch.bool, torch.uint8),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["meta", "cpu"], ids=["adopt", "in-place"])
async def test_other_differences_are_refused(
    rig: Rig, tmp_path: Path, stored: torch.dtype, declared: torch.dtype, where: str
) -> None:
    model = nn.Module()
    model.register_buffer("t", torch.zeros(4, dtype=declared, device=where))
    path = write_in_order(tmp_path, {"t": torch.zeros(4).to(stored)})
    async with rig.loader() as loader:
        with pytest.raises(DtypeMismatchError) as caught:
            await loader.load(model, path)
    assert (caught.value.tensor, caught.value.expected) == ("t", f"{declared} (model)")
    assert caught.value.actual == f"{stored} (checkpoint)"


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("model", [torch.float32, torch.int64]),
        ("checkpoint", [torch.bfloat16, torch.int64]),
        ("float16", [torch.float16, torch.int64]),
    ],
    ids=["model", "checkpoint", "float16"],
)
async def test_dtype_option_decides_for_floats_on_meta(
    rig: Rig, tmp_path: Path, option: Any, expected: list[torch.dtype]
) -> None:
    stored = {"f": torch.randn(9).bfloat16(), "i": torch.arange(9)}
    path = write_in_order(tmp_path, stored)
    model = nn.Module()
    model.register_buffer("f", torch.zeros(9, device="meta"))
    model.register_buffer("i", torch.zeros(9, dtype=torch.int64, device="meta"))
    async with rig.loader(dtype=option) as loader:
        await loader.load(model, path)
    for (name, tensor), dtype in zip(model.state_dict().items(), expected, strict=True):
        assert_same(tensor, stored[name].to(dtype))


@pytest.mark.parametrize(
    ("option", "stored", "declared"),
    [
        ("float16", torch.int64, torch.float32),
        ("bfloat16", torch.float8_e4m3fn, torch.bfloat16),
        ("float64", torch.float32, torch.int8),
    ],
    ids=["integer-as-float", "float8-as-float", "float-as-integer"],
)
async def test_dtype_option_allows_no_other_cast(
    rig: Rig, tmp_path: Path, option: Any, stored: torch.dtype, declared: torch.dtype
) -> None:
    model = nn.Module()
    model.register_buffer("t", torch.zeros(4, dtype=declared, device="meta"))
    path = write_in_order(tmp_path, {"t": torch.zeros(4).to(stored)})
    async with rig.loader(dtype=option) as loader:
        with pytest.raises(DtypeMismatchError):
            await loader.load(model, path)
    assert rig.disk.num_begun == 0


async def test_dtype_option_holds_in_modules_that_load_themselves(rig: Rig, tmp_path: Path) -> None:
    model = nn.BatchNorm1d(4, device="meta")
    tensors = {
        "weight": torch.rand(4),
        "bias": torch.rand(4),
        "running_mean": torch.rand(4),
        "running_var": torch.rand(4),
    }
    path = write_in_order(tmp_path, {**tensors, "num_batches_tracked": torch.tensor(3)})
    async with rig.loader(dtype="bfloat16") as loader:
        await loader.load(model, path)
    for name, tensor in tensors.items():
        assert_same(model.state_dict()[name], tensor.bfloat16())


async def test_dtype_option_leaves_tensors_with_storage_alone(rig: Rig, tmp_path: Path) -> None:
    stored = {"weight": torch.randn(2, 3).bfloat16()}
    model = nn.Linear(3, 2, bias=False)
    async with rig.loader(dtype="float16") as loader:
        await loader.load(model, write_in_order(tmp_path, stored))
    assert_same(model.weight, stored["weight"].float())


async def test_dtype_option_checkpoint_allows_what_no_cast_does(rig: Rig, tmp_path: Path) -> None:
    stored = {"weight": torch.randn(2, 3).to(torch.float8_e4m3fn)}
    model = nn.Linear(3, 2, bias=False, device="meta")
    async with rig.loader(dtype="checkpoint") as loader:
        await loader.load(model, write_in_order(tmp_path, stored))
    assert_same(model.weight, stored["weight"])


def test_names_of_the_format_are_torch_dtypes_of_the_same_size() -> None:
    for name, bits in DTYPE_BITS.items():
        dtype = torch_dtype(name)
        if dtype is not None:
            assert dtype.itemsize * 8 == (8 if name == "F4" else bits), name
    for dtype, name in FORMAT_NAMES.items():
        assert torch_dtype(name) is dtype
    assert frozenset(FLOATS) == CASTABLE


def test_four_bit_floats_are_packed_along_the_last_dimension() -> None:
    assert torch_shape("F4", (3, 8)) == (3, 4)
    assert torch_shape("F4", ()) == ()
    assert torch_shape("BF16", (3, 8)) == (3, 8)


def test_four_bit_floats_that_share_a_byte_with_another_row_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file({"odd": entry("F4", [2, 3], 0, 3)}, b"abc"))
    with pytest.raises(UnsupportedFormatError, match="odd") as caught:
        list(ws.iter_tensors(path, ws.LoaderConfig(device={"target": "cpu"})))  # type: ignore[arg-type]
    assert (caught.value.tensor, caught.value.file) == ("odd", str(path))


async def test_dtype_that_torch_lacks_is_named(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_in_order(tmp_path, {"t": torch.zeros(4, dtype=torch.complex64)})
    monkeypatch.setattr("weightstream.device.matching.torch_dtype", lambda name: None)
    model = nn.Module()
    model.register_buffer("t", torch.zeros(4, dtype=torch.complex64, device="meta"))
    async with rig.loader() as loader:
        with pytest.raises(UnsupportedFormatError, match="no such dtype") as caught:
            await loader.load(model, path)
    assert (caught.value.tensor, caught.value.actual) == ("t", "C64")


@pytest.mark.parametrize("strategy", ["stream", "preload", "direct", "map"])
def test_parameter_that_requires_gradients_takes_no_integers_and_nothing_is_written(
    tmp_path: Path, strategy: str
) -> None:
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(2))
    model.b = nn.Parameter(torch.empty(3, device="meta"))
    save_file({"a": torch.ones(2), "b": torch.arange(3)}, tmp_path / "m.safetensors")
    config = ws.LoaderConfig.model_validate(
        {"strategy": strategy, "device": {"target": "cpu", "dtype": "checkpoint"}, "prefetch": {"host_memory": "64MiB"}}
    )
    with pytest.raises(ws.DtypeMismatchError, match=r"b in .*no gradients.*found torch\.int64"):
        ws.load_sync(model, tmp_path / "m.safetensors", config=config)
    assert model.a.tolist() == [0, 0]
    model.b.requires_grad_(False)
    ws.load_sync(model, tmp_path / "m.safetensors", config=config)
    assert (model.a.tolist(), model.b.tolist()) == ([1, 1], [0, 1, 2])
