"""The simulated file system: it shows what is there, counts what is read, fails as it is told, and leaves nothing."""

from __future__ import annotations

import errno
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

import weightstream as ws
from tests.builders import assert_same, bytes_of, random_tensors, write_checkpoint
from tests.fakes.filesystem import Behaviour, Fault, Mount, Speed, mounted
from tests.fakes.filesystem_server import Line
from tests.fakes.fixtures import requires_fuse

pytestmark = requires_fuse

MIB = 2**20
DATA = os.urandom(3 * MIB + 12_345)
ROOT = Path(__file__).parents[2]


@pytest.fixture(name="folder", scope="module")
def fixture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shown")
    (folder / "data").write_bytes(DATA)
    (folder / "empty").touch()
    (folder / "inside").mkdir()
    (folder / "inside" / "small").write_text("small")
    return folder


def mounts() -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.startswith("weightstream ")]


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Generator[None, None, None]:
    yield
    ours = f"weightstream-mount-{os.getpid()}-"
    assert not [path for path in mounts() if ours in path]
    assert not list(Path(tempfile.gettempdir()).glob(f"{ours}*"))


def read(path: Path, *, is_direct: bool = False, num_bytes: int = 4 * MIB, offset: int = 0) -> bytes:
    """One read, by one call."""
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if is_direct else 0))
    try:
        memory = mmap.mmap(-1, num_bytes)  # begins on a page
        return memory[: os.preadv(fd, [memory], offset)]
    finally:
        os.close(fd)


# What is there


@pytest.mark.parametrize("is_direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("is_cached", [False, True], ids=["uncached", "cached"])
def test_files_are_those_of_the_folder(folder: Path, *, is_cached: bool, is_direct: bool) -> None:
    with mounted(folder, Behaviour(is_cached=is_cached)) as mount:
        assert sorted(os.listdir(mount.path)) == ["data", "empty", "inside"]
        assert (mount.path / "data").stat().st_size == len(DATA)
        assert (mount.path / "data").stat().st_mtime_ns == (folder / "data").stat().st_mtime_ns
        assert read(mount.path / "data", is_direct=is_direct) == DATA
        assert read(mount.path / "empty") == b""
        assert (mount.path / "inside" / "small").read_text() == "small"
        assert not (mount.path / "nothing").exists()


def test_it_is_read_only(folder: Path) -> None:
    with mounted(folder) as mount, pytest.raises(OSError, match="Read-only"):
        (mount.path / "data").open("ab")


def test_reads_are_counted(folder: Path) -> None:
    with mounted(folder, Behaviour(request_bytes=MIB)) as mount:
        read(mount.path / "data", is_direct=True)
        found = mount.statistics()
    assert [(one.file, one.offset, one.is_direct) for one in found.requests] == [
        ("data", offset, True) for offset in range(0, 4 * MIB, MIB)
    ]
    assert found.num_bytes == len(DATA)
    assert (found.max_in_flight, found.num_stalled, found.num_faults) == (1, 0, ())


@pytest.mark.parametrize(("is_cached", "num_times"), [(True, 1), (False, 2)], ids=["cached", "uncached"])
def test_page_cache_keeps_what_was_read(folder: Path, num_times: int, *, is_cached: bool) -> None:
    with mounted(folder, Behaviour(is_cached=is_cached)) as mount:
        for _ in range(2):
            assert read(mount.path / "data") == DATA
        assert mount.statistics().num_bytes == num_times * len(DATA)


def test_checkpoint_loads_from_it(tmp_path: Path) -> None:
    tensors = random_tensors({"a": (300, 1000), "b": (7,)})
    write_checkpoint(tmp_path, tensors, num_shards=2)
    with mounted(tmp_path) as mount:
        found = dict(ws.iter_tensors(mount.path, ws.LoaderConfig(device={"target": "cpu"})))  # type: ignore[arg-type]
        assert mount.statistics().num_bytes >= sum(len(bytes_of(tensor)) for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)


# What goes wrong


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN], ids=lambda number: errno.errorcode[number]
)
@pytest.mark.parametrize("is_direct", [False, True], ids=["buffered", "direct"])
def test_error_is_the_errno_of_the_read_and_passes(folder: Path, number: int, *, is_direct: bool) -> None:
    fault = Fault("data", "error", number=number)
    with mounted(folder, Behaviour(faults=(fault,), is_cached=is_direct)) as mount:
        with pytest.raises(OSError) as caught:
            read(mount.path / "data", is_direct=is_direct)
        assert caught.value.errno == number
        assert read(mount.path / "data", is_direct=is_direct) == DATA
        assert mount.statistics().num_faults == (1,)


def test_error_may_last(folder: Path) -> None:
    fault = Fault("data", "error", offset=MIB, times=None)
    with mounted(folder, Behaviour(faults=(fault,))) as mount:
        for _ in range(3):
            with pytest.raises(OSError, match="Input/output"):
                read(mount.path / "data", is_direct=True, offset=MIB)
        assert read(mount.path / "data", is_direct=True, num_bytes=MIB) == DATA[:MIB]
        assert read(mount.path / "data", is_direct=True, offset=2 * MIB) == DATA[2 * MIB :]
        mount.change(faults=())
        assert read(mount.path / "data", is_direct=True) == DATA


def test_fault_hits_the_request_with_its_number(folder: Path) -> None:
    faults = (Fault("data", "error", request=1), Fault("empty", "error"))
    with mounted(folder, Behaviour(faults=faults)) as mount:
        assert read(mount.path / "data", is_direct=True, num_bytes=MIB) == DATA[:MIB]
        with pytest.raises(OSError, match="Input/output"):
            read(mount.path / "data", is_direct=True, num_bytes=MIB)
        assert read(mount.path / "data", is_direct=True, num_bytes=MIB) == DATA[:MIB]
        assert mount.statistics().num_faults == (1, 0)


def test_fault_may_hit_every_file(folder: Path) -> None:
    with mounted(folder, Behaviour(faults=(Fault(None, "error", request=0, times=None),), is_cached=False)) as mount:
        for name in ("data", "inside/small"):
            with pytest.raises(OSError, match="Input/output"):
                read(mount.path / name)
        assert read(mount.path / "data") == DATA
        assert mount.statistics().num_faults == (2,)


def test_buffered_reader_does_not_see_an_error_that_passes(folder: Path) -> None:
    """The kernel reads ahead, fails, and tries again."""
    with mounted(folder, Behaviour(faults=(Fault("data", "error"),))) as mount:
        assert read(mount.path / "data") == DATA


@pytest.mark.parametrize("is_direct", [False, True], ids=["buffered", "direct"])
def test_short_read_is_short(folder: Path, *, is_direct: bool) -> None:
    fault = Fault("data", "short", num_bytes=4096)
    with mounted(folder, Behaviour(faults=(fault,), is_cached=False)) as mount:
        assert read(mount.path / "data", is_direct=is_direct) == DATA[:4096]
        assert read(mount.path / "data", is_direct=is_direct) == DATA


def test_kernel_completes_a_short_direct_read_where_there_is_a_page_cache(folder: Path) -> None:
    with mounted(folder, Behaviour(faults=(Fault("data", "short", num_bytes=4096),))) as mount:
        assert read(mount.path / "data", is_direct=True) == DATA
        first, *others = mount.statistics().requests
    assert first.is_direct
    assert others


@pytest.mark.parametrize("is_cached", [False, True], ids=["uncached", "cached"])
def test_truncation_is_seen_by_reads_and_by_stat(folder: Path, *, is_cached: bool) -> None:
    fault = Fault("data", "truncate", offset=2 * MIB, num_bytes=MIB + 5)
    with mounted(folder, Behaviour(faults=(fault,), is_cached=is_cached)) as mount:
        before = (mount.path / "data").stat()
        assert read(mount.path / "data", num_bytes=4096) == DATA[:4096]
        assert read(mount.path / "data", offset=2 * MIB) == b""
        after = (mount.path / "data").stat()
        assert (before.st_size, after.st_size) == (len(DATA), MIB + 5)
        assert before.st_mtime_ns != after.st_mtime_ns
        assert read(mount.path / "data", is_direct=True) == DATA[: MIB + 5]


def test_direct_opens_may_be_refused(folder: Path) -> None:
    with mounted(folder, Behaviour(takes_direct=False)) as mount:
        with pytest.raises(OSError, match="Invalid argument"):
            read(mount.path / "data", is_direct=True)
        assert read(mount.path / "data") == DATA


# What hangs


def reading(path: Path, num_threads: int, *, into: list[object]) -> list[threading.Thread]:
    """Threads that read, each the whole file, and note what they got, or the errno."""

    def work() -> None:
        try:
            into.append(read(path, is_direct=True))
        except OSError as error:
            into.append(error.errno)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    return threads


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_stalled_reads_wait_for_their_release(folder: Path) -> None:
    found: list[object] = []
    with mounted(folder, Behaviour(faults=(Fault("data", "stall", offset=0, times=None),))) as mount:
        threads = reading(mount.path / "data", 5, into=found)
        mount.wait_stalled(5)
        statistics = mount.statistics()
        assert (found, statistics.num_stalled, statistics.max_in_flight) == ([], 5, 5)
        mount.release()
        join(threads)
        assert mount.statistics().num_stalled == 0
    assert found == [DATA] * 5


def test_many_stalled_reads_do_not_hold_up_others(folder: Path) -> None:
    found: list[object] = []
    with mounted(folder, Behaviour(faults=(Fault("data", "stall", offset=0, times=40),))) as mount:
        threads = reading(mount.path / "data", 40, into=found)
        mount.wait_stalled(40)
        assert read(mount.path / "data", is_direct=True) == DATA
        mount.release()
        join(threads)


def test_stalled_reads_fail_when_the_file_system_goes(folder: Path) -> None:
    found: list[object] = []
    with mounted(folder, Behaviour(faults=(Fault("data", "stall", times=None),))) as mount:
        threads = reading(mount.path / "data", 3, into=found)
        mount.wait_stalled(3)
    join(threads)
    assert found == [errno.ECONNABORTED] * 3


def test_process_with_a_stalled_read_can_be_killed(folder: Path) -> None:
    with mounted(folder, Behaviour(faults=(Fault("data", "stall", times=None),))) as mount:
        process = subprocess.Popen(["cat", str(mount.path / "data")], stdout=subprocess.DEVNULL)
        mount.wait_stalled()
        process.kill()
        assert process.wait(30) == -signal.SIGKILL


# How long it takes


@pytest.mark.parametrize(
    ("speed", "expected"),
    [
        (Speed(), [0.0, 0.0, 10.0]),
        (Speed(latency_s=1.0), [1.0, 1.0, 11.0]),
        (Speed(bytes_per_s=50.0), [2.0, 4.0, 12.0]),
        (Speed(crowd_s=3.0), [0.0, 3.0, 10.0]),
        (Speed(latency_s=1.0, bytes_per_s=50.0, crowd_s=3.0), [3.0, 8.0, 13.0]),
    ],
    ids=["at-once", "latency", "bandwidth", "crowd", "all"],
)
def test_answers_are_due_when_the_line_is_free_and_their_latency_over(speed: Speed, expected: list[float]) -> None:
    """Two requests of 100 bytes at once, and a third long after."""
    line = Line()
    assert [line.due_s(speed, now_s, 100, others) for now_s, others in [(0.0, 0), (0.0, 1), (10.0, 0)]] == expected


def test_slow_reads_are_answered_too(folder: Path) -> None:
    speed = Speed(latency_s=0.001, bytes_per_s=1e9, crowd_s=0.0001)
    with mounted(folder, Behaviour(buffered=speed, direct=speed)) as mount:
        assert read(mount.path / "data") == read(mount.path / "data", is_direct=True) == DATA


# How it ends


def test_it_is_gone_after_an_error(folder: Path) -> None:
    paths: list[Path] = []

    def fail(mount: Mount) -> None:
        paths.append(mount.path)
        raise ArithmeticError

    with pytest.raises(ArithmeticError), mounted(folder) as mount:
        fail(mount)
    assert not paths[0].exists()


def test_it_is_gone_while_a_file_is_open(folder: Path) -> None:
    with mounted(folder) as mount:
        file = (mount.path / "data").open("rb")
    with file, pytest.raises(OSError, match="not connected"):
        file.read()
    assert not mount.path.exists()


def wait_for_mounts(is_over: Callable[[], bool]) -> None:
    """Block until the list of mounts, which tells when it changes, is as wanted."""
    with Path("/proc/self/mounts").open() as file:
        poll = select.poll()
        poll.register(file, select.POLLPRI)
        while not is_over():
            assert poll.poll(30_000), "the list of mounts did not change"


def test_it_goes_with_the_process_that_made_it(folder: Path) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.fakes.filesystem import mounted\n"
        "with mounted(Path(sys.argv[1])) as mount:\n"
        "    print(mount.path, flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        path = process.stdout.readline().strip()
        assert path in mounts()
        process.kill()
        wait_for_mounts(lambda: path not in mounts())


def test_what_cannot_be_mounted_is_an_error_that_leaves_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="cannot mount"), mounted(folder, Behaviour(request_bytes=-1)):
        pass
    assert "cannot mount" in capfd.readouterr().err
