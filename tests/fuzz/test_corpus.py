"""Inputs that once broke something, or that show what is refused: each is tried again, by the properties of `oracle`.

What a fuzzer finds lands here by itself; give it a name that says what it is, and commit it with the repair.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import oracle

CORPUS = Path(__file__).parent / "corpus"
CHECKS = {
    "header": oracle.check_header,
    "index": oracle.check_index,
    "torch": oracle.check_torch,
    "yaml": oracle.check_yaml,
}


def test_every_target_has_inputs() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} == set(CHECKS)
    assert all(any((CORPUS / target).iterdir()) for target in CHECKS)


@pytest.mark.parametrize(
    "path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}, {path.name.replace('-', ' ')}"
)
def test_input_that_was_kept_breaks_nothing(path: Path) -> None:
    CHECKS[path.parent.name](path.read_bytes())
