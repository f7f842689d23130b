"""What the command line says on standard error when something is wrong: errors and warnings, in one line each."""

from __future__ import annotations

import errno
import logging
import os
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from weightstream.errors import WeightstreamError

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = ["DONE", "EXIT_CODES", "FAILED", "MISUSED", "ConfigurationError", "explain", "logging_to_stderr"]

DONE, FAILED, MISUSED = 0, 1, 2

#: What each exit code of each command means: the end of every --help, and a table in docs/errors.md.
EXIT_CODES = {
    DONE: "done; also where the reader of the output has gone away, and after SIGTERM under `warm --hold`",
    FAILED: "it failed: the load, a measurement, or the output; of `verify` also: a file is wrong, or nobody says what is right",
    MISUSED: "usage or configuration",
    130: "interrupted (SIGINT, Ctrl-C)",
    143: "ended by SIGTERM",
}

#: What writing to standard output fails with, of which Python does not say that it was that.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ConfigurationError(Exception):
    """Raised when the configuration names something that is not there or is not what it should be."""


def explain(error: Exception, *, file: str | None, verbose: bool) -> int:
    """Tell an error in one line, or one for each mistake in a configuration; return the exit code.

    Args:
        error: what ended the command.
        file: the configuration file, if the command has one.
        verbose: show the traceback too.
    """
    from pydantic import ValidationError  # noqa: PLC0415 - it takes long to import

    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return DONE  # whoever reads our output has had enough
    if verbose:
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    if isinstance(error, ValidationError):
        for mistake in _mistakes(error, file):
            _tell(mistake)
        return MISUSED
    if isinstance(error, ConfigurationError):
        _tell(str(error))
        return MISUSED
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _NO_ROOM):
        _tell(f"{error.filename or 'cannot write the output'}: {error.strerror} (-v shows where)")
        return FAILED
    _tell(str(error) if isinstance(error, WeightstreamError) else f"{type(error).__name__}: {error} (-v shows where)")
    return FAILED


def _tell(message: str) -> None:
    click.echo(f"error: {' '.join(message.split())}", err=True)


def _mistakes(error: ValidationError, file: str | None) -> list[str]:
    """Say for each mistake where it stands, file or variable and field, what is wrong and what was found."""
    messages: dict[tuple[str, str], list[str]] = {}
    variables = {name.upper() for name in os.environ}
    for found in error.errors(include_url=False):
        # A union says for each of its members why it is not that one, under the field's name and then the member's.
        name = ".".join(str(part) for part in found["loc"][:2])
        variable = f"WEIGHTSTREAM_{name.replace('.', '__')}".upper()
        place = name
        if variable in variables:
            place = f"{variable}: {name}"
        elif file is not None and name and name.upper() not in variables:
            place = f"{file}: {name}"
        shown = "" if found["type"] in ("config", "extra_forbidden") else f", found {found['input']!r}"
        messages.setdefault((place, shown), []).append(found["msg"].removeprefix("Value error, "))
    return [
        f"{f'{place}: ' if place else ''}{', or: '.join(dict.fromkeys(parts))}{shown}"
        for (place, shown), parts in messages.items()
    ]


class _Handler(logging.Handler):
    """Writes to what standard error is at the moment: a live display puts itself in between."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"weightstream: {record.levelname.lower()}: {record.getMessage()}", err=True)


@contextmanager
def logging_to_stderr(level: str, *, verbose: bool) -> Generator[None, None, None]:
    """Log records and Python's warnings from `level` on, or many more if `verbose`, for as long as this is open."""
    root, ours, handler = logging.getLogger(), logging.getLogger("weightstream"), _Handler()
    levels = root.level, ours.level
    root.addHandler(handler)
    root.setLevel("WARNING" if verbose else level)
    ours.setLevel("DEBUG" if verbose else level)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        root.setLevel(levels[0])
        ours.setLevel(levels[1])
