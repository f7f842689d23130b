from __future__ import annotations

from typing import Any

import pytest

from benchmarks.growth import growth_of, growth_tables
from benchmarks.summary import summarise
from benchmarks.tables import ceiling_of, comparison, rows_of, seconds, table

LARGE = {"name": "large", "count": 200}


def result(wall_s: float, *, first_read_s: float | None = 0.0, filled: bool = True, **report: int) -> dict[str, Any]:
    found: dict[str, Any] = {"wall_s": wall_s, "cpu_s": wall_s, "peak_bytes": 2**20, "num_bytes": 2**24 * 10}
    found["report"] = report
    if first_read_s is not None:
        found |= {"first_read_s": first_read_s, "filled": filled, "num_checked": 200}
    return found


def series(arm: str, *results: dict[str, Any], group: str = "peer", reason: str | None = None) -> dict[str, Any]:
    return {
        "arm": arm,
        "title": f"title of {arm}",
        "group": group,
        "begins": "meta",
        "checkpoint": LARGE,
        "cache": "warm",
        "reason": reason,
        "results": list(results),
    }


def ceiling(arm: str, *walls: float) -> dict[str, Any]:
    return series(arm, *(result(wall, first_read_s=None) for wall in walls), group="ceiling")


def cells(text: str, title: str) -> dict[str, str]:
    """The row of a table that begins with a title, by the names of its columns."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    row = next(line for line in lines if title in line[0])
    return dict(zip(lines[0], row, strict=True))


def compared(*found: dict[str, Any], gpu: str | None = None) -> str:
    return comparison({"machine": {"gpu": gpu}, "series": list(found)})


def test_ratio_of_medians_is_given_for_the_load_and_with_the_first_read() -> None:
    ours = series("ws-stream", result(1.0), result(2.0), result(9.0), group="weightstream")
    lazy = series("load-file", result(1.0, first_read_s=5.0, filled=False))
    row = cells(compared(ours, lazy), "load-file")
    assert (row["load s"], row["filled"], row["x stream"]) == ("1.00 (1.00 to 1.00)", "no", "0.50 / 3.00")


def test_share_of_the_ceiling_counts_what_only_maps_with_its_first_read() -> None:
    lazy = series("load-file", result(1.0, first_read_s=3.0, filled=False))
    ours = series("ws-stream", result(2.5), group="weightstream")
    text = compared(ours, lazy, ceiling("buffered-1", 4.0), ceiling("buffered-2", 2.0))
    assert cells(text, "load-file")["of the ceiling"] == "50%"
    assert cells(text, "ws-stream")["of the ceiling"] == "80%"


def test_ceiling_is_the_best_reader() -> None:
    found = ceiling_of(rows_of([ceiling("buffered-1", 3.0, 3.0), ceiling("direct-4", 1.0, 2.0)]))
    assert found == summarise([1.0, 2.0])


def test_ceiling_on_a_device_is_the_slower_of_reading_and_copying() -> None:
    found = ceiling_of(rows_of([ceiling("buffered-1", 3.0), ceiling("buffered-8", 1.0), ceiling("copy", 2.0)]))
    assert found == summarise([2.0])


def test_without_readers_there_is_no_ceiling() -> None:
    assert ceiling_of(rows_of([series("load-file", result(1.0))])) is None


def test_what_was_not_measured_is_listed_with_its_reason() -> None:
    text = compared(series("ws-stream", result(1.0)), series("runai", reason="runai-model-streamer is not installed"))
    assert "- title of runai (`runai`): runai-model-streamer is not installed" in text


def test_imports_within_a_clock_are_named() -> None:
    text = compared(
        series("accelerate", result(1.0) | {"num_imports": 5}), series("late", result(1.0) | {"num_imports": 480})
    )
    assert text.count("modules\n") == 1
    assert "- title of late (`late`): 480 modules" in text


def test_on_a_device_copies_are_counted_for_each_chunk() -> None:
    ours = series("ws-stream", result(1.0, num_copies=15), group="weightstream")
    assert cells(compared(ours, gpu="a card"), "ws-stream")["copies / chunk"] == "1.50"


def test_seconds_below_one_have_milliseconds() -> None:
    assert seconds(summarise([0.1234, 0.5])) == "0.312 (0.123 to 0.500)"
    assert seconds(None) == ""


def test_table_is_markdown() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_growth_finds_linear_cost_and_constant_staging_memory() -> None:
    found: list[dict[str, Any]] = []
    for count in (1_000, 10_000, 100_000):
        for arm in ("ws-stream", "ws-staged"):
            loaded = result(count / 50_000, num_tensors=count, num_bytes=count * 4096, host_peak_bytes=64 * 2**20)
            one = series(arm, loaded)
            found.append(one | {"checkpoint": {"name": "tensors", "count": count}})
    (growth,) = growth_of(found)
    assert growth.power is not None
    assert (growth.line.slope, growth.power.slope) == pytest.approx((1 / 50_000, 1))
    assert {point.staging_bytes for point in growth.points} == {64 * 2**20}
    assert cells(growth_tables([growth]), "100,000")["us / tensor"] == "20.0"
