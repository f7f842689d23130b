"""Hashing all of a checkpoint's files, outside of a load and within its limits. Imports no torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import anyio

from weightstream.config import LoaderConfig
from weightstream.errors import LoadTimeoutError
from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.prefetch.digests import Digest, find_digests
from weightstream.prefetch.memory import usable_cores
from weightstream.prefetch.source import ByteRange, FileSource
from weightstream.scheduler.files import GRACE_S
from weightstream.scheduler.looking import looking, open_for
from weightstream.warm import in_thread

__all__ = ["Hashing", "Work"]

#: Read and hashed at a time, by each thread. Not measured: long enough for the disk, short enough for Ctrl-C.
_PIECE_BYTES = 8 * 2**20

_REFRESH_S = 0.05


class Work:
    """What is done with files, within the limits of a load; see `looking`. `call` and `close` block."""

    def __init__(self, config: LoaderConfig) -> None:
        self.config = config
        self.num_retries = 0
        self.began_s = time.monotonic()
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self.files, self._attempts = self._stack.enter_context(looking(config, on_retry=self.add_retry))
        self.call, self.close = self.files.call, self._stack.close

    def add_retry(self) -> None:
        with self._lock:
            self.num_retries += 1

    def open(self) -> Checkpoint:
        return self.call(lambda: open_for(self.config, self.files, self._attempts, hashes=True))

    def digests(self, checkpoint: Checkpoint, except_manifest: str | None) -> list[Digest | None]:
        return self.call(
            lambda: find_digests(
                checkpoint,
                allow_outside_links=self.config.prefetch.allow_outside_links,
                except_manifest=except_manifest,
                attempts=self._attempts,
            )
        )


class Hashing:
    """Threads that read and hash the files of a checkpoint, one file each at a time."""

    def __init__(self, checkpoint: Checkpoint, work: Work) -> None:
        self._checkpoint = checkpoint
        self._work = work
        self._stopped = threading.Event()
        self._source = FileSource(
            checkpoint,
            work.config.prefetch.model_copy(update={"io": "buffered"}),
            pause=lambda seconds: not self._stopped.wait(seconds),
            on_retry=self._retry,
            on_fallback=lambda _: None,
        )
        #: What each thread reads, by its number, and since when.
        self._reads: dict[int, tuple[ByteRange, float]] = {}
        self._lock = threading.Lock()
        self._left = sorted(range(len(checkpoint.shards)), key=lambda number: checkpoint.shards[number].num_bytes)
        self._error: BaseException | None = None
        self._num_running = 0
        self._is_over = False

    async def run(self, update: Callable[[int, int], None]) -> None:
        """Hash everything, and say how far that is; stop if the waiting task is cancelled.

        Raises:
            ReadError: a file cannot be read.
            LoadTimeoutError: a read does not return, or all of it takes too long.
        """
        total_bytes = sum(shard.num_bytes for shard in self._checkpoint.shards)
        threads = [
            threading.Thread(target=self._hash_files, name=f"weightstream-hash-{number}", daemon=True)
            for number in range(min(len(self._left), usable_cores()))
        ]
        self._num_running = len(threads)
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                update(total_bytes, self._num_bytes)
                self._check_limits()
                await anyio.sleep(_REFRESH_S)
        finally:
            self._stopped.set()
            with anyio.CancelScope(shield=True):
                await in_thread(self._close, threads)
        if self._error is not None:
            raise self._error
        update(total_bytes, total_bytes)

    @property
    def _num_bytes(self) -> int:
        return sum(begun.position for begun in self._checkpoint.hashes)

    def _check_limits(self) -> None:
        now, timeout_s = time.monotonic(), self._work.config.scheduler.timeout_s
        if timeout_s is not None and now - self._work.began_s > timeout_s:
            raise LoadTimeoutError(
                "hashing took too long",
                file=self._checkpoint.path,
                expected=f"at most {timeout_s:g} s",
                actual=f"{self._num_bytes} bytes hashed",
                hint="Raise scheduler.timeout_s",
            )
        stall_s = self._work.config.prefetch.stall_s
        for wanted, since_s in list(self._reads.values()):
            if stall_s is not None and now - since_s > stall_s:
                raise LoadTimeoutError(
                    "a read does not return",
                    file=self._checkpoint.shards[wanted.shard].path,
                    expected=f"at most {stall_s:g} s",
                    actual=f"no answer to the read at offset {wanted.begin} for {now - since_s:.3g} s",
                    hint="Look at the file system, or raise prefetch.stall_s",
                )

    def _close(self, threads: list[threading.Thread]) -> None:
        """Wait for the threads, but not for reads that hang: the files stay open as long as somebody reads from them."""
        until_s = time.monotonic() + GRACE_S
        for thread in threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        with self._lock:
            self._is_over = True
            num_stuck = self._num_running
        self._work.files.keep_open(num_stuck)
        if not num_stuck:
            self._source.close()

    def _retry(self) -> None:
        self._work.add_retry()
        self._note(self._reads[threading.get_ident()][0])

    def _note(self, wanted: ByteRange) -> None:
        self._reads[threading.get_ident()] = wanted, time.monotonic()

    def _hash_files(self) -> None:
        try:
            memory = memoryview(bytearray(_PIECE_BYTES))
            while not self._stopped.is_set():
                with self._lock:
                    if not self._left:
                        return
                    number = self._left.pop()
                self._hash(number, memory)
        except BaseException as error:  # noqa: BLE001 (whatever it is: a digest of a part must not pass for that of a file)
            self._error = self._error or error
            self._stopped.set()
        finally:
            with self._lock:
                self._num_running -= 1
                was_stuck = self._is_over
            if was_stuck:
                self._work.files.keep_open(-1)

    def _hash(self, number: int, memory: memoryview) -> None:
        begun, end = self._checkpoint.hashes[number], self._checkpoint.shards[number].num_bytes
        while begun.position < end and not self._stopped.is_set():
            count = min(len(memory), end - begun.position)
            wanted = ByteRange(number, begun.position, begun.position + count)
            self._note(wanted)
            self._source.read(wanted, [memory[:count]])
            del self._reads[threading.get_ident()]
            begun.update(memory[:count])
