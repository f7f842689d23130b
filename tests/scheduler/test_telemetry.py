"""What a host's OpenTelemetry hears of loads; and that programs without it do not even import it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import weightstream as ws
from tests.builders import write_in_order
from tests.fakes.rig import Rig
from tests.models import SmallNet, tensors_of
from weightstream.device.config import DeviceConfig
from weightstream.errors import PlacementError, ReadError
from weightstream.scheduler import telemetry


class Host:
    """A program that collects everything in memory."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])

    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def points(self) -> dict[str, Any]:
        data = self.reader.get_metrics_data()
        assert data is not None
        found = [
            metric for resource in data.resource_metrics for scope in resource.scope_metrics for metric in scope.metrics
        ]
        return {metric.name: (metric.unit, metric.data.data_points) for metric in found}


@pytest.fixture(name="host")
def fixture_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    host = Host()
    monkeypatch.setattr(trace, "get_tracer", host.tracers.get_tracer)
    monkeypatch.setattr(metrics, "get_meter", host.meters.get_meter)
    telemetry._instruments.cache_clear()
    yield host
    telemetry._instruments.cache_clear()
    host.meters.shutdown()
    host.tracers.shutdown()


@pytest.fixture(name="path")
def fixture_path(tmp_path: Path) -> Path:
    return write_in_order(tmp_path, tensors_of(SmallNet()))


def on_meta() -> SmallNet:
    with torch.device("meta"):
        return SmallNet()


async def test_load_is_a_span_below_the_callers_with_stages_below_it(rig: Rig, path: Path, host: Host) -> None:
    async with rig.loader() as loader:
        with host.tracers.get_tracer("host").start_as_current_span("start-up"):
            report = await loader.load(on_meta(), path)
    spans = host.spans()
    load = spans["weightstream.load"]
    assert load.parent is not None
    assert load.parent.span_id == spans["start-up"].get_span_context().span_id  # type: ignore[union-attr]  # it has one
    assert load.context is not None
    children = [
        span for span in spans.values() if span.parent is not None and span.parent.span_id == load.context.span_id
    ]
    assert {span.name for span in children} >= {"weightstream.preflight", "weightstream.pipeline", "weightstream.bind"}
    attributes = dict(load.attributes or {})
    assert attributes["weightstream.read.size"] == report.num_bytes
    assert attributes["weightstream.device"] == report.device
    assert attributes["weightstream.phase.disk"] == report.phases["disk"]
    assert load.status.is_ok


async def test_loads_bytes_and_durations_are_counted(rig: Rig, path: Path, host: Host) -> None:
    async with rig.loader() as loader:
        reports = [await loader.load(on_meta(), path) for _ in range(2)]
    points = host.points()
    units = {name: unit for name, (unit, _) in points.items()}
    assert units == {
        "weightstream.loads": "{load}",
        "weightstream.read.io": "By",
        "weightstream.read.retries": "{read}",
        "weightstream.load.duration": "s",
    }
    assert points["weightstream.loads"][1][0].value == 2
    assert points["weightstream.read.io"][1][0].value == sum(report.num_bytes for report in reports)
    duration = points["weightstream.load.duration"][1][0]
    assert (duration.count, duration.explicit_bounds[0]) == (2, 0.1)


async def test_what_is_mapped_is_not_counted_as_read(make_rig: Callable[..., Rig], path: Path, host: Host) -> None:
    async with make_rig("host").loader(strategy="map") as loader:
        report = await loader.load(on_meta(), path)
    assert report.mapped_bytes > 0
    attributes = dict(host.spans()["weightstream.load"].attributes or {})
    assert attributes["weightstream.mapped.size"] == report.mapped_bytes
    assert attributes["weightstream.read.size"] == report.num_bytes - report.mapped_bytes
    assert host.points()["weightstream.read.io"][1][0].value == report.read_bytes


async def test_failed_load_is_an_error_and_counted_by_its_type(rig: Rig, path: Path, host: Host) -> None:
    gate = rig.disk.stop_at(3, is_stuck=True)
    rig.disk.fail_at(4, ReadError("broken"))
    async with rig.loader(workers=2) as loader:
        with pytest.raises(ReadError) as caught:
            await loader.load(on_meta(), path)
        gate.open()
    load = host.spans()["weightstream.load"]
    assert not load.status.is_ok
    attributes = dict(load.attributes or {})
    assert attributes["error.type"] == "ReadError"
    assert attributes["weightstream.fallbacks"] == caught.value.fallbacks != ()
    points = host.points()
    assert dict(points["weightstream.load.failures"][1][0].attributes) == {"error.type": "ReadError"}
    assert points["weightstream.read.io"][1][0].value > 0


async def test_load_that_fails_in_its_preflight_took_the_time_that_it_took(path: Path, host: Host) -> None:
    model = torch.nn.Linear(1, 1, device="meta")
    with pytest.raises(PlacementError):
        await ws.load(model, path, config=ws.LoaderConfig(device=DeviceConfig(target="cpu")))
    for name in ("weightstream.load", "weightstream.preflight"):
        span = host.spans()[name]
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.end_time > span.start_time
    assert host.points()["weightstream.load.duration"][1][0].sum > 0


async def test_broken_telemetry_does_not_break_the_load(
    rig: Rig, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> None:
        raise ArithmeticError(name)

    monkeypatch.setattr(trace, "get_tracer", fail)
    async with rig.loader() as loader:
        await loader.load(on_meta(), path)
    assert "could not be told" in caplog.text


def test_programs_without_it_do_not_import_it(path: Path) -> None:
    assert "opentelemetry.trace" in sys.modules  # here
    program = f"""
import sys, torch, weightstream as ws
from tests.models import SmallNet
with torch.device("meta"):
    model = SmallNet()
ws.load_sync(model, {str(path)!r}, config=ws.LoaderConfig(device={{"target": "cpu"}}))
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
