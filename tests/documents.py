"""The code in the documents."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["python_blocks"]


def python_blocks(document: str) -> list[str]:
    """The Python blocks of a document, which is named from the root of the repository."""
    text = (Path(__file__).parents[1] / document).read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
