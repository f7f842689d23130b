"""The schemas in the documentation are those that the command prints, and those that its output obeys."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import TypeAdapter

from tests.cli.conftest import Run
from weightstream import LoadReport

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("of", ["config", "report"])
def test_documented_schema_is_the_printed_one(weightstream: Run, of: str) -> None:
    assert weightstream("schema", of).out == (DOCS / f"{of}.schema.json").read_text()


def test_report_of_warm_obeys_the_schema(weightstream: Run, config: Path) -> None:
    result = weightstream("warm", config, "--json", "--quiet")
    report = TypeAdapter(LoadReport).validate_json(result.out, strict=True)
    assert report.to_json(indent=2) == result.out.rstrip("\n")
