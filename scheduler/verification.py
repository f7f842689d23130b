"""Verification: the shards of one load are hashed while they are read, and compared with what they should be.

A chunk is hashed out of the memory that it was read into, after the chunks before it in its shard, and is not handed on
before that: whatever becomes of a tensor afterwards, the bytes that it was made of are those that were hashed. The last
chunk of a shard is handed on only if the digest is right, so no load, and no stream, comes to its end with wrong bytes.

Why this cannot dead-lock, however few slots there are. Let the plan have each shard's chunks in the order of their
bytes, and let chunks be granted in the order of the plan. Then all that a chunk waits for are chunks that were granted
before it. The earliest chunk that has been granted and not handed on waits for none: it is being read, or hashed, or
may be. So it is handed on, its slot comes back, and the next chunk is granted. Consumers that take tensors in the order
of the files want the plan in that order too, or a window full of later ones would keep the next one out; see `Whole`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from weightstream.errors import IntegrityError
from weightstream.prefetch.attempts import Attempts
from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.prefetch.digests import Digest, find_digests, no_digest
from weightstream.prefetch.memory import usable_cores
from weightstream.prefetch.source import ByteRange
from weightstream.scheduler.plan import LoadPlan, Whole

__all__ = ["Part", "Verification", "whole_shards"]

T = TypeVar("T")

#: Not measured on more than two cores: so many threads, at 1 to 2 GB/s each, keep up with most storage.
_MAX_THREADS = 8


class Part(NamedTuple, Generic[T]):
    """Bytes of a shard that were read, in the memory they were read into; `item` is what the user knows them by."""

    source: ByteRange
    buffers: Sequence[memoryview]
    item: T


class Verification(Generic[T]):
    """The digests of one load's shards. Guarded by its user's lock, except for `hash`.

    Args:
        checkpoint: opened with `hashes`.
        plan: made with `whole_shards`.
        allow_outside_links: whether manifests may be links to elsewhere.
        attempts: says how often a manifest is read again after an error that may pass.

    Raises:
        IntegrityError: nobody says what the digest of a shard should be, or two say different things.
        CheckpointError, ReadError: a manifest is not one, or cannot be read.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: LoadPlan, *, allow_outside_links: bool, attempts: Attempts
    ) -> None:
        found = find_digests(checkpoint, allow_outside_links=allow_outside_links, attempts=attempts)
        self._shards = checkpoint.shards
        self._hashes = checkpoint.hashes
        self._expected: dict[int, Digest] = {}
        self._unwanted_bytes = plan.unwanted_bytes
        self._parts: dict[tuple[int, int], Part[T]] = {}
        self._next = {shard: self._hashes[shard].position for shard in plan.verified}
        self._compared: set[int] = set()
        #: How many threads can have something to do.
        self.num_threads = min(_num_threads(), len(plan.verified))
        #: Seconds that they spent on it, added up.
        self.hash_s = 0.0
        for shard in plan.verified:
            expected = found[shard]
            if expected is None:
                raise no_digest(self._shards[shard])
            self._expected[shard] = expected
            if self._next[shard] == self._shards[shard].num_bytes:  # there is nothing behind its header
                self._compare(shard)

    def put(self, part: Part[T]) -> None:
        """Add bytes that are to be hashed once those before them have been."""
        self._parts[part.source.shard, part.source.begin] = part

    def take(self) -> Part[T] | None:
        """Return a part that can be hashed now, if there is one. Its shard's next one can be only after `finish`."""
        for shard, position in self._next.items():
            part = self._parts.pop((shard, position), None)
            if part is not None:
                return part
        return None

    def hash(self, part: Part[T], goes_on: Callable[[], bool]) -> None:
        """Hash a part that `take` returned, without the lock; end early, and be of no more use, where that says no."""
        for buffer in part.buffers:
            self._hashes[part.source.shard].update(buffer, goes_on=goes_on)

    def finish(self, part: Part[T], seconds: float) -> None:
        """Note that a part has been hashed, which took so many seconds.

        Raises:
            IntegrityError: it was its shard's last one, and the digest is not what it should be.
        """
        self.hash_s += seconds
        shard = part.source.shard
        self._next[shard] = part.source.end
        if part.source.end == self._shards[shard].num_bytes:
            self._compare(shard)

    def check_complete(self) -> None:
        """Make sure that every shard has been compared.

        Raises:
            IntegrityError: one has not.
        """
        for shard in self._expected.keys() - self._compared:
            raise IntegrityError(
                "the file was not hashed to its end",
                file=self._shards[shard].path,
                expected=f"{self._shards[shard].num_bytes} bytes",
                actual=f"{self._next[shard]} bytes",
            )

    def describe(self) -> str:
        """Return what the bytes were compared with, for `LoadReport.verified`."""
        return f"sha256 ({', '.join(sorted({digest.source for digest in self._expected.values()}))})"

    def decisions(self) -> list[str]:
        """Say what it did, and at what cost."""
        num_shards, num_others = len(self._expected), len(self._shards) - len(self._expected)
        threads = f"{self.num_threads} threads, which took {self.hash_s:.2f} s of these"
        said = [f"verify: {num_shards} shards were read in the order of their bytes and hashed by {threads}"]
        if self._unwanted_bytes:
            said.append(f"verify: {self._unwanted_bytes} bytes that this load does not need were read to be hashed")
        if num_others:
            said.append(f"verify: {num_others} shards that this load needs nothing of were not read")
        return said

    def _compare(self, shard: int) -> None:
        expected, actual = self._expected[shard], self._hashes[shard].hexdigest()
        if actual != expected.sha256:
            raise IntegrityError(
                f"the file's SHA-256 is not what the {_SPEAKERS[expected.source]} says",
                file=self._shards[shard].path,
                expected=expected.sha256,
                actual=actual,
                hint="Fetch the file again",
            )
        self._compared.add(shard)


_SPEAKERS = {"manifest": "manifest", "hub": "Hugging Face cache"}


def whole_shards(checkpoint: Checkpoint, *, side_by_side: bool) -> Whole | None:
    """Return how the shards of a checkpoint are to be read; None if it is not verified.

    Args:
        checkpoint: what is loaded.
        side_by_side: whether several shards may be read at a time.
    """
    if not checkpoint.hashes:
        return None
    bodies = [
        (begun.position, shard.num_bytes) for begun, shard in zip(checkpoint.hashes, checkpoint.shards, strict=True)
    ]
    return Whole(bodies, _num_threads() if side_by_side else 1)


def _num_threads() -> int:
    return min(_MAX_THREADS, usable_cores())
