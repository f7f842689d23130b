"""What this machine can do at best: files read in parallel, page-locked memory copied to a device.

Measured raw, with the system calls and nothing of the pipeline in between, so that a load can be compared with it. What
a user sees is the lower of the two; a load that reaches it has nothing left to gain.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from weightstream.prefetch.memory import PAGE_BYTES, allocate

__all__ = ["WINDOW_BYTES", "CopyCeiling", "ReadCeiling", "copy_ceiling", "copy_round", "read_ceiling"]

#: At most this much is page-locked for the copies, which go round in it, and reads for a device go round in as much:
#: enough not to stay in the CPU's caches.
WINDOW_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class ReadCeiling:
    """A raw parallel read of files: `num_bytes` in `wall_s` seconds."""

    num_bytes: int
    wall_s: float
    num_threads: int
    direct: bool

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.wall_s


@dataclass(frozen=True, slots=True)
class CopyCeiling:
    """Raw copies from page-locked memory to a device: `num_bytes` in `wall_s` seconds."""

    num_bytes: int
    wall_s: float
    chunk_bytes: int

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.wall_s


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Bytes `begin` to `end` of a file, whose place in memory begins at `place`."""

    path: Path
    fd: int
    begin: int
    end: int
    place: int


def read_ceiling(
    paths: Sequence[Path],
    *,
    num_threads: int,
    direct: bool,
    chunk_bytes: int = 16 * 2**20,
    window_bytes: int | None = None,
    on_begin: Callable[[Path], None] = lambda _: None,
) -> ReadCeiling:
    """Read every byte of some files, and say how long that took.

    Threads take the next chunk in the order of the files. Each goes to a place of its own in fresh memory, as weights on
    the host do, and the clock covers mapping the memory and touching it first. With `window_bytes` chunks go round in so
    much memory that was touched before, as those do that only pass through on their way to a device. Neither opening
    the files nor starting the threads counts. The memory is freed before this returns. Blocks: not for the event loop's
    thread.

    Args:
        paths: the files, which must not change meanwhile.
        num_threads: how many read at once.
        direct: read past the page cache, with O_DIRECT.
        chunk_bytes: what one thread reads at a time, a multiple of 4 KiB.
        window_bytes: the memory that reads go round in, at least one chunk for each thread. None: as large as the files.
        on_begin: told of the file before it is opened, and before each read of it, on the thread that does it.

    Raises:
        OSError: a file cannot be opened or read, or ended early; or, if `direct`, its file system refuses O_DIRECT. Its
            `filename` says which.
        ValueError: no thread, an odd chunk, a window that is too small, or files without a byte.
    """
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, found {num_threads}")
    if chunk_bytes < 1 or chunk_bytes % PAGE_BYTES:
        raise ValueError(f"chunk_bytes must be a multiple of {PAGE_BYTES}, found {chunk_bytes}")
    if window_bytes is not None and window_bytes < num_threads * chunk_bytes:
        raise ValueError(
            f"window_bytes must be at least a chunk for each thread, {num_threads * chunk_bytes}, found {window_bytes}"
        )
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    with ExitStack() as stack:
        fds: list[int] = []
        for path in paths:
            on_begin(path)
            fds.append(os.open(path, flags))
            stack.callback(os.close, fds[-1])
        sizes = [os.fstat(fd).st_size for fd in fds]
        if not any(sizes):
            raise ValueError(f"there is no byte to read in {len(sizes)} files")
        chunks = _cut(paths, fds, sizes, chunk_bytes)
        length = sum(map(_whole_pages, sizes))
        if window_bytes is None or window_bytes >= length:
            wall_s = _time_reads(chunks, num_threads, lambda: allocate(length), on_begin)
        else:
            num_places = window_bytes // chunk_bytes
            chunks = [replace(chunk, place=n % num_places * chunk_bytes) for n, chunk in enumerate(chunks)]
            window = allocate(num_places * chunk_bytes)
            torch.frombuffer(window, dtype=torch.uint8).fill_(1)  # touches it
            wall_s = _time_reads(chunks, num_threads, lambda: window, on_begin)
    return ReadCeiling(sum(sizes), wall_s, num_threads, direct)


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def _cut(paths: Sequence[Path], fds: Sequence[int], sizes: Sequence[int], chunk_bytes: int) -> list[_Chunk]:
    """Cut files into chunks. Each file's place begins on a page, and has room for the rest of its last one."""
    chunks: list[_Chunk] = []
    place = 0
    for path, fd, size in zip(paths, fds, sizes, strict=True):
        chunks += [
            _Chunk(path, fd, begin, min(begin + chunk_bytes, size), place + begin)
            for begin in range(0, size, chunk_bytes)
        ]
        place += _whole_pages(size)
    return chunks


def _time_reads(
    chunks: Sequence[_Chunk], num_threads: int, map_memory: Callable[[], mmap.mmap], on_begin: Callable[[Path], None]
) -> float:
    """Map memory and read all chunks to their places in it on threads of its own; return seconds."""
    memory: list[memoryview] = []
    errors: list[BaseException] = []
    mapped = threading.Event()
    todo = iter(chunks)
    lock = threading.Lock()

    def work() -> None:
        mapped.wait()
        try:
            for chunk in _shared(todo, lock):
                if errors:
                    return
                on_begin(chunk.path)
                _read_chunk(chunk, memory[0])
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for the threads
            errors.append(error)

    threads = [threading.Thread(target=work, name="weightstream-ceiling", daemon=True) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    begin_s = time.perf_counter()
    try:
        memory.append(memoryview(map_memory()))
    except BaseException as error:
        errors.append(error)
        raise
    finally:
        mapped.set()
        for thread in threads:
            thread.join()
    wall_s = time.perf_counter() - begin_s
    if errors:
        raise errors[0]
    return wall_s


def _shared(todo: Iterator[_Chunk], lock: threading.Lock) -> Iterator[_Chunk]:
    """Yield what is left of an iterator that several threads take from."""
    while True:
        with lock:
            chunk = next(todo, None)
        if chunk is None:
            return
        yield chunk


def _read_chunk(chunk: _Chunk, memory: memoryview) -> None:
    """Read whole pages, as O_DIRECT demands; the last one of a file is short. Goes on after a short read."""
    length = _whole_pages(chunk.end - chunk.begin)
    done = 0
    while chunk.begin + done < chunk.end:
        try:
            count = os.preadv(chunk.fd, [memory[chunk.place + done : chunk.place + length]], chunk.begin + done)
        except OSError as error:
            error.filename = str(chunk.path)
            raise
        if count == 0:
            what = f"the file ended at byte {chunk.begin + done} while it was being read"
            raise OSError(errno.EIO, what, str(chunk.path))
        done += count


def copy_ceiling(device: torch.device, *, num_bytes: int, chunk_bytes: int) -> CopyCeiling:
    """Copy so many bytes from page-locked memory to a device, chunk by chunk, and say how long that took.

    Copies are `non_blocking`, one behind the other on one stream of their own; the clock runs from the first submission
    until the event behind the last copy. Both sides go round in at most 256 MiB (or one chunk, if that is more), which
    are allocated, page-locked and copied once before the clock runs. Blocks: not for the event loop's thread.

    Args:
        device: an accelerator.
        num_bytes: how much in all.
        chunk_bytes: how much one copy moves.

    Raises:
        ValueError: the device is the CPU or meta, or a size is below 1.
        RuntimeError: the driver refused memory or page-locking.
    """
    if device.type in ("cpu", "meta"):
        raise ValueError(f"there is nothing to copy to on {device}: name an accelerator")
    if num_bytes < 1 or chunk_bytes < 1:
        raise ValueError(f"sizes must be at least 1 byte, found num_bytes {num_bytes}, chunk_bytes {chunk_bytes}")
    num_places = max(1, min(WINDOW_BYTES, num_bytes) // chunk_bytes)
    source = torch.zeros(num_places, chunk_bytes, dtype=torch.uint8, pin_memory=True)
    destination = torch.zeros_like(source, device=device)
    torch.accelerator.synchronize(device)  # the destination was made on another stream
    stream = torch.Stream(device)
    _copy(source, destination, stream, source.nbytes)
    begin_s = time.perf_counter()
    _copy(source, destination, stream, num_bytes)
    return CopyCeiling(num_bytes, time.perf_counter() - begin_s, chunk_bytes)


def _copy(source: torch.Tensor, destination: torch.Tensor, stream: torch.Stream, num_bytes: int) -> None:
    """Copy on a stream, and wait for the event behind the last copy."""
    before = torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        copy_round(source, destination, num_bytes)
        event = torch.Event(stream.device)
        event.record(stream)
    finally:
        torch.accelerator.set_stream(before)
    event.synchronize()


def copy_round(source: torch.Tensor, destination: torch.Tensor, num_bytes: int) -> None:
    """Submit copies of so many bytes in all, row after row, and again from the first one; the last may be short."""
    num_rows, row_bytes = source.shape
    for number, begin in enumerate(range(0, num_bytes, row_bytes)):
        row, size = number % num_rows, min(row_bytes, num_bytes - begin)
        destination[row, :size].copy_(source[row, :size], non_blocking=True)
