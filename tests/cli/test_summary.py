"""What people read about a load, on a wide terminal, a narrow one, and none."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from weightstream.scheduler.report import LoadReport
from weightstream.summary import print_facts, print_report, shell_path
from weightstream.why import explain

REPORT = LoadReport(
    checkpoint="/models/some/model.safetensors.index.json",
    strategy="stream",
    reason="the accelerator has room",
    device="cuda:0",
    dtype="bfloat16",
    num_tensors=18_867,
    num_shards=16,
    num_bytes=61_064_000_000,
    wall_s=8.0,
    throughput_bytes_per_s=7_633_000_000.0,
    phases={"preflight": 0.4, "disk": 6.4, "copy": 0.8, "bind": 0.4, "other": 0.0},
    overlap=0.97,
    host_peak_bytes=1_073_741_824,
    pinned_bytes=1_073_741_824,
    device_peak_bytes=61_100_000_000,
    num_copies=4_321,
    num_retries=2,
    decisions=("page cache: 0 of 3,700 chunks are in it and are read from there",),
    fallbacks=("direct I/O refused by the file system: buffered reads used instead",),
    missing_keys=(),
    unexpected_keys=tuple(f"extra.{number}" for number in range(7)),
    verified="none",
    read_bytes=61_064_000_000,
)


def printed(report: LoadReport, *, width: int = 100, terminal: bool = False) -> list[str]:
    file = io.StringIO()
    print_report(Console(file=file, width=width, force_terminal=terminal, color_system=None), report)
    return file.getvalue().splitlines()


def test_everything_that_matters_is_said() -> None:
    assert printed(REPORT) == [
        "Loaded 61.1 GB, 18,867 tensors in 16 shards, onto cuda:0 in 8.00 s: 7.63 GB/s",
        "  checkpoint    /models/some/model.safetensors.index.json",
        "  strategy      stream: the accelerator has room",
        "  dtype         bfloat16",
        "  overlap       97% of the less busy stage's time, reads and copies went on at once",
        "  copies        4,321",
        "  host memory   1.07 GB at most (ring), 1.07 GB page-locked",
        "  device memory 61.1 GB at most",
        "  reads         page cache: 0 of 3,700 chunks are in it and are read from there",
        "  retries       2 reads were repeated",
        "  unexpected    7 tensors: extra.0, extra.1, extra.2, extra.3, extra.4, ...",
        "  note          direct I/O refused by the file system: buffered reads used instead",
        f"  why so long   {explain(REPORT)}",
        "",
        "Where the time went",
        f"  preflight     {'█' * 2:<36}   0.400 s   5.0%",
        f"  disk          {'█' * 29:<36}   6.400 s  80.0%",
        f"  copy          {'█' * 4:<36}   0.800 s  10.0%",
        f"  bind          {'█' * 2:<36}   0.400 s   5.0%",
        f"  other         {'':<36}   0.000 s   0.0%",
    ]


def test_lines_fit_a_narrow_terminal_and_paths_stay_whole() -> None:
    lines = printed(REPORT, width=44, terminal=True)
    assert [line for line in lines if len(line) > 44] == ["  checkpoint    /models/some/model.safetensors.index.json"]
    note = next(number for number, line in enumerate(lines) if line.startswith("  note "))
    assert [line.strip() for line in lines[note + 1 : note + 3]] == ["file system: buffered reads", "used instead"]


def test_bars_can_be_written_in_ascii() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_report(Console(file=file, width=80, color_system=None), REPORT)
    file.seek(0)
    assert "  bind          ##" in file.read()


def test_load_without_copies_says_that_none_were_needed() -> None:
    report = dataclasses.replace(REPORT, device="cpu", num_copies=0, device_peak_bytes=0, unexpected_keys=())
    lines = printed(report)
    assert "  overlap       none needed: reads landed in the weights themselves, without a copy" in lines
    assert "  host memory   1.07 GB at most (ring and weights), 1.07 GB page-locked" in lines
    assert not any(line.startswith(("  copies", "  device", "  unexpected")) for line in lines)


@pytest.mark.parametrize(
    ("mapped", "first"),
    [
        (61_064_000_000, "Mapped 61.1 GB, 18,867 tensors in 16 shards, onto cpu in 8.00 s"),
        (
            60_064_000_000,
            "Loaded 61.1 GB, 18,867 tensors in 16 shards, onto cpu in 8.00 s; 60.1 GB mapped, 1.00 GB read",
        ),
    ],
)
def test_what_is_mapped_is_not_said_to_be_read(mapped: int, first: str) -> None:
    read = REPORT.num_bytes - mapped
    report = dataclasses.replace(
        REPORT, strategy="map", device="cpu", num_copies=0, mapped_bytes=mapped, read_bytes=read
    )
    lines = printed(report)
    assert lines[0] == first
    assert any(line.startswith("  overlap") for line in lines) == bool(read)


@pytest.mark.parametrize("text", ["[bold]no markup[/bold]", "8 [cyan]"])
def test_names_are_not_taken_for_markup(text: str) -> None:
    file = io.StringIO()
    print_facts(Console(file=file, width=30, force_terminal=True, color_system=None), [("label", f"{text} {text}")])
    assert " ".join(file.getvalue().split()) == f"label {text} {text}"


def test_paths_are_quoted_for_a_shell() -> None:
    assert shell_path("/a b/c") == "'/a b/c'"
