"""The schemas in the documentation are those that the command prints, and those that its output obeys."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from docs.outputs import outputs
from tests.builders import flip, write_checkpoint, write_sums
from tests.cli.conftest import Run
from tests.contract import BENCH_KEYS, INSPECT_KEYS, REPORT_KEYS, VERIFY_KEYS
from weightstream.outputs import SCHEMAS

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: it is in the extra `test`")

DOCS = Path(__file__).parents[2] / "docs"


def committed(of: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((DOCS / f"{of}.schema.json").read_text())
    return schema


def check(of: str, printed: str) -> Any:
    """Compare what was printed with the documented schema, and with the class that it comes from, key by key."""
    found = json.loads(printed)
    jsonschema.validate(found, committed(of), jsonschema.Draft202012Validator)
    described = TypeAdapter(SCHEMAS[of])
    assert described.dump_python(described.validate_json(printed, strict=True), mode="json") == found
    return found


@pytest.mark.parametrize("of", SCHEMAS)
def test_documented_schema_is_the_printed_one(weightstream: Run, of: str) -> None:
    assert weightstream("schema", of).out == (DOCS / f"{of}.schema.json").read_text()


def test_documented_tables_are_what_the_classes_say() -> None:
    assert (DOCS / "json.md").read_text() == outputs(), "run: python docs/outputs.py > docs/json.md"


@pytest.mark.parametrize("of", [name for name in SCHEMAS if name != "config"])
def test_every_key_is_described_and_always_there(of: str) -> None:
    schema = committed(of)
    for part in (schema, *schema.get("$defs", {}).values()):
        assert part["required"] == list(part["properties"])
        assert [key for key, field in part["properties"].items() if not field.get("description")] == []


@pytest.mark.parametrize("to", ["page-cache", "host"])
def test_report_of_warm_obeys_the_schema(weightstream: Run, config: Path, to: str) -> None:
    result = weightstream("warm", config, "--to", to, "--json", "--quiet")
    assert list(check("report", result.out)) == REPORT_KEYS


def test_what_inspect_prints_obeys_the_schema(weightstream: Run, checkpoint: Path) -> None:
    assert list(check("inspect", weightstream("inspect", checkpoint, "--json").out)) == INSPECT_KEYS


@pytest.mark.parametrize("state", ["unknown", "ok", "wrong", "written"])
def test_what_verify_prints_obeys_the_schema(weightstream: Run, checkpoint: Path, state: str) -> None:
    if state in {"ok", "wrong"}:
        write_sums(checkpoint)
    if state == "wrong":
        shard = next(checkpoint.glob("*.safetensors"))
        flip(shard, shard.stat().st_size - 1)
    options = ["--write-manifest"] if state == "written" else []
    found = check("verify", weightstream("verify", checkpoint, "--json", "--quiet", *options).out)
    assert list(found) == VERIFY_KEYS
    assert found["ok"] is (state in {"ok", "written"})
    assert (found["manifest"] is not None) is (state == "written")


@pytest.mark.parametrize("options", [[], ["--cold"]], ids=["cached", "cold"])
def test_what_bench_prints_obeys_the_schema(weightstream: Run, checkpoint: Path, options: list[str]) -> None:
    result = weightstream("bench", checkpoint, "--device", "cpu", "--runs", 1, "--json", "--quiet", *options)
    assert list(check("bench", result.out)) == BENCH_KEYS


def test_names_that_are_no_unicode_are_printed(weightstream: Run, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / os.fsdecode(b"caf\xe9"), {"a": torch.zeros(2)})
    result = weightstream("inspect", folder, "--json")
    assert result.code == 0
    assert json.loads(result.out)["checkpoint"] == str(folder / "model.safetensors")
