"""What bounded a load, and what to change: one sentence or two from its report, for people. Pure text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

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
#: Words by which a downgrade is known that concerns the reads, or the copies.
_CONCERNS: dict[Bound, tuple[str, ...]] = {"disk": ("direct", "page cache"), "copy": ("page-lock", "ring")}
_ADVICE: dict[Bound, str] = {
    "disk": "`weightstream bench` measures whether storage and memory can do better, and with which settings.",
    "verify": "More cores would hash faster; `prefetch.verify: none` does not hash at all.",
    "consumer": "The loader stood ready: take tensors faster, or let it run ahead further (prefetch.host_memory).",
}
#: What took less of the time than this is not named beside what took most.
_WORTH_A_WORD = 0.1


def _waits(phases: Mapping[str, float]) -> dict[Bound, float]:
    """Return the seconds for each. In "other" nothing was read, copied or placed: it was somebody else's turn."""
    return {
        "disk": phases["disk"],
        "verify": phases.get("verify", 0.0),
        "copy": phases["copy"],
        "consumer": phases["other"],
        "python": phases["preflight"] + phases["bind"],
    }


def find_bound(phases: Mapping[str, float]) -> Bound:
    """Return what a load with these phases waited for most."""
    waits = _waits(phases)
    return max(waits, key=lambda bound: waits[bound])


def explain(report: LoadReport, *, reading: str | None = None) -> str:
    """Say what a load waited for most, and what could be changed.

    Args:
        report: of the load.
        reading: what to say of reading if that is it, by somebody who has measured what the storage can do.
    """
    bound, waits = find_bound(report.phases), _waits(report.phases)
    total = sum(waits.values()) or 1.0
    by_time = sorted(waits, key=lambda name: -waits[name])
    also = [
        f"{waits[name] / total:.0%} for {_NAMES[name]}"
        for name in by_time
        if name != bound and waits[name] > _WORTH_A_WORD * total
    ]
    times = ", ".join([f"{waits[bound] / total:.0%} of the time", *also])
    advice = reading if bound == "disk" and reading is not None else _advice(bound, report)
    downgrades = [said for said in report.fallbacks if any(word in said for word in _CONCERNS.get(bound, ()))]
    noted = f" This had a part in it: {downgrades[0]}." if downgrades else ""
    return f"It waited for {_NAMES[bound]} most: {times}. {advice}{noted}"


def _advice(bound: Bound, report: LoadReport) -> str:
    if bound == "python":
        return (
            f"It checks and places {report.num_tensors:,} tensors, which grows with their number and not with"
            " their bytes; no setting changes it."
        )
    if bound != "copy":
        return _ADVICE[bound]
    if report.device == "cpu":
        return (
            "What is read past the page cache is copied to its place, and so is all that comes from storage for parameters"
            " that have some; with `prefetch.io: buffered`, those on meta are read into without a copy."
        )
    if report.pinned_bytes:
        return "Only fewer bytes, or another bus, would be faster."
    return "They come from memory that is not page-locked: raise the limit for that (ulimit -l), if there is one."
