"""Timelines as files: a page to look at, a picture, or a trace for Perfetto. The suffix says which."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightstream.scheduler.timeline import Timeline

__all__ = ["check_can_save", "save_timeline"]

#: The library that each kind of file needs; "" for none.
_NEEDED = {".html": "bokeh", ".png": "matplotlib", ".json": ""}


def check_can_save(path: str | os.PathLike[str]) -> None:
    """Make sure, before the load, that its timeline can be saved under this name afterwards.

    Raises:
        ValueError: the name has another suffix than .html, .png and .json, or something else than a file has it: a FIFO
            would be waited at for a reader.
        FileNotFoundError: there is no such folder.
        ModuleNotFoundError: the library for it is not installed; the message says what to install.
    """
    file = Path(path)
    needed = _NEEDED.get(file.suffix)
    if needed is None:
        raise ValueError(f"{file}: a timeline is saved as {', '.join(_NEEDED)}, and this name ends in none of them")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file}: there is no folder {file.parent}")
    if file.exists() and not file.is_file():
        raise ValueError(f"{file}: there is something that is not a regular file")
    if needed and find_spec(needed) is None:
        raise ModuleNotFoundError(
            f"{file}: this needs {needed}, which is not installed: pip install 'weightstream[timeline]'", name=needed
        )


def save_timeline(timeline: Timeline, path: str | os.PathLike[str]) -> None:
    """Write a timeline to a file.

    Args:
        timeline: from `Recorder.timeline`.
        path: `.html`: one page that needs nothing else (1.3 MB and some 30 bytes a span), for browsers; it zooms, and
            tells about each bar. `.png`: a picture. `.json`: Chrome's trace format, for Perfetto and chrome://tracing.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: see `check_can_save`.
        OSError: the file cannot be written; its `filename` is this one. A file that was not there is not left.
    """
    check_can_save(path)
    file = Path(path)
    content = _content(timeline, file)
    existed = file.exists()
    try:
        file.write_bytes(content)
    except OSError as error:
        if not existed:
            file.unlink(missing_ok=True)
        raise type(error)(error.errno, error.strerror, str(file)) from error


def _content(timeline: Timeline, file: Path) -> bytes:
    if file.suffix == ".html":
        from weightstream.drawing.html import page  # noqa: PLC0415 - the libraries are large, and extras

        return page(timeline).encode()
    if file.suffix == ".png":
        from weightstream.drawing.png import picture  # noqa: PLC0415

        return picture(timeline)
    from weightstream.drawing.trace import trace  # noqa: PLC0415

    return trace(timeline).encode()
