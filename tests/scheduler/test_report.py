"""The report has the contract's keys, adds up, and is JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.builders import FORMAT_NAMES, write_in_order
from tests.contract import REPORT_KEYS
from tests.fakes.rig import KIB, Rig
from tests.models import SmallNet, tensors_of
from weightstream.api import load_sync
from weightstream.config import LoaderConfig
from weightstream.scheduler.report import LoadReport
from weightstream.scheduler.timeline import Recorder

PHASES = ["preflight", "disk", "copy", "bind", "other"]


def on_meta() -> SmallNet:
    with torch.device("meta"):
        return SmallNet()


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return tensors_of(SmallNet())


@pytest.fixture
def path(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    return write_in_order(tmp_path, tensors, num_shards=3)


async def report_of(rig: Rig, path: Path) -> LoadReport:
    async with rig.loader() as loader:
        return await loader.load(on_meta(), path)


async def test_keys_are_those_of_the_contract(rig: Rig, path: Path) -> None:
    report = await report_of(rig, path)
    assert list(report.to_dict()) == REPORT_KEYS
    assert list(report.phases) == PHASES


async def test_json_says_the_same(rig: Rig, path: Path) -> None:
    report = await report_of(rig, path)
    decoded = json.loads(report.to_json())
    assert decoded == json.loads(json.dumps(report.to_dict()))
    assert list(decoded) == REPORT_KEYS
    assert json.loads(report.to_json(indent=2)) == decoded


async def test_counts_what_was_loaded(rig: Rig, path: Path, tensors: dict[str, torch.Tensor]) -> None:
    report = await report_of(rig, path)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert (report.num_tensors, report.num_shards, report.num_bytes) == (len(tensors), 3, num_bytes)
    assert report.checkpoint == str(path / "model.safetensors.index.json")
    device = "cuda:0" if rig.device == "cuda" else "cpu"
    assert (report.strategy, report.device, report.verified) == ("stream", device, "none")
    assert report.reason
    assert report.dtype == "float32, int64, uint8"  # the one with most bytes first
    assert (report.num_retries, report.fallbacks, report.missing_keys, report.unexpected_keys) == (0, (), (), ())
    assert report.dtype.split(", ")[0] in {str(dtype).removeprefix("torch.") for dtype in FORMAT_NAMES}


async def test_memory_is_accounted_for(rig: Rig, path: Path) -> None:
    report = await report_of(rig, path)
    ring = rig.rings[0]
    largest = 270_000 * 4
    if rig.device == "host":
        assert report.host_peak_bytes >= largest
        assert (report.pinned_bytes, report.device_peak_bytes) == (0, 0)
    else:
        assert 0 < report.host_peak_bytes <= 30 * ring.slot_bytes
        assert report.pinned_bytes == report.host_peak_bytes
        assert rig.device == "cuda" or rig.accelerator.num_pins == rig.accelerator.num_unpins == 1


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory"), OSError("no")], ids=["none", "driver", "other"])
async def test_refused_pinning_is_a_fallback(path: Path, error: Exception | None) -> None:
    rig = Rig()
    rig.accelerator.refuses_pinning = True
    rig.accelerator.pin_error = error
    report = await report_of(rig, path)
    rig.close()
    assert report.pinned_bytes == 0
    assert len(report.fallbacks) == 1
    assert "page-locking host memory was refused" in report.fallbacks[0]


@pytest.mark.parametrize("strategy", ["stream", "direct"])
async def test_warm_report_names_the_page_cache_and_no_copies(rig: Rig, path: Path, strategy: str) -> None:
    recorder = Recorder()
    async with rig.loader(strategy=strategy) as loader:
        report = await (await loader.start_warm(path, recorder=recorder)).wait()
    assert (report.device, report.device_peak_bytes) == ("page-cache", 0)
    assert report.num_bytes == rig.disk.num_bytes_begun
    assert (report.num_copies, report.overlap) == (0, 0.0)
    assert report.phases["copy"] == 0.0
    assert all(span.chunk is None for span in recorder.timeline().spans if span.kind != "read")


async def test_phases_sum_to_the_wall_time_in_virtual_time(rig: Rig, path: Path) -> None:
    rig.disk._bytes_per_s = 100 * KIB
    report = await report_of(rig, path)
    assert report.wall_s == pytest.approx(report.num_bytes / (100 * KIB))
    assert sum(report.phases.values()) == pytest.approx(report.wall_s, rel=1e-9)
    assert report.throughput_bytes_per_s == pytest.approx(100 * KIB)


def test_phases_sum_to_the_wall_time_in_real_time(path: Path) -> None:
    report = load_sync(on_meta(), path, config=LoaderConfig(device={"target": "cpu"}))  # type: ignore[arg-type]  # pydantic takes mappings
    assert report.wall_s > 0
    assert sum(report.phases.values()) == pytest.approx(report.wall_s, rel=0.01)
    assert all(seconds >= 0 for seconds in report.phases.values())


async def test_keys_that_differ_are_listed_where_that_is_allowed(rig: Rig, tmp_path: Path) -> None:
    path = write_in_order(tmp_path / "c", {"weight": torch.rand(2, 2), "stranger": torch.rand(1)})
    async with rig.loader(strict=False) as loader:
        report = await loader.load(nn.Linear(2, 2, device="meta"), path)
    assert (report.missing_keys, report.unexpected_keys, report.num_tensors) == (("bias",), ("stranger",), 1)
