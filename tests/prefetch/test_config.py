"""The section `prefetch`: units of sizes, limits, and what two sizes must be to each other."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from weightstream.prefetch.config import PrefetchConfig
from weightstream.prefetch.ring import slot_bytes_for

KIB, MIB, GIB = 2**10, 2**20, 2**30


@pytest.mark.parametrize(
    ("value", "num_bytes"),
    [
        pytest.param(2 * MIB, 2 * MIB, id="number"),
        pytest.param("2097152", 2 * MIB, id="number as text"),
        pytest.param("2MiB", 2 * MIB, id="binary unit"),
        pytest.param(" 2 mib ", 2 * MIB, id="spaces and small letters"),
        pytest.param("0.5MiB", MIB // 2, id="half"),
        pytest.param("4096KB", 4_096_000, id="decimal unit"),
    ],
)
def test_sizes_take_units(value: object, num_bytes: int) -> None:
    chunk = PrefetchConfig.model_validate({"chunk": value}).chunk
    assert chunk == num_bytes
    assert type(chunk) is int


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        pytest.param("chunk", "16MiBs", "could not interpret byte unit", id="no unit"),
        pytest.param("chunk", "16 s", "could not interpret byte unit", id="unit of time"),
        pytest.param("chunk", -1, "could not parse value and unit", id="negative chunk"),
        pytest.param("chunk", 60 * KIB, "greater than or equal to 65536", id="chunk too small"),
        pytest.param("chunk", GIB + 4 * KIB, "less than or equal to 1073741824", id="chunk too large"),
        pytest.param("chunk", MIB + 1, "a multiple of 4KiB, found 1048577 bytes", id="chunk of odd size"),
        pytest.param("workers", 0, "greater than or equal to 1", id="no workers"),
        pytest.param("workers", 257, "less than or equal to 256", id="too many workers"),
        pytest.param("workers", "many", "auto", id="workers in words"),
        pytest.param("retries", -1, "greater than or equal to 0", id="negative retries"),
        pytest.param("retries", 101, "less than or equal to 100", id="too many retries"),
        pytest.param("io", "mmap", "'buffered' or 'direct'", id="unknown io"),
        pytest.param("cunk", 1, "Extra inputs are not permitted", id="unknown field"),
    ],
)
def test_value_out_of_range_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PrefetchConfig.model_validate({field: value})


@pytest.mark.parametrize(
    "values",
    [{"chunk": 64 * KIB}, {"chunk": GIB, "host_memory": "3GiB"}, {"workers": 256}, {"retries": 0}, {"retries": 100}],
    ids=str,
)
def test_limits_themselves_are_accepted(values: dict[str, Any]) -> None:
    assert PrefetchConfig.model_validate(values).model_fields_set == set(values)


def test_host_memory_must_hold_two_slots() -> None:
    need = 2 * slot_bytes_for(MIB)
    assert PrefetchConfig(chunk=MIB, host_memory=need).host_memory == need
    with pytest.raises(ValidationError, match=rf"two slots of one chunk each \({need} bytes\), found {need - 1}"):
        PrefetchConfig(chunk=MIB, host_memory=need - 1)


def test_section_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PrefetchConfig().retries = 1
