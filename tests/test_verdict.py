"""What bench says about its figures: which ceiling a load has, how near it comes, and what would help."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console

from tests.cli.test_summary import REPORT
from weightstream.outputs import Kind, Sample
from weightstream.verdict import Findings, Row, print_findings

GB = 10**9


def row(kind: Kind, gb_per_s: float, num_threads: int | None = None) -> Row:
    return Row(kind, num_threads, (Sample(60 * GB, 60 / gb_per_s, 1.0, None),))


def load(gb_per_s: float, kind: Kind = "load cached", **changes: Any) -> Row:
    report = dataclasses.replace(REPORT, **changes)
    return Row(kind, None, (Sample(60 * GB, 60 / gb_per_s, 2.0, GB, report),))


def findings(*rows: Row, io: str = "buffered", workers: int | str = "auto", device: str = "cuda:0") -> Findings:
    return Findings("/models/some", 60 * GB, 18_867, 16, device, io, workers, rows, ("something is odd",))


READING = {"preflight": 0.1, "disk": 9.0, "copy": 0.0, "bind": 0.0, "other": 0.0}
COPYING = {"preflight": 0.1, "disk": 2.0, "copy": 9.0, "bind": 0.0, "other": 0.0}
WORKING = {"preflight": 4.0, "disk": 2.0, "copy": 0.0, "bind": 3.9, "other": 0.1}


@pytest.mark.parametrize(
    ("kind", "reads", "copies", "expected"),
    [
        ("load cached", {"read cached": 8, "read direct": 3, "read cold": 99}, 50, "read cached"),
        ("load cold", {"read cached": 99, "read direct": 3, "read cold": 2}, 50, "read direct"),
        ("load cold", {"read cached": 99, "read direct": 1, "read cold": 2}, 50, "read cold"),
        ("load cached", {"read cached": 60, "read direct": 3}, 50, "copy"),
        ("load cold", {"read cached": 9}, 50, "read cached"),
    ],
    ids=["cached", "cold-direct", "cold-buffered", "copies", "nothing-else"],
)
def test_ceiling_is_the_fastest_read_that_fits_or_slower_copies(
    kind: Kind, reads: dict[Kind, float], copies: float, expected: str
) -> None:
    one = load(1.0, kind)
    found = findings(*(row(name, rate) for name, rate in reads.items()), row("copy", copies), one)
    assert found.ceiling(one).kind == expected
    assert found.share(one) == pytest.approx(1.0 / min(copies, dict(reads).get(found.fastest_read(one).kind, 0)))


def test_median_of_an_even_number_of_runs_is_one_of_them() -> None:
    samples = tuple(Sample(GB, wall_s, 0.0, None) for wall_s in (4.0, 1.0, 3.0, 2.0))
    assert Row("copy", None, samples).median.wall_s == 2.0
    assert Row("copy", None, samples[:3]).median.wall_s == 3.0


@pytest.mark.parametrize(
    ("rate", "changes", "settings", "expected"),
    [
        (
            1.9,
            {"phases": READING},
            {},
            "99% of the time: that is close to what this machine can do, and only faster memory",
        ),
        (1.0, {"phases": READING}, {}, "raw reads reach 2.00 GB/s with 2 threads; no setting stands out;"),
        (1.0, {"phases": READING}, {"workers": 1}, "`read, cached, 2 threads`, so try prefetch.workers: 2;"),
        (1.0, {"phases": READING}, {"io": "direct"}, "`read, cached, 2 threads`, so try prefetch.io: buffered;"),
        (1.0, {"phases": READING}, {"io": "auto"}, "no setting stands out"),
        (
            1.0,
            {"phases": WORKING, "num_tensors": 900_000},
            {},
            "80% of the time (20% for reading): it checks and places 900,000 tensors, 9 µs each",
        ),
        (1.0, {"phases": COPYING}, {}, "81% of the time (18% for reading): only fewer bytes, or another bus"),
        (1.0, {"phases": COPYING, "pinned_bytes": 0}, {}, "raise the limit for that (ulimit -l"),
        (1.0, {"phases": COPYING, "device": "cpu"}, {"device": "cpu"}, "those on meta are read into without a copy"),
    ],
    ids=["near", "far", "workers", "buffered", "auto", "python", "copies", "not-locked", "copies-on-cpu"],
)
def test_sentence_says_what_it_waited_for_and_what_would_help(
    rate: float, changes: dict[str, Any], settings: dict[str, Any], expected: str
) -> None:
    one = load(rate, **changes)
    found = findings(
        row("read cached", 1.8, 1), row("read cached", 2.0, 2), row("read direct", 1.0, 1), one, **settings
    )
    assert expected in found.bound(one)


def test_direct_reads_are_worth_a_word_if_they_are_faster() -> None:
    one = load(1.0, "load cold", phases=READING)
    faster = findings(row("read cold", 2.0, 2), row("read direct", 2.5, 2), one)
    assert "`read, O_DIRECT, 2 threads`, so try prefetch.io: direct;" in faster.bound(one)
    alike = findings(row("read cold", 2.0, 2), row("read direct", 2.1, 2), one)
    assert "no setting stands out" in alike.bound(one)
    near = load(2.4, "load cold", phases=READING)
    assert "only faster storage would help" in findings(row("read direct", 2.5, 2), near).bound(near)


def test_table_fits_80_columns() -> None:
    file = io.StringIO()
    one = load(0.125)
    found = findings(row("read direct", 0.2, 8), row("read cached", 1.8, 16), row("copy", 53.25), one)
    print_findings(Console(file=file, width=80, force_terminal=True, color_system=None), found)
    lines = file.getvalue().splitlines()
    assert lines[1:7] == [
        "Ceilings, and loads as shares of theirs (medians)",
        "                                s    min-max       rate  share  CPU s   memory",
        "  read, O_DIRECT, 8 threads   300    300-300   200 MB/s          1.00  unknown",
        "  read, cached, 16 threads   33.3  33.3-33.3  1.80 GB/s          1.00  unknown",
        "  copy, page-locked          1.13  1.13-1.13  53.2 GB/s          1.00  unknown",
        "  weightstream, cached        480    480-480   125 MB/s     7%   2.00  1.00 GB",
    ]
    assert max(map(len, lines)) <= 80
    assert "  note          direct I/O refused by the file system: buffered reads used" in lines
    assert lines[-1] == "  note          something is odd"


def test_mapped_load_has_no_rate_and_no_share() -> None:
    report = dataclasses.replace(REPORT, strategy="map", device="cpu", phases=WORKING, mapped_bytes=REPORT.num_bytes)
    mapped = Row("load cached", None, (Sample(0, 0.02, 0.02, 0, report),))
    found = findings(row("read cached", 2.0, 2), mapped, device="cpu")
    file = io.StringIO()
    print_findings(Console(file=file, width=80, color_system=None), found)
    lines = file.getvalue().splitlines()
    assert any(line.split()[:5] == ["weightstream,", "cached", "0.020", "0.020-0.020", "mapped"] for line in lines)
    assert "weightstream, cached: 61.1 GB mapped, nothing read or copied" in lines
    assert found.printed().rows[-1].share_of_ceiling is None
