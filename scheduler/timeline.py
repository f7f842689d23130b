"""The timeline of one load: what happened to each chunk, when and on which thread, as data. Draws nothing.

A `Recorder` that is given to a load notes a few moments of each chunk, as tuples in lists, and nothing for single
tensors; what follows from them, such as who waited, is worked out when somebody asks for the `Timeline`. A load
without one pays for a comparison with None where a moment would have been noted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from weightstream.scheduler.plan import Chunk

__all__ = ["WAITING", "Kind", "Phase", "Recorder", "Span", "Timeline", "rates"]

#: What a span is: the load is checked before anything is read; bytes are fetched; they are hashed; a chunk waits for its
#: turn; its copies are submitted; they run; its tensors are placed.
Kind = Literal["preflight", "read", "verify", "wait", "submit", "copy", "bind"]

#: The lane of chunks that wait. Several do so at once: their spans overlap, those of other lanes do not.
WAITING = "waiting"
_LOAD = "load"


class Span(NamedTuple):
    """Something that lasted. Seconds count from the load's start.

    Attributes:
        kind: what it was.
        lane: the thread or stream that did it: "reader 3", "copies to cuda:0", "load"; or `WAITING`.
        chunk: the number of the chunk in the plan, of the first if there are several; None: it belongs to none.
        num_chunks: how many there are: tensors are placed for several at a time.
        num_bytes: of all of them; for a read, of the part that was read.
        file: the name of the chunk's shard; "" without a chunk.
    """

    kind: Kind
    lane: str
    chunk: int | None
    num_chunks: int
    begin_s: float
    end_s: float
    num_bytes: int
    file: str


class Phase(NamedTuple):
    """A time in which the load waited for one thing; see `LoadReport.phases`."""

    name: str
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """What happened in a load.

    Attributes:
        checkpoint: the index or file that was loaded.
        device: where to.
        wall_s: how long it took, or how long it has been running.
        num_bytes: how much was read.
        phases: from 0 to `wall_s`, without gaps.
        spans: sorted by their beginning. Copies to an accelerator begin when they have been submitted and the ones
            before them have ended, and end when the host sees that they have.
    """

    checkpoint: str
    device: str
    wall_s: float
    num_bytes: int
    phases: tuple[Phase, ...]
    spans: tuple[Span, ...]


class Recorder:
    """Notes what happens in one load; give it to `load`, `Loader.start` and their like, and ask for `timeline()`.

    The methods before `timeline` belong to the load. They are called on its threads, at most a few times for each
    chunk, and only append to lists, which needs no lock.
    """

    def __init__(self) -> None:
        self._now: Callable[[], float] | None = None
        self._begin_s = 0.0
        self._about = ("", "")
        self._files: Sequence[str] = ()
        self._since_s = 0.0
        self._phases: list[tuple[str, float]] = []
        self._waits_for = ""
        self._until_s = 0.0
        self._reads: list[tuple[Chunk, str, float, float, float, int]] = []
        self._hashed: list[tuple[Chunk, str, float, float]] = []
        self._submits: list[tuple[Chunk, float, float, bool]] = []
        self._copied: list[tuple[int, float]] = []
        self._binds: list[tuple[Sequence[Chunk], float, float]] = []

    def start(self, now: Callable[[], float], begin_s: float) -> None:
        """Begin to record a load, on its clock.

        Raises:
            ValueError: this object has recorded one already.
        """
        if self._now is not None:
            raise ValueError("this Recorder was given to a load before: make a new one for each load")
        self._now, self._begin_s = now, begin_s

    def describe(self, checkpoint: str, device: str, files: Sequence[str]) -> None:
        """Say what is loaded, and the names of its shards."""
        self._about, self._files = (checkpoint, device), files

    def phase(self, name: str, begin_s: float, end_s: float) -> None:
        """Note what was waited for, under the lock of the load's flow. Each begins where the one before it ended."""
        if name != self._waits_for:  # called several times for each chunk, and mostly for the same
            self._waits_for = name
            self._phases.append((name, begin_s))
        self._until_s = end_s

    def read(self, chunk: Chunk, begin_s: float, copy_s: float, end_s: float, num_bytes: int) -> None:
        """Note a read of a part of a chunk, on the reader's thread, which copied the bytes to their place from `copy_s` on."""
        self._reads.append((chunk, threading.current_thread().name, begin_s, copy_s, end_s, num_bytes))

    def hashed(self, chunk: Chunk, begin_s: float) -> None:
        """Note that a chunk has been hashed, on the thread that did it."""
        assert self._now is not None
        self._hashed.append((chunk, threading.current_thread().name, begin_s, self._now()))

    def take_up(self) -> None:
        """Note that the load's thread begins to do something."""
        assert self._now is not None
        self._since_s = self._now()

    def submitted(self, chunk: Chunk, *, is_done: bool) -> None:
        """Note that the load's thread has submitted a chunk's copies, or, if they are done, made them.

        Before the copies' thread can say that they have ended.
        """
        assert self._now is not None
        since_s, self._since_s = self._since_s, self._now()  # the next one begins now
        self._submits.append((chunk, since_s, self._since_s, is_done))

    def copied(self, chunk: Chunk) -> None:
        """Note that copies that were submitted are seen to have ended."""
        assert self._now is not None
        self._copied.append((chunk.index, self._now()))

    def bound(self, chunks: Sequence[Chunk] = ()) -> None:
        """Note that the load's thread has placed tensors, of these chunks or of none."""
        assert self._now is not None
        self._binds.append((chunks, self._since_s, self._now()))

    def timeline(self) -> Timeline:
        """Return what was recorded: of a load that has ended, in whatever way, or until now."""
        # What comes last in a load is looked at first: whatever is in one list then has what it needs in the next.
        binds, copied, submits = list(self._binds), list(self._copied), list(self._submits)
        hashed, reads = list(self._hashed), list(self._reads)
        begun, end_s = list(self._phases), self._until_s if self._phases else self._begin_s
        spans = [span for entry in reads for span in self._read_spans(*entry)]
        idle: dict[int, float] = {}  # since when a chunk has had nothing to do but wait
        for chunk, _, _, _, read_s, _ in reads:
            idle[chunk.index] = max(idle.get(chunk.index, 0.0), read_s)
        for chunk, thread, since_s, until_s in hashed:
            spans.append(self._span("wait", WAITING, [chunk], idle[chunk.index], since_s))
            spans.append(self._span("verify", _lane(thread), [chunk], since_s, until_s))
            idle[chunk.index] = until_s
        spans += self._copy_spans(submits, dict(copied), idle)
        for chunks, since_s, until_s in binds:
            spans += [self._span("wait", WAITING, [one], idle[one.index], since_s) for one in chunks]
            spans.append(self._span("bind", _LOAD, chunks, since_s, until_s))
        ends = [*(begin_s for _, begin_s in begun[1:]), end_s]
        phases = tuple(
            Phase(name, begin_s - self._begin_s, until_s - self._begin_s)
            for (name, begin_s), until_s in zip(begun, ends, strict=False)
        )
        spans += [Span("preflight", _LOAD, None, 0, *phase[1:], 0, "") for phase in phases if phase.name == "preflight"]
        return Timeline(
            *self._about,
            wall_s=end_s - self._begin_s,
            num_bytes=sum(entry[-1] for entry in reads),
            phases=phases,
            spans=tuple(sorted((span for span in spans if span.end_s > span.begin_s), key=lambda span: span.begin_s)),
        )

    def _read_spans(
        self, chunk: Chunk, thread: str, begin_s: float, copy_s: float, end_s: float, num_bytes: int
    ) -> list[Span]:
        lane = _lane(thread)
        return [
            self._span("read", lane, [chunk], begin_s, copy_s, num_bytes),
            self._span("copy", lane, [chunk], copy_s, end_s, num_bytes),
        ]

    def _copy_spans(
        self, submits: list[tuple[Chunk, float, float, bool]], ended: dict[int, float], idle: dict[int, float]
    ) -> list[Span]:
        """Return what became of chunks between being filled and being copied. `idle` is moved on to then."""
        lane = f"copies to {self._about[1]}"
        spans: list[Span] = []
        free_s = 0.0  # the stream takes chunks one after the other
        for chunk, since_s, until_s, is_done in submits:
            spans.append(self._span("wait", WAITING, [chunk], idle[chunk.index], since_s))
            if is_done:
                spans.append(self._span("copy", _LOAD, [chunk], since_s, until_s))
                idle[chunk.index] = until_s
                continue
            spans.append(self._span("submit", _LOAD, [chunk], since_s, until_s))
            end_s = ended.get(chunk.index)
            if end_s is None:  # the load ended before the copy did
                del idle[chunk.index]
                continue
            begin_s = max(until_s, free_s)
            spans.append(self._span("wait", WAITING, [chunk], until_s, begin_s))
            spans.append(self._span("copy", lane, [chunk], begin_s, end_s))
            free_s = idle[chunk.index] = end_s
        return spans

    def _span(
        self,
        kind: Kind,
        lane: str,
        chunks: Sequence[Chunk],
        begin_s: float,
        end_s: float,
        num_bytes: int | None = None,
    ) -> Span:
        return Span(
            kind,
            lane,
            chunks[0].index if chunks else None,
            len(chunks),
            begin_s - self._begin_s,
            end_s - self._begin_s,
            sum(chunk.num_bytes for chunk in chunks) if num_bytes is None else num_bytes,
            self._files[chunks[0].source.shard] if chunks else "",
        )


def _lane(thread: str) -> str:
    return thread.removeprefix("weightstream-").replace("-", " ")


def rates(spans: Iterable[Span], wall_s: float, num_bins: int) -> list[float]:
    """Return the bytes per second of spans in equal parts of the wall time, each span's bytes spread over its time."""
    bins = [0.0] * num_bins
    if wall_s <= 0:
        return bins
    width_s = wall_s / num_bins
    for span in spans:
        first = min(int(span.begin_s / width_s), num_bins - 1)
        last = min(int(span.end_s / width_s), num_bins - 1)
        edges = [span.begin_s, *(number * width_s for number in range(first + 1, last + 1)), span.end_s]
        per_s = span.num_bytes / (span.end_s - span.begin_s)
        for number, (begin_s, end_s) in enumerate(pairwise(edges), first):
            bins[number] += per_s * (end_s - begin_s) / width_s
    return bins
