"""The documents, and the fenced blocks in them.

A block says by its language what it is, and with that how `test_documents.py` tries it. One that needs more than that has
a line before it that names the test which tries it: `<!-- tried by tests/integrations/test_vllm_page.py -->`.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DOCUMENTS", "ROOT", "Block", "blocks", "commands_in"]

ROOT = Path(__file__).parents[1]
#: Every document, from the root of the repository.
DOCUMENTS = sorted(
    str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")) if path.is_file()
)

_FENCED = re.compile(
    r"(?:^ *<!-- tried by (?P<tried_by>\S+) -->\n\s*)?"
    r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. `tried_by`: the file of the test that tries it, where that is not `test_documents.py`."""

    document: str
    line: int
    language: str
    text: str
    tried_by: str | None

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: str, *languages: str) -> list[Block]:
    """The blocks of a document that is named from the root of the repository: all, or those of some languages."""
    text = (ROOT / document).read_text()
    found = [
        Block(
            document,
            text.count("\n", 0, match.start("text")),
            match["language"],
            textwrap.dedent(match["text"]),
            match["tried_by"],
        )
        for match in _FENCED.finditer(text)
    ]
    return [block for block in found if not languages or block.language in languages]


def commands_in(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block: lines after `$`, where a backslash at the end goes on in the next."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            yield shlex.split(line[2:], comments=True)
