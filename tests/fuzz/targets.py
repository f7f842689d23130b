"""A program: coverage-guided fuzzing of one target, by atheris.

    python -m tests.fuzz.targets {header,index,torch,yaml} [options of libFuzzer] [folders of inputs]

An input that breaks a property of `oracle` ends it and stays in tests/fuzz/corpus, where `make test` tries it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json.decoder
import json.scanner
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

atheris: Any = importlib.import_module("atheris")  # has no types, and is not among the tools for development

with atheris.instrument_imports(include=["weightstream", "yaml", "pydantic_settings", "json"]):
    from tests.fuzz import oracle, strategies

    scanner: Any = importlib.reload(json.scanner)  # it has long been imported
    decoder: Any = importlib.reload(json.decoder)

CORPUS = Path(__file__).parent / "corpus"


def look_at_json(raw: bytes) -> None:
    """Parse JSON in Python, so that atheris sees when an input has a structure that none had before: ours is in C."""
    in_python = decoder.JSONDecoder()
    in_python.parse_string = decoder.py_scanstring
    in_python.scan_once = scanner.py_make_scanner(in_python)
    with contextlib.suppress(ValueError, RecursionError):
        in_python.decode(raw.decode())


def check_header(file: bytes) -> None:
    look_at_json(file[8:].rstrip(b"\0"))
    oracle.check_header(file)


def check_index(raw: bytes) -> None:
    look_at_json(raw)
    oracle.check_index(raw)


TARGETS: dict[str, tuple[Callable[[bytes], object], st.SearchStrategy[bytes]]] = {
    "header": (check_header, strategies.files_with_changed_bytes() | strategies.files_with_changed_headers()),
    "index": (check_index, strategies.indexes()),
    "torch": (
        oracle.check_torch,
        strategies.torch_files()
        | strategies.torch_files_with_changed_bytes()
        | strategies.torch_files_with_changed_pickles(),
    ),
    "yaml": (oracle.check_yaml, strategies.configurations()),
}


def write_seeds(folder: Path, inputs: st.SearchStrategy[bytes]) -> None:
    """Put a few hundred inputs that hypothesis makes into a folder, for atheris to start from."""

    @settings(
        max_examples=300,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.nested_given],
    )
    @given(inputs)
    def write(raw: bytes) -> None:
        (folder / hashlib.sha256(raw).hexdigest()).write_bytes(raw)

    write()


def change_header(data: bytes, max_size: int, seed: int) -> bytes:
    """Change an input as libFuzzer does, and half of the times set the length before the header right again."""
    changed: bytes = atheris.Mutate(data, max_size)
    return strategies.with_right_length(changed)[:max_size] if random.Random(seed).random() < 0.5 else changed


def main() -> None:
    name, *options = sys.argv[1:]
    check, inputs = TARGETS[name]
    for variable in [variable for variable in os.environ if variable.upper().startswith("WEIGHTSTREAM_")]:
        del os.environ[variable]
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        tokens.write_text(
            "".join(
                '"' + "".join(f"\\x{byte:02x}" for byte in token) + '"\n'
                for token in (*strategies.TOKENS, *strategies.PICKLE_TOKENS)
            )
        )
        seeds = Path(folder) / "seeds"
        seeds.mkdir()
        write_seeds(seeds, inputs)
        arguments = [sys.argv[0], f"-artifact_prefix={CORPUS / name}/", f"-dict={tokens}", *options, str(seeds)]
        more = {"custom_mutator": change_header} if name == "header" else {}
        atheris.Setup(arguments, lambda data: check(data) and None, **more)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
