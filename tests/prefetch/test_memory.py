"""Host memory: what kind it is, who holds how much, and how much there is."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import re
import threading
from pathlib import Path

import psutil
import pytest

from weightstream.prefetch.memory import Budget, MemoryAccount, allocate, available_bytes, usable_cores

MIB = 2**20


def mapping_of(memory: mmap.mmap) -> tuple[str, set[str]]:
    """The permissions and the VmFlags of the kernel's mapping that holds `memory`."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    gc.collect()  # the ctypes object, which keeps the mapping from being closed
    permissions = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ", line)
        if bounds:
            permissions = bounds[3] if int(bounds[1], 16) <= address < int(bounds[2], 16) else ""
        elif permissions and line.startswith("VmFlags:"):
            return permissions, set(line.split()[1:])
    raise AssertionError("no such mapping")


# allocate


def test_memory_is_private_zeroed_and_as_large_as_asked_for() -> None:
    memory = allocate(3 * MIB + 4096)
    assert len(memory) == 3 * MIB + 4096
    assert memory[:] == bytes(3 * MIB + 4096)
    permissions, _ = mapping_of(memory)
    assert permissions == "rw-p"


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="kernel without huge pages")
def test_memory_is_advised_to_use_huge_pages() -> None:
    _, flags = mapping_of(allocate(4 * MIB))
    assert "hg" in flags


def test_kernel_without_huge_pages_gives_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)  # an advice that the kernel does not know: EINVAL
    assert len(allocate(4096)) == 4096


def test_platform_without_the_advice_gives_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert len(allocate(4096)) == 4096


def test_memory_goes_with_its_last_reference() -> None:
    memory = allocate(MIB)
    view = memoryview(memory)
    del memory
    view[:4] = b"abcd"
    assert bytes(view[:5]) == b"abcd\0"


# MemoryAccount


def test_peak_is_the_most_that_was_held_while_it_was_watched() -> None:
    account = MemoryAccount()
    account.hold(100)
    account.release(60)
    with account.watch() as peak:
        assert peak.value == 40
        account.hold(30)
        account.release(20)
        account.hold(15)
    account.hold(1000)
    assert (peak.value, account.held_bytes) == (70, 1065)


def test_each_watcher_has_its_own_peak() -> None:
    account = MemoryAccount()
    with account.watch() as outer:
        account.hold(10)
        account.release(10)
        with account.watch() as inner:
            account.hold(3)
    assert (outer.value, inner.value) == (10, 3)


def test_watch_ends_when_its_context_fails() -> None:
    account = MemoryAccount()
    with pytest.raises(KeyError), account.watch() as peak:
        raise KeyError
    account.hold(10)
    assert peak.value == 0


# Budget


def test_budget_gives_what_is_left_and_not_a_byte_more() -> None:
    budget = Budget(100)
    assert budget.take(60)
    assert not budget.take(41)
    assert budget.left_bytes == 40
    assert budget.take(40)
    assert not budget.take(1)
    budget.give(60)
    assert budget.take(60)
    assert budget.left_bytes == 0


def test_budget_is_never_exceeded_by_takers_on_many_threads() -> None:
    budget = Budget(1000)
    start = threading.Barrier(8)
    taken: list[int] = []

    def take() -> None:
        start.wait()
        taken.append(sum(budget.take(1) for _ in range(500)))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sum(taken), budget.left_bytes) == (1000, 0)


# available_bytes


def write_cgroup(folder: Path, version: int, *, limit: str, usage: str, stat: str) -> Path:
    """The memory controller's files, as a container sees them."""
    place = folder if version == 2 else folder / "memory"
    place.mkdir(exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, text in zip((*names, "memory.stat"), (limit, usage, stat), strict=True):
        (place / name).write_text(text)
    return folder


STAT = {
    2: "anon 30\nfile 25\ninactive_file {}\nactive_file 5\n",
    1: "cache 9\ninactive_file 1\ntotal_inactive_file {}\n",
}


@pytest.mark.parametrize("version", [1, 2], ids=["v1", "v2"])
def test_limit_of_the_cgroup_counts_without_its_page_cache(tmp_path: Path, version: int) -> None:
    write_cgroup(tmp_path, version, limit=f"{100 * MIB}\n", usage=f"{40 * MIB}\n", stat=STAT[version].format(10 * MIB))
    assert available_bytes(cgroup=tmp_path) == 70 * MIB


@pytest.mark.parametrize("version", [1, 2], ids=["v1", "v2"])
def test_cgroup_above_its_limit_has_nothing_left(tmp_path: Path, version: int) -> None:
    write_cgroup(tmp_path, version, limit="100", usage="500", stat=STAT[version].format(10))
    assert available_bytes(cgroup=tmp_path) == 0


def test_less_of_machine_and_cgroup_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()._replace(available=50 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    write_cgroup(tmp_path, 2, limit=str(100 * MIB), usage="0", stat="")
    assert available_bytes(cgroup=tmp_path) == 50 * MIB


@pytest.mark.parametrize(
    ("limit", "usage", "stat"),
    [
        pytest.param("max", "1", "", id="no limit"),
        pytest.param(str(2**63 - 4096), "4096", "", id="no limit, as v1 says it"),
        pytest.param("", "1", "", id="empty file"),
        pytest.param("many", "1", "", id="nonsense"),
        pytest.param("100", "1", "a b c", id="statistics of another form"),
    ],
)
@pytest.mark.parametrize("version", [1, 2], ids=["v1", "v2"])
def test_cgroup_that_says_nothing_leaves_the_machine_s_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, limit: str, usage: str, stat: str
) -> None:
    memory = psutil.virtual_memory()._replace(available=50 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    write_cgroup(tmp_path, version, limit=limit, usage=usage, stat=stat)
    assert available_bytes(cgroup=tmp_path) == 50 * MIB


def write_groups(tmp_path: Path, version: int, line: str, groups: dict[str, int]) -> tuple[Path, Path]:
    """A mount with groups and what is left in each; and the file that says which one this process is in."""
    for path, left in groups.items():
        place = tmp_path / "mount" / ("memory" if version == 1 else "") / path
        place.mkdir(parents=True, exist_ok=True)
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        for name, text in zip((*names, "memory.stat"), (str(left + 10), "30", STAT[version].format(20)), strict=True):
            (place / name).write_text(text)
    membership = tmp_path / "membership"
    membership.write_text(f"9:name=systemd:/x\n3:cpu,memory:/a:c/b\n{line}\n" if version == 1 else f"{line}\n")
    return tmp_path / "mount", membership


@pytest.mark.parametrize("tightest", ["", "a:c", "a:c/b"], ids=["root", "parent", "own"])
@pytest.mark.parametrize("version", [1, 2], ids=["v1", "v2"])
def test_least_of_the_own_group_and_those_above_counts(tmp_path: Path, version: int, tightest: str) -> None:
    groups = {"": 9 * MIB, "a:c": 9 * MIB, "a:c/b": 9 * MIB, "other": MIB} | {tightest: 5 * MIB}
    mount, membership = write_groups(tmp_path, version, "0::/" if version == 1 else "0::/a:c/b", groups)
    assert available_bytes(cgroup=mount, membership=membership) == 5 * MIB


def test_group_without_a_limit_leaves_that_of_its_parent(tmp_path: Path) -> None:
    mount, membership = write_groups(tmp_path, 2, "0::/a/b", {"a": 5 * MIB, "a/b": MIB})
    (mount / "a" / "b" / "memory.max").write_text("max\n")
    assert available_bytes(cgroup=mount, membership=membership) == 5 * MIB


@pytest.mark.parametrize("line", ["0::/docker/0123", "0::/../../other", "nonsense", ""])
def test_group_that_is_not_below_the_mount_leaves_the_mount_s_root(tmp_path: Path, line: str) -> None:
    """As in a container, whose path is told as the host knows it."""
    mount, membership = write_groups(tmp_path, 2, line, {"": 5 * MIB, "../other": MIB})
    assert available_bytes(cgroup=mount, membership=membership) == 5 * MIB


def test_machine_without_cgroups_is_no_problem(tmp_path: Path) -> None:
    assert available_bytes(cgroup=tmp_path / "none") > 0


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 7})
    assert usable_cores() == 3


def test_memory_asks_for_the_node_that_was_named() -> None:
    if not Path("/sys/devices/system/node/node0").exists():
        pytest.skip("the kernel knows no memory nodes")
    block = allocate(2**22, numa_node=0)
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    policies = dict(line.split()[:2] for line in Path("/proc/self/numa_maps").read_text().splitlines())
    assert policies[f"{address:08x}"] == "prefer:0"
