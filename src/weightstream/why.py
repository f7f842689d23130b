"""What bounded a load, and what to change: one sentence from its report, for people. Pure text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from weightstream.prefetch.memory import usable_cores

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightstream.scheduler.report import LoadReport

__all__ = ["Bound", "explain", "find_bound"]

#: What a load can wait for most. `consumer`: whoever takes tensors from a stream; `python`: checking and placing them.
Bound = Literal["disk", "verify", "copy", "consumer", "python"]

_NAMES: dict[Bound, str] = {
    "disk": "reading",
    "verify": "hashing",
    "copy": "copies",
    "consumer": "whoever takes the tensors",
    "python": "work in Python",
}
#: Parts of the sentences about downgrades (`LoadReport.fallbacks`) that make reads, copies or Python's work slower.
_CONCERNS: dict[Bound, tuple[str, ...]] = {
    "disk": ("direct I/O", "direct reads", "slots", "that is the limit now"),
    "copy": ("page-locking", "slots", "that is the limit now"),
    "python": ("through hooks of their own",),
}
#: What took less of the time than this is not named beside what took most.
_WORTH_A_WORD = 0.1
#: What concerns more of the bytes than this is what most of the time went into.
_MOST = 0.5
#: With more than this for each tensor, it is not their number that takes the time: 46,000 take 5 to 10 µs each here.
_MANY_S = 100e-6
#: What takes no longer than this is what any load takes to start: 4 to 6 ms here, and 30 where Python has just begun.
_START_S = 0.1


def _waits(phases: Mapping[str, float]) -> dict[Bound, float]:
    """Return the seconds for each. In "other" nothing was read, copied or placed: the load's own thread had its turn."""
    return {
        "disk": phases["disk"],
        "verify": phases.get("verify", 0.0),
        "copy": phases["copy"],
        "consumer": phases.get("consumer", 0.0),
        "python": phases["preflight"] + phases["bind"] + phases["other"],
    }


def find_bound(phases: Mapping[str, float]) -> Bound:
    """Return what a load with these phases waited for most."""
    waits = _waits(phases)
    return max(waits, key=lambda bound: waits[bound])


def explain(report: LoadReport, *, reading: str | None = None, num_cores: int | None = None) -> str:
    """Say in one sentence what a load waited for most, and what could be changed.

    Args:
        report: of the load.
        reading: what to say of reading if that is it, by somebody who has measured what the storage can do; a part of a
            sentence, like all that follows the colon.
        num_cores: how many it could use; None: as many as this process can now.
    """
    bound, waits = find_bound(report.phases), _waits(report.phases)
    total = sum(waits.values()) or 1.0
    by_time = sorted(waits, key=lambda name: -waits[name])
    also = [
        f"{waits[name] / total:.0%} for {_NAMES[name]}"
        for name in by_time
        if name != bound and waits[name] > _WORTH_A_WORD * total
    ]
    times = f"{waits[bound] / total:.0%} of the time" + (f" ({', '.join(also)})" if also else "")
    if bound == "disk":
        advice = reading or _on_reading(report, num_cores or usable_cores())
    elif bound == "verify":
        advice = _on_hashing(report, num_cores or usable_cores())
    elif bound == "copy":
        advice = _on_copies(report)
    elif bound == "consumer":
        advice = (
            "the loader stood ready, as far ahead as prefetch.host_memory lets it; take the tensors faster, or, if that is"
            " slow only now and then, let it run ahead further"
        )
    else:
        advice = _on_python(report, waits["python"])
    concerns = _CONCERNS.get(bound, ())
    downgrades = [said for said in report.fallbacks if any(words in said for words in concerns)]
    noted = [f"this had a part in it: {said}" for said in downgrades[:1]]
    if report.num_retries and bound in ("disk", "python"):
        noted.append(f"reads failed and were repeated, {report.num_retries} in all: look into the system's log")
    return f"It waited for {_NAMES[bound]} most, {times}: {'; '.join([advice, *noted])}."


def _on_reading(report: LoadReport, num_cores: int) -> str:
    if said := _in_turn(report):
        return said
    found = " ".join(report.decisions)
    if narrow := re.search(r"ring: it has (\d+) slots, which is too few for (\d+) reads", found):
        return (
            f"there was room for {narrow[1]} chunks at a time, and {narrow[2]} reads wanted some; raise"
            " prefetch.host_memory, or make prefetch.chunk smaller"
        )
    cached = re.search(r"page cache: (\d+) of (\d+) chunks", found)
    if cached and cached[1] == cached[2]:
        return _on_cached_reading(report, "everything was in the page cache")
    if cached and report.cached_read_s > report.storage_read_s:
        spent = f"{report.cached_read_s / (report.cached_read_s + report.storage_read_s):.0%}"
        had = f"{cached[1]} of {cached[2]} chunks were in the page cache, and readers spent {spent} of their time on these"
        return _on_cached_reading(report, had)
    return _on_storage(report, found, num_cores)


def _on_storage(report: LoadReport, found: str, num_cores: int) -> str:
    how = re.search(r"read in the end: (.*?(\d+) workers.*?MiB)", found)
    if how and report.storage_cpu_s > _MOST * report.phases["disk"] * min(num_cores, int(how[2])):
        return (
            f"what was not in the page cache came from storage ({how[1]}), and kept the cores busy for"
            f" {report.storage_cpu_s:.2f} s with the kernel's copies, so this is memory's speed, and not the storage's; more"
            " cores would help, and, past the page cache, `prefetch.io: direct` may"
        )
    came = "what was not in the page cache came from storage" + (f" ({how[1]})" if how else "")
    if any("page cache is unknown" in said for said in report.fallbacks):
        came = f"how much the page cache had is not known here; {came}"
    if network := re.search(r"come over a network \((.*?)\)", found):
        came = f"{came}, over a network ({network[1]}); a copy on a disk of this machine would be nearer"
    if report.device == "page-cache":
        return f"{came}; the next load finds it there"
    return (
        f"{came}; `weightstream bench --cold` measures what the storage can do, and with which settings, and after"
        " `weightstream warm --to page-cache`, where memory has room for the files, a load need not wait for it"
    )


def _on_cached_reading(report: LoadReport, had: str) -> str:
    if report.device == "page-cache":
        return f"{had}, so there was little to warm"
    if report.device == "cpu":
        return (
            f"{had}, so this is memory's speed, and that of the kernel that finds new memory for the weights; `strategy: map`"
            " copies nothing, where parameters are on meta and nothing is cast"
        )
    return f"{had}, so this is memory's speed; more cores, or faster memory, would help"


def _on_hashing(report: LoadReport, num_cores: int) -> str:
    rate = f" {report.num_bytes / report.hash_s / 1e9:.1f} GB/s" if report.hash_s else ""
    if num_cores == 1:
        side_by_side = "there is one core, and with more, shards are hashed side by side"
    elif report.num_shards == 1:
        side_by_side = "there is one shard, and of a checkpoint with several, up to eight are hashed side by side"
    else:
        side_by_side = "with more cores, more shards are hashed side by side, up to eight"
    return (
        f"a core hashes one shard at a time, from its first byte to its last, and does{rate} here; {side_by_side};"
        " `prefetch.verify: none` does not hash, and `weightstream verify` does it once, before"
    )


def _on_copies(report: LoadReport) -> str:
    if said := _in_turn(report):
        return said
    if report.device == "cpu":
        return _on_host_copies(report)
    if not report.pinned_bytes:
        return (
            "they come from memory that is not page-locked, which is slower; raise the limit for that (ulimit -l, or"
            " --ulimit memlock=-1 of a container), if there is one"
        )
    if waited := re.search(r"page-locking: copies waited (\S+) s", " ".join(report.decisions)):
        return (
            f"for {waited[1]} s of these they waited until memory was page-locked, which a `Loader` that is kept does once,"
            " for all of its loads"
        )
    return "only fewer bytes, or another bus, would be faster"


def _on_host_copies(report: LoadReport) -> str:
    if report.cast_bytes > _MOST * report.num_bytes:
        share = f"{report.cast_bytes / report.num_bytes:.0%}"
        return (
            f"{share} of the bytes were cast to another dtype on the way (in the end it is {report.dtype}), by this machine's"
            " cores; a checkpoint that is saved once in the dtype of the model, or a model in that of the checkpoint, needs"
            " no casts"
        )
    if "read in the end: direct" in " ".join(report.decisions):
        return (
            "what was read past the page cache was copied to its place by the readers, which took more of their time than"
            " reading did, so this is memory's speed; more cores would help, and `prefetch.io: buffered`, which leaves the"
            " copy to the kernel, may"
        )
    return (
        "what comes from storage for parameters that have storage of their own is copied to them when it has been read; those"
        " on meta are read into without a copy"
    )


def _in_turn(report: LoadReport) -> str | None:
    """Return what to say where reads and copies did not go on at once, although there were both."""
    if report.overlap or not report.num_copies:
        return None
    if report.strategy == "preload":
        return "`preload` copies nothing before it has read everything; with `strategy: stream` both go on at once"
    if report.strategy == "direct":
        return (
            "`direct` has room for one chunk, which is read, and then copied; with room for two (prefetch.host_memory) and"
            " `strategy: stream` both go on at once"
        )
    return None


def _on_python(report: LoadReport, spent_s: float) -> str:
    phases = report.phases
    if spent_s <= _MANY_S * report.num_tensors:
        each = f"{spent_s / report.num_tensors * 1e6:.0f} µs each"
        advice = (
            f"it checks and places {report.num_tensors:,} tensors, {each}, which grows with their number and not with their"
            " bytes; no setting changes it, only fewer and larger tensors would"
        )
    elif spent_s <= _START_S:
        advice = (
            f"these {spent_s * 1e3:.0f} ms are what any load takes to start, to check files and model, and to end, however"
            " small it is, so there is nothing to gain"
        )
    elif phases["preflight"] >= phases["bind"] + phases["other"]:
        advice = (
            f"that is long for {report.num_tensors:,} tensors; files were opened and their headers read, {report.num_shards}"
            " in all, and storage that answers slowly, or a busy machine, makes that long; fewer and larger files help"
        )
    else:
        advice = (
            f"that is long for {report.num_tensors:,} tensors; what ties compare, hooks do, and modules that load themselves"
            " copy comes after the last byte, and a busy machine makes all of it long"
        )
    if report.strategy == "map":
        advice += "; the files are mapped, and what was not in the page cache is still to come, when it is used"
    return advice
