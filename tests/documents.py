"""The documents, and the fenced blocks in them.

A block says by its language what it is, and with that how `test_documents.py` tries it. One that is not tried has a
line before it that says why: `<!-- not run: needs two machines -->`.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DOCUMENTS", "ROOT", "Block", "blocks"]

ROOT = Path(__file__).parents[1]
#: Every document, from the root of the repository.
DOCUMENTS = sorted(
    str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")) if path.is_file()
)

_FENCED = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>[^\n]+) -->\n\s*)?"
    r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. `reason`: why it is not run, if it is not."""

    document: str
    line: int
    language: str
    text: str
    reason: str | None

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
            match["reason"],
        )
        for match in _FENCED.finditer(text)
    ]
    return [block for block in found if not languages or block.language in languages]
