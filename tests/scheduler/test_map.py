"""The strategy `map`: tensors are views of the mapped files, where they can be."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weightstream as ws
from tests.builders import assert_same, entry, leaves_nothing, raw_file, write_checkpoint, write_in_order
from tests.fakes.rig import Rig
from tests.models import SmallNet, tensors_of
from weightstream.device.config import DeviceConfig
from weightstream.prefetch import mapping
from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.prefetch.source import ByteRange
from weightstream.scheduler import pipeline

MakeRig = Callable[..., Rig]

CONFIG = ws.LoaderConfig(strategy="map", device={"target": "cpu"})  # type: ignore[arg-type]  # pydantic makes it


def meta_model(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> nn.Module:
    model = nn.Module()
    for name, tensor in tensors.items():
        empty = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")
        model.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    return model


def mapped_files() -> set[str]:
    return {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line}


@pytest.fixture(name="tensors")
def fixture_tensors() -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.rand(3 + i, 7) for i in range(5)} | {"h": torch.rand(4, 3).half(), "one": torch.rand(())}


@pytest.mark.parametrize("num_shards", [1, 3])
def test_tensors_are_the_files_and_no_copies(tensors: dict[str, torch.Tensor], tmp_path: Path, num_shards: int) -> None:
    path = write_checkpoint(tmp_path / "c", tensors, num_shards=num_shards)
    model = meta_model(tensors)
    told: list[ws.Progress] = []
    with leaves_nothing():
        report = ws.load_sync(model, path, config=CONFIG, on_progress=told.append)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])
    assert report.strategy == "map"
    assert (report.read_bytes, report.mapped_bytes) == (0, report.num_bytes)
    last = told[-1]
    assert (last.bytes_read, last.mapped_bytes) == (0, report.num_bytes)
    assert last.bytes_placed == last.total_bytes == report.num_bytes
    assert report.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert (report.num_copies, report.host_peak_bytes, report.device_peak_bytes) == (0, 0, 0)
    assert report.decisions == (f"map: {len(tensors)} of {len(tensors)} tensors are views of the files",)
    assert sum(str(path) in file for file in mapped_files()) == num_shards
    assert sum(report.phases.values()) == pytest.approx(report.wall_s)


def test_mapping_goes_with_the_last_tensor(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c", tensors)
    model = meta_model(tensors)
    ws.load_sync(model, path, config=CONFIG)
    assert any(str(path) in file for file in mapped_files())
    del model
    gc.collect()
    assert not any(str(path) in file for file in mapped_files())


def test_writing_to_a_tensor_leaves_the_file_as_it_is(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c", tensors)
    before = (path / "model.safetensors").read_bytes()
    model = meta_model(tensors)
    ws.load_sync(model, path, config=CONFIG)
    for name, tensor in model.state_dict().items():
        version = tensor._version
        tensor.add_(1)
        assert tensor._version == version + 1
        assert_same(tensor, tensors[name] + 1)
    assert (path / "model.safetensors").read_bytes() == before


def test_tensor_that_is_not_aligned_to_its_element_is_copied(tmp_path: Path) -> None:
    tensors = {"odd": torch.randint(9, (3,), dtype=torch.uint8), "b": torch.rand(5, 5), "c": torch.rand(2).double()}
    path = tmp_path / "model.safetensors"
    header: dict[str, object] = {
        "odd": entry("U8", [3], 0, 3),
        "b": entry("F32", [5, 5], 3, 103),
        "c": entry("F64", [2], 103, 119),
    }
    raw = raw_file(header)
    raw = raw_file(str.encode(raw[8:].decode() + " " * (-len(raw) % 8)))  # what comes first is aligned
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    path.write_bytes(raw + data)
    model = meta_model(tensors)
    report = ws.load_sync(model, path, config=CONFIG)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])
        assert tensor.data_ptr() % tensor.element_size() == 0
    assert report.decisions[-1] == "map: 1 of 3 tensors are views of the files; the others were read"
    assert 0 < report.mapped_bytes == report.num_bytes - report.read_bytes < report.num_bytes


def test_what_is_cast_or_has_storage_is_read(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c", tensors)
    model = meta_model(tensors, torch.float64)
    own = torch.zeros(3, 7)
    model.t0 = nn.Parameter(own, requires_grad=False)
    report = ws.load_sync(model, path, config=CONFIG)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name] if name == "t0" else tensors[name].double())
    assert model.t0.data_ptr() == own.data_ptr()
    assert report.decisions[-1].startswith("map: 0 of 7")
    assert (report.read_bytes, report.mapped_bytes) == (report.num_bytes, 0)
    assert report.cast_bytes == report.num_bytes - own.nbytes
    assert not any(str(path) in file for file in mapped_files())


async def test_modules_that_load_themselves_and_ties_work_as_ever(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig("host")
    tensors = tensors_of(SmallNet())
    path = write_in_order(tmp_path / "c", tensors, num_shards=2)
    with torch.device("meta"):
        model = SmallNet()
    async with rig.loader(strategy="map") as loader:
        await loader.load(model, path)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])


async def test_stream_hands_out_views(make_rig: MakeRig, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    rig = make_rig("host")
    path = write_checkpoint(tmp_path / "c", tensors, num_shards=2)
    async with rig.loader(strategy="map") as loader:
        found = {name: tensor async for name, tensor in loader.stream(path)}
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert_same(tensor, tensors[name])


async def test_accelerator_is_refused_before_anything_changes(
    make_rig: MakeRig, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    rig = make_rig("fake")
    path = write_checkpoint(tmp_path / "c", tensors)
    model = meta_model(tensors)
    async with rig.loader(strategy="map") as loader:
        with pytest.raises(ws.PlacementError, match="can only be on the CPU"):
            await loader.load(model, path)
    assert all(parameter.is_meta for parameter in model.parameters())


async def test_load_that_fails_lets_the_files_go(
    make_rig: MakeRig, tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig("host")
    path = write_checkpoint(tmp_path / "c", tensors)
    file = path / "model.safetensors"
    model = meta_model(tensors)
    check = Checkpoint.check_unchanged

    def touched(self: Checkpoint) -> None:
        os.utime(file, (1, 1))
        check(self)

    monkeypatch.setattr(Checkpoint, "check_unchanged", touched)
    async with rig.loader(strategy="map") as loader:
        with pytest.raises(ws.IntegrityError):
            await loader.load(model, path)
        gc.collect()
        assert not any(str(path) in one for one in mapped_files())
    assert all(parameter.is_meta for parameter in model.parameters())


def test_files_are_brought_in_in_the_order_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not in that of the file, which has them the other way round; in pieces of a chunk."""
    tensors = {f"t{number}": torch.full((1024, 1024), float(number)) for number in range(4)}
    path = write_checkpoint(tmp_path / "c", tensors)
    brought_in: list[float] = []

    class AtOnce(mapping.Prefault):
        """Brings everything in when it is made."""

        def __init__(self, mappings: Sequence[memoryview], ranges: Sequence[ByteRange]) -> None:
            super().__init__(mappings, ranges)
            while (work := self.take()) is not None:
                work()

    def note(memory: memoryview) -> None:
        brought_in.extend(torch.frombuffer(memory, dtype=torch.float32)[:: 1024 * 1024].tolist())

    chunk: Any = {"chunk": "4MiB"}
    settings = ws.LoaderConfig(strategy="map", prefetch=chunk, device=DeviceConfig(target="cpu"))
    monkeypatch.setattr(mapping, "populate", note)
    monkeypatch.setattr(pipeline, "Prefault", AtOnce)
    ws.load_sync(meta_model(dict(reversed(tensors.items()))), path, config=settings)
    assert brought_in == [3.0, 2.0, 1.0, 0.0]
