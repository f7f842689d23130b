"""The command as a whole: help, version, what it imports, pipes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
import pytest

from tests.cli.conftest import ROOT, Run
from weightstream.complaints import DONE, EXIT_CODES, FAILED, MISUSED
from weightstream.shutdown import Shutdown

COMMANDS = ["demo", "warm", "inspect", "verify", "bench", "schema"]


def test_help_lists_the_commands_in_the_order_of_use(weightstream: Run) -> None:
    result = weightstream("--help")
    assert result.code == 0
    listed = result.out.partition("Commands:")[2].partition("Exit codes:")[0]
    names = [line.split()[0] for line in listed.splitlines() if line.strip()]
    assert names == COMMANDS


def told(text: str) -> dict[int, str]:
    """The exit codes at the end of a help."""
    lines = text.partition("Exit codes:\n")[2]
    return {
        int(code): " ".join(said.split())
        for code, said in re.findall(r"^ +(\d+) +(.*(?:\n {9}.*)*)", lines, re.MULTILINE)
    }


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help_with_every_exit_code(weightstream: Run, command: str) -> None:
    result = weightstream(*command.split(), "-h")
    assert result.code == 0
    assert result.out.startswith(f"Usage: weightstream {command}".strip())
    assert told(result.out) == EXIT_CODES


def test_exit_codes_are_all_that_there_are_and_the_page_has_them() -> None:
    usage = click.UsageError("").exit_code, click.ClickException("").exit_code
    assert set(EXIT_CODES) == {DONE, FAILED, MISUSED, *Shutdown().codes.values()} >= set(usage)
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    assert {int(code): said for code, said in rows} == EXIT_CODES


@pytest.mark.parametrize(
    "args",
    [["--help"], ["schema"], ["warm", "--help"], ["bench", "--help"], ["verify", "--help"], ["--nonsense"]],
    ids=" ".join,
)
def test_what_loads_nothing_does_not_import_torch(args: list[str]) -> None:
    program = (
        "import sys\n"
        "from weightstream.commands import run\n"
        f"run({args!r})\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'anyio', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, capture_output=True).returncode == 0


def test_next_to_nothing_is_imported_before_ctrl_c_is_answered() -> None:
    """Until then it ends in a traceback. Without `site`, which imports some of these where the package is a link."""
    early = "'argparse', 'contextlib', 'inspect', 'pathlib', 're', 'typing'"
    program = f"import sys; sys.path.insert(0, 'src'); import weightstream.cli; sys.exit(str({{{early}}} & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-S", "-c", program], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert result.stderr == "set()\n"


def test_module_runs_like_the_command() -> None:
    output = subprocess.check_output([sys.executable, "-m", "weightstream", "--help"], text=True)
    assert output.startswith("Usage: weightstream [OPTIONS] COMMAND")


def test_version_is_that_of_the_package(weightstream: Run) -> None:
    try:
        expected = version("weightstream")
    except PackageNotFoundError:
        pytest.skip("the package runs from its source tree, without being installed")
    result = weightstream("--version")
    assert (result.code, result.out) == (0, f"weightstream {expected}\n")


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["--nonsense"],
        ["warm"],
        ["inspect"],
        ["warm", "a", "b"],
        ["warm", "a", "--to", "moon"],
        ["bench"],
        ["bench", "a", "--runs", "0"],
    ],
    ids=" ".join,
)
def test_misuse_ends_with_2(weightstream: Run, args: list[str]) -> None:
    result = weightstream(*args)
    assert (result.code, result.out) == (2, "")
    assert "Error: " in result.err


def test_schema_is_the_committed_one(weightstream: Run) -> None:
    result = weightstream("schema")
    assert result.code == 0
    assert result.out == (ROOT / "docs" / "config.schema.json").read_text()
    assert set(json.loads(result.out)["properties"]) >= {"checkpoint", "model", "prefetch", "scheduler", "device"}


@pytest.mark.parametrize(
    "args", [["--help"], ["schema"], ["inspect", "model"], ["inspect", "model", "--json"]], ids=str
)
def test_reader_that_goes_away_is_no_error(args: list[str], config: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, "-m", "weightstream", *args], check=False, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (process.returncode, process.stderr) == (0, "")


def test_reader_of_progress_that_goes_away_is_no_error(config: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, "-m", "weightstream", "warm", str(config)],
        check=False,
        stdout=subprocess.PIPE,
        stderr=writing,
        text=True,
    )
    os.close(writing)
    assert process.returncode == 0
    assert process.stdout.startswith("Loaded ")


def test_output_that_cannot_be_written_ends_with_1() -> None:
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "weightstream", "schema"],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert process.returncode == 1
    assert process.stderr == "error: cannot write the output: No space left on device (-v shows where)\n"
