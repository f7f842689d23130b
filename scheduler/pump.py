"""The pump: what a load's own thread does while bytes arrive. It submits what is filled, and places what is copied."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from weightstream.device.backend import Event
from weightstream.interpreter import no_garbage_collection
from weightstream.scheduler.course import Filled
from weightstream.scheduler.pipeline import Pipeline
from weightstream.scheduler.plan import Chunk
from weightstream.scheduler.readiness import Readiness
from weightstream.scheduler.sinks import Sink
from weightstream.scheduler.timeline import Recorder

__all__ = ["Pump"]

#: So many tensors of mapped files are bound at a time: some 10 ms of work.
_AT_ONCE = 4096


class Pump:
    """See the module.

    Args:
        sink: where tensors go.
        pipeline: where they come from.
        readiness: told of those that may be used.
        recorder: told what is placed, if there is one.
        check_stop: raises if the load is to end.
    """

    def __init__(
        self,
        sink: Sink,
        pipeline: Pipeline,
        readiness: Readiness,
        recorder: Recorder | None,
        check_stop: Callable[[], None],
    ) -> None:
        self._sink = sink
        self._pipeline = pipeline
        self._readiness = readiness
        self._recorder = recorder
        self._check_stop = check_stop

    def run(self, deadline: float | None, timeout_s: float | None, check: Callable[[], None] | None) -> None:
        """Go on until everything is placed; leave nothing at work.

        Args:
            deadline: when the load must be over, by the clock; None: whenever it is.
            timeout_s: the setting that this comes from.
            check: if there is one, nothing in the model changes before everything has been read and this been called.
        """
        sink, pipeline = self._sink, self._pipeline
        plan, stage, flow = pipeline.plan, pipeline.stage, pipeline.flow
        # Places without bytes are taken below, and not once more with the chunk around them.
        parts = {**plan.parts, **dict.fromkeys(plan.empty, -1)}
        try:
            stage.open()
            flow.enter("bind")
            if check is not None:
                flow.enter("disk")
                pipeline.start()
                flow.wait_until_read(deadline, timeout_s)
                check()
                flow.enter("bind")
            self._readiness.mark(sink.take(list(plan.empty)))
            pipeline.start_prefault()
            self._bind_given()
            flow.enter("pipeline")
            if check is None:
                pipeline.start()
            while (step := flow.next(deadline, timeout_s)) is not None:
                if step.filled:
                    self._submit(step.filled)
                    continue
                with no_garbage_collection():
                    self._readiness.mark(sink.take(_completed(step.placed, parts)))
                flow.bound(step.placed)
        except BaseException as error:
            flow.stop(error)
            raise
        finally:
            pipeline.drain()

    def finish(self, deadline: float | None, timeout_s: float | None) -> None:
        """Place what could not be placed before everything was there, unless the load is to end or its time is up."""

        def check() -> None:
            self._check_stop()
            self._pipeline.flow.check_time(deadline, timeout_s)

        with self._placing():
            self._readiness.mark(self._sink.finish(check))

    def _submit(self, filled: Sequence[Filled]) -> None:
        stage, flow = self._pipeline.stage, self._pipeline.flow
        if not stage.copies:
            flow.dropped(filled)
            return
        events: list[Event | None] = []
        try:
            flow.wait_locked(filled[0])
            with stage.submitting(filled[0].chunk.transfer):
                for one in filled:
                    events.append(stage.submit(one.chunk.transfer, one.slot.view, one.shift))
                    if self._recorder is not None:
                        self._recorder.submitted(one.chunk, is_done=events[-1] is None)
        except BaseException:
            flow.not_submitted(filled[len(events) :])
            raise
        finally:
            flow.submitted(filled[: len(events)], events)

    def _bind_given(self) -> None:
        """Place what is where it belongs already, in parts, so that others get their turn and a stop is seen."""
        plan, flow = self._pipeline.plan, self._pipeline.flow
        sizes = plan.layout.places
        with (
            no_garbage_collection()
        ):  # over all of them: each time it is switched on again, it looks at all that is new
            for first in range(0, len(plan.given), _AT_ONCE):
                self._check_stop()
                part = list(plan.given[first : first + _AT_ONCE])
                with self._placing():
                    self._readiness.mark(self._sink.take(part))
                flow.given(sum(sizes[place].num_bytes for place in part))

    @contextmanager
    def _placing(self) -> Generator[None, None, None]:
        """Have it recorded, if anything is, that tensors are placed that came with no chunk."""
        if self._recorder is not None:
            self._recorder.take_up()
        yield
        if self._recorder is not None:
            self._recorder.bound()


def _completed(chunks: Sequence[Chunk], parts: dict[int, int]) -> list[int]:
    """Return the places whose last bytes came with these chunks.

    `parts` counts down for places that lie in several chunks, which only the first and the last of a chunk can; a
    place without bytes has -1 there, and is never returned.
    """
    done: list[int] = []
    for chunk in chunks:
        first, stop = chunk.transfer.first, chunk.transfer.stop
        if first == stop:  # read to be verified, and for nothing else
            continue
        for edge in {first, stop - 1}:
            if edge in parts:
                parts[edge] -= 1
        done += [place for place in range(first, stop) if not parts.get(place)] if parts else range(first, stop)
    return done
