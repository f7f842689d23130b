"""OpenTelemetry: one span for each load, with its stages as children, and counts of what was read.

Only the API is used, and only where the host program has imported it, which whoever configures telemetry has: nobody
else pays for so much as the import, and nothing is exported unless the host says where to. Everything is told once,
on the load's thread, when the load has ended.
"""

from __future__ import annotations

import contextvars
import functools
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from opentelemetry.metrics import Counter, Histogram

    from weightstream.scheduler.report import LoadReport

from weightstream.ranks import ranked_logger

__all__ = ["Ended", "Telemetry"]

logger = ranked_logger(__name__)

_NAME = "weightstream"
#: Seconds: loads take from tenths of one to many minutes, and OpenTelemetry's own buckets are for milliseconds.
_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0)


class Ended(NamedTuple):
    """How a load ended.

    Attributes:
        report: None if it failed.
        error: None if it did not.
        wall_s: seconds that it took.
        sections: its stages: name, begin and end, in seconds since it began.
        bytes_read: also of a load that failed.
        num_retries: reads that were repeated.
        fallbacks: every downgrade.
    """

    report: LoadReport | None
    error: BaseException | None
    wall_s: float
    sections: Sequence[tuple[str, float, float]]
    bytes_read: int
    num_retries: int
    fallbacks: tuple[str, ...]


class Telemetry:
    """Tells OpenTelemetry of one load. Made on the thread that asks for the load: what is current there is the parent.

    Args:
        checkpoint: as it was asked for.
    """

    def __init__(self, checkpoint: str) -> None:
        self._checkpoint = checkpoint
        self._context = contextvars.copy_context()
        self._begin_ns = time.time_ns()

    def end(self, ended: Ended) -> None:
        """Tell how the load ended. Whatever the host's telemetry raises is logged: a load does not fail for it."""
        try:
            if "opentelemetry.trace" in sys.modules:
                self._context.run(self._trace, ended)
            if "opentelemetry.metrics" in sys.modules:
                _count(ended)
        except Exception:
            logger.exception("OpenTelemetry could not be told of a load")

    def _trace(self, ended: Ended) -> None:
        from opentelemetry import trace  # noqa: PLC0415 - it is there already; see the module

        tracer = trace.get_tracer(_NAME)
        span = tracer.start_span(
            "weightstream.load", start_time=self._begin_ns, attributes={"weightstream.checkpoint": self._checkpoint}
        )
        with trace.use_span(span, end_on_exit=False):
            for name, begin_s, end_s in ended.sections:
                tracer.start_span(f"weightstream.{name}", start_time=self._at(begin_s)).end(self._at(end_s))
        span.set_attributes(
            {
                "weightstream.read.size": ended.bytes_read,
                "weightstream.retries": ended.num_retries,
                "weightstream.fallbacks": ended.fallbacks,
            }
        )
        if ended.report is not None:
            report = ended.report
            span.set_attributes(
                {
                    "weightstream.device": report.device,
                    "weightstream.strategy": report.strategy,
                    "weightstream.tensors": report.num_tensors,
                    "weightstream.shards": report.num_shards,
                    "weightstream.mapped.size": report.mapped_bytes,
                    "weightstream.overlap": report.overlap,
                    **{f"weightstream.phase.{name}": seconds for name, seconds in report.phases.items()},
                }
            )
        if ended.error is not None:
            span.set_attribute("error.type", type(ended.error).__qualname__)
            span.set_status(trace.StatusCode.ERROR, str(ended.error))
        span.end(self._at(ended.wall_s))

    def _at(self, seconds: float) -> int:
        return self._begin_ns + round(seconds * 1e9)


class _Instruments(NamedTuple):
    loads: Counter
    failures: Counter
    read: Counter
    retries: Counter
    duration: Histogram


@functools.cache
def _instruments() -> _Instruments:
    """Make the instruments, once. Those that are made before the host configures a provider follow it later."""
    from opentelemetry import metrics  # noqa: PLC0415 - likewise

    meter = metrics.get_meter(_NAME)
    return _Instruments(
        meter.create_counter("weightstream.loads", "{load}", "Loads that have ended, in whatever way."),
        meter.create_counter("weightstream.load.failures", "{load}", "Loads that failed or were cancelled."),
        meter.create_counter("weightstream.read.io", "By", "Bytes of checkpoints that were read."),
        meter.create_counter("weightstream.read.retries", "{read}", "Reads that were repeated after an error."),
        meter.create_histogram(
            "weightstream.load.duration",
            "s",
            "How long loads took.",
            explicit_bucket_boundaries_advisory=_BUCKETS_S,
        ),
    )


def _count(ended: Ended) -> None:
    found = _instruments()
    device = {} if ended.report is None else {"weightstream.device": ended.report.device}
    failed = {} if ended.error is None else {"error.type": type(ended.error).__qualname__}
    found.loads.add(1, {**device, **failed})
    if failed:
        found.failures.add(1, failed)
    found.read.add(ended.bytes_read, device)
    found.retries.add(ended.num_retries, device)
    found.duration.record(ended.wall_s, {**device, **failed})
