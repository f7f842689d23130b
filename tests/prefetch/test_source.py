"""Reads of chunks: the right bytes, buffered and direct, and what happens when the kernel gives less or says no."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.builders import entry, leaves_nothing, raw_file
from weightstream.errors import ReadError
from weightstream.prefetch.checkpoint import Checkpoint, open_checkpoint
from weightstream.prefetch.config import PrefetchConfig
from weightstream.prefetch.memory import PAGE_BYTES, allocate
from weightstream.prefetch.source import ByteRange, FileSource

#: Long enough for several pages, and no multiple of one, with the header before it.
DATA = random.Random(0).randbytes(5 * PAGE_BYTES + 1234)
SLOT_BYTES = 8 * PAGE_BYTES

Preadv = Callable[[int, Sequence[memoryview], int], int]


@pytest.fixture(name="checkpoint")
def fixture_checkpoint(tmp_path: Path) -> Generator[Checkpoint, None, None]:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file({"a": entry("U8", [len(DATA)], 0, len(DATA))}, DATA))
    with leaves_nothing(), open_checkpoint(path) as checkpoint:
        yield checkpoint


@pytest.fixture(name="content")
def fixture_content(checkpoint: Checkpoint) -> bytes:
    return checkpoint.path.read_bytes()


class Told:
    """What a source tells its load."""

    def __init__(self) -> None:
        self.pauses: list[float] = []
        self.fallbacks: list[str] = []
        self.num_retries = 0
        self.goes_on = True

    def pause(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        return self.goes_on

    def on_retry(self) -> None:
        self.num_retries += 1


@pytest.fixture(name="told")
def fixture_told() -> Told:
    return Told()


Open = Callable[..., FileSource]


@pytest.fixture(name="open_source")
def fixture_open_source(checkpoint: Checkpoint, told: Told) -> Generator[Open, None, None]:
    sources: list[FileSource] = []

    def open_source(**settings: object) -> FileSource:
        sources.append(
            FileSource(
                checkpoint,
                PrefetchConfig.model_validate(settings),
                pause=told.pause,
                on_retry=told.on_retry,
                on_fallback=told.fallbacks.append,
            )
        )
        return sources[-1]

    yield open_source
    for source in sources:
        source.close()


@pytest.fixture(name="takes_direct")
def fixture_takes_direct(tmp_path: Path) -> None:
    """Skip where the file system of the tests knows no direct I/O."""
    path = tmp_path / "probe"
    path.touch()
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system refuses O_DIRECT")


def read(source: FileSource, begin: int, end: int, sizes: Sequence[int] = ()) -> bytes:
    """Read a range scattered over buffers of some sizes; what they leave goes into one more."""
    rest = end - begin - sum(sizes)
    memory = [bytearray(size) for size in (*sizes, rest)]
    source.read(ByteRange(0, begin, end), [memoryview(one) for one in memory if one])
    return b"".join(memory)


def read_direct(source: FileSource, begin: int, end: int) -> bytes:
    slot = memoryview(allocate(SLOT_BYTES))
    source.read_direct(ByteRange(0, begin, end), slot)
    at = begin % PAGE_BYTES
    return bytes(slot[at : at + end - begin])


# Buffered and direct alike

PLACES = [0, 1, 8, 511, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, 3 * PAGE_BYTES - 3]
LENGTHS = [1, 2, 255, 512, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, 2 * PAGE_BYTES + 7]


@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_any_range_is_read_as_it_is_in_the_file(content: bytes, open_source: Open, told: Told, io: str) -> None:
    source = open_source(io=io)
    read_range = read_direct if io == "direct" else read
    for begin, length in itertools.product(PLACES, LENGTHS):
        assert read_range(source, begin, begin + length) == content[begin : begin + length]
    for begin in (len(content) - 1, len(content) - PAGE_BYTES - 5, 2 * PAGE_BYTES, 2 * PAGE_BYTES + 1):
        assert read_range(source, begin, len(content)) == content[begin:]
    assert told.num_retries == 0


@pytest.mark.usefixtures("takes_direct")
def test_direct_reads_go_past_the_page_cache_and_need_no_fallback(
    open_source: Open, told: Told, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    fds: set[int] = set()
    preadv = os.preadv

    def noted(fd: int, buffers: Sequence[memoryview], position: int) -> int:
        fds.add(fd)
        return preadv(fd, buffers, position)

    monkeypatch.setattr(os, "preadv", noted)
    source = open_source(io="direct")
    read_direct(source, 5, len(DATA))
    assert source.has_direct(0)
    assert told.fallbacks == []
    assert fds
    assert checkpoint.shards[0].fd not in fds


def test_buffered_source_says_so(open_source: Open) -> None:
    assert not open_source(io="buffered").has_direct(0)


@pytest.mark.usefixtures("takes_direct")
def test_source_that_may_choose_has_both(open_source: Open) -> None:
    assert open_source(io="auto").has_direct(0)


def test_refusal_is_no_fallback_where_direct_reads_were_not_asked_for(
    content: bytes, open_source: Open, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(io="auto")
    monkeypatch.setattr(os, "preadv", failing(os.preadv, errno.EINVAL, 1, []))
    assert read_direct(source, 10, 5000) == content[10:5000]
    assert not source.has_direct(0)
    assert told.fallbacks == []


def test_shares_of_ranges_of_a_file_that_was_just_written(open_source: Open, content: bytes) -> None:
    shares = open_source().resident_shares([ByteRange(0, 0, 10), ByteRange(0, 0, len(content))])
    assert shares == [1.0, 1.0]


@given(st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_bytes_are_scattered_in_order_whatever_the_kernel_gives_at_once(
    content: bytes, open_source: Open, data: st.DataObject
) -> None:
    begin = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(begin + 1, len(content)))
    cuts = sorted(data.draw(st.lists(st.integers(0, end - begin), max_size=20)))
    sizes = [second - first for first, second in itertools.pairwise([0, *cuts])]
    most = data.draw(st.integers(1 + (end - begin) // 500, end - begin))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", shortened(os.preadv, most))
        assert read(open_source(), begin, end, sizes) == content[begin:end]


def shortened(preadv: Preadv, most: int) -> Preadv:
    """A kernel that gives at most so many bytes at once."""

    def short(fd: int, buffers: Sequence[memoryview], position: int) -> int:
        given, left = [], most
        for buffer in buffers:
            given.append(buffer[:left])
            left -= len(given[-1])
        return preadv(fd, given, position)

    return short


@pytest.mark.usefixtures("takes_direct")
@pytest.mark.parametrize("most", [PAGE_BYTES, 2 * PAGE_BYTES, 1000, PAGE_BYTES + 1])
def test_short_direct_read_is_continued_and_is_no_refusal_of_direct_io(
    content: bytes, open_source: Open, told: Told, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    preadv = os.preadv

    def short(fd: int, buffers: Sequence[memoryview], position: int) -> int:
        """Read as much as direct I/O must, and act as if only so much had come."""
        (buffer,) = buffers
        count = min(preadv(fd, buffers, position), most)
        buffer[count:] = bytes(len(buffer) - count)
        return count

    source = open_source(io="direct")
    monkeypatch.setattr(os, "preadv", short)
    assert read_direct(source, 7, len(content) - 3) == content[7:-3]
    assert source.has_direct(0)
    assert told.fallbacks == []


def test_more_buffers_than_the_kernel_takes_are_filled(
    content: bytes, open_source: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    most: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: Sequence[memoryview], position: int) -> int:
        most.append(len(buffers))
        return preadv(fd, buffers, position)

    monkeypatch.setattr(os, "preadv", counted)
    assert read(open_source(), 3, 3 + 5000, [2] * 2400) == content[3:5003]
    assert len(most) == 3
    assert max(most) <= os.sysconf("SC_IOV_MAX")


# Errors that pass, and errors that stay


def failing(preadv: Preadv, error: int, times: int, calls: list[int]) -> Preadv:
    """A kernel that refuses so many reads with an error."""

    def fail(fd: int, buffers: Sequence[memoryview], position: int) -> int:
        calls.append(position)
        if len(calls) <= times:
            raise OSError(error, os.strerror(error))
        return preadv(fd, buffers, position)

    return fail


TRANSIENT = [errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT]


@pytest.mark.parametrize("error", TRANSIENT, ids=errno.errorcode.get)
@pytest.mark.parametrize("io", ["buffered", "direct"])
@pytest.mark.parametrize("times", [1, 3])
def test_error_that_passes_is_retried_and_counted(
    content: bytes, open_source: Open, told: Told, monkeypatch: pytest.MonkeyPatch, error: int, io: str, times: int
) -> None:
    source = open_source(io=io, retries=3)
    monkeypatch.setattr(os, "preadv", failing(os.preadv, error, times, []))
    read_range = read_direct if io == "direct" else read
    assert read_range(source, 10, 5000) == content[10:5000]
    assert (told.num_retries, len(told.pauses)) == (times, times)


def test_pauses_grow(open_source: Open, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: 1.0)
    monkeypatch.setattr(os, "preadv", failing(os.preadv, errno.EIO, 5, []))
    read(open_source(retries=5), 0, 1)
    assert all(later > earlier > 0 for earlier, later in itertools.pairwise(told.pauses))


@pytest.mark.parametrize("retries", [0, 1, 4])
@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_error_that_stays_is_a_read_error_after_the_last_retry(
    checkpoint: Checkpoint, open_source: Open, told: Told, monkeypatch: pytest.MonkeyPatch, retries: int, io: str
) -> None:
    source, calls = open_source(io=io, retries=retries), list[int]()
    monkeypatch.setattr(os, "preadv", failing(os.preadv, errno.EIO, 1000, calls))
    with pytest.raises(
        ReadError, match=rf"cannot read at offset \d+: Input/output error \(errno 5\), after {retries} retries"
    ) as caught:
        (read_direct if io == "direct" else read)(source, 10, 5000)
    assert caught.value.file == str(checkpoint.path)
    assert (told.num_retries, len(calls)) == (retries, retries + 1)


def test_retries_count_for_each_read_alone(open_source: Open, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(retries=1)
    for _ in range(5):
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", failing(os.preadv, errno.EAGAIN, 1, []))
            read(source, 0, 10)
    assert told.num_retries == 5


@pytest.mark.parametrize("error", [errno.EBADF, errno.EACCES, errno.ENXIO, errno.EINVAL], ids=errno.errorcode.get)
def test_error_that_cannot_pass_is_not_retried(
    open_source: Open, told: Told, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(os, "preadv", failing(os.preadv, error, 1, calls))
    with pytest.raises(ReadError, match=rf"errno {error}.*after 0 retries"):
        read(open_source(), 0, 10)
    assert (told.num_retries, len(calls)) == (0, 1)


def test_load_that_was_stopped_ends_the_retries(open_source: Open, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    told.goes_on = False
    calls: list[int] = []
    monkeypatch.setattr(os, "preadv", failing(os.preadv, errno.EIO, 1000, calls))
    with pytest.raises(ReadError):
        read(open_source(retries=100), 0, 10)
    assert len(calls) == 1


# Direct I/O that is refused

FALLBACK = "direct I/O refused by the file system: buffered reads used instead"


def test_refused_direct_read_falls_back_and_tells_once(
    content: bytes, open_source: Open, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(io="direct")
    monkeypatch.setattr(os, "preadv", failing(os.preadv, errno.EINVAL, 1, []))
    assert read_direct(source, 10, 5000) == content[10:5000]
    assert not source.has_direct(0)
    assert read_direct(source, 4096, 5000) == content[4096:5000]  # a chunk that was granted as a whole before that
    assert told.fallbacks == [FALLBACK]
    assert told.num_retries == 0


def test_refused_flag_falls_back_and_tells_once(
    content: bytes, open_source: Open, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens = os.open

    def refuse(path: str, flags: int, *args: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opens(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    source = open_source(io="direct")
    for begin in (0, 10, 4096):
        assert read_direct(source, begin, 9000) == content[begin:9000]
    assert not source.has_direct(0)
    assert told.fallbacks == [FALLBACK]


def test_read_that_falls_back_half_way_goes_on_where_it_was(
    content: bytes, open_source: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(io="direct")
    short = shortened(os.preadv, PAGE_BYTES)
    calls: list[int] = []

    def second_fails(fd: int, buffers: Sequence[memoryview], position: int) -> int:
        calls.append(position)
        if len(calls) == 2:
            raise OSError(errno.EINVAL, "Invalid argument")
        return short(fd, buffers, position)

    monkeypatch.setattr(os, "preadv", second_fails)
    assert read_direct(source, 1, 3 * PAGE_BYTES) == content[1 : 3 * PAGE_BYTES]
    assert calls == [0, PAGE_BYTES, PAGE_BYTES, 2 * PAGE_BYTES]


def test_closing_twice_closes_once(open_source: Open) -> None:
    source = open_source(io="direct")
    read_direct(source, 0, 10)
    source.close()
    source.close()


def test_source_may_be_closed_unused(open_source: Open) -> None:
    open_source(io="direct").close()


# Truncation


@pytest.mark.parametrize("io", ["buffered", "direct"])
@pytest.mark.parametrize("left", [0, 100, PAGE_BYTES, PAGE_BYTES + 100])
def test_file_that_ends_too_early_is_a_read_error(
    checkpoint: Checkpoint, content: bytes, open_source: Open, io: str, left: int
) -> None:
    source = open_source(io=io)
    os.truncate(checkpoint.path, left)
    with pytest.raises(ReadError, match="the file ended while it was being read") as caught:
        (read_direct if io == "direct" else read)(source, 10, len(content))
    assert caught.value.file == str(checkpoint.path)
    assert caught.value.expected == f"{len(content)} bytes or more"


def test_file_that_is_truncated_in_mid_read_is_a_read_error(
    checkpoint: Checkpoint, content: bytes, open_source: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = shortened(os.preadv, PAGE_BYTES)

    def truncate_behind(fd: int, buffers: Sequence[memoryview], position: int) -> int:
        count = short(fd, buffers, position)
        os.truncate(checkpoint.path, position + count)
        return count

    monkeypatch.setattr(os, "preadv", truncate_behind)
    with pytest.raises(ReadError, match=f"found {PAGE_BYTES} bytes. It was truncated after the load began"):
        read(open_source(), 0, len(content))


def test_retry_is_logged_for_those_who_look(
    open_source: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "preadv", failing(os.preadv, errno.EIO, 1, []))
    with caplog.at_level(logging.DEBUG, "weightstream.prefetch.attempts"):
        read(open_source(), 0, 10)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
