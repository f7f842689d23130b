"""The `weightstream` command: from the process's start to its exit code. The commands themselves are in `commands`.

Exit codes are described in `complaints`. Nothing is imported before Ctrl-C can be answered that is not needed for that:
it would be a traceback.
"""

from __future__ import annotations

import os
import sys

from weightstream.shutdown import Shutdown

TYPE_CHECKING = False  # typing's; see the module
if TYPE_CHECKING:
    from typing import NoReturn, TextIO

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line and exit. Called once per process, in its main thread."""
    shutdown = Shutdown()
    shutdown.install()
    _buffer_output()
    from weightstream.commands import run  # noqa: PLC0415

    code = run(sys.argv[1:], shutdown)
    error = _flush()
    if error is not None and not code:  # else it has been told
        from weightstream.complaints import explain  # noqa: PLC0415

        code = explain(error, file=None, verbose=False)
    sys.exit(code)


def _buffer_output() -> None:
    """Give standard output a buffer, where Python has none (PYTHONUNBUFFERED, which is usual in containers).

    Without one, Python forgets what a full disk has not taken of a long text, and no error is raised.
    """
    import io  # noqa: PLC0415 - see the module

    output: TextIO | None = sys.stdout  # none where the process was given none
    if output is None:  # a file that got its descriptor would be written to, and the event loop aborts the process
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - as long as the process
        return
    raw = getattr(output, "buffer", None)
    if isinstance(raw, io.RawIOBase):
        encoding, errors = sys.stdout.encoding, sys.stdout.errors
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=True)


def _flush() -> OSError | None:
    """Write what is left to standard output, or forget it; return why. A reader that has gone away has had enough."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again, and complain
        return None if isinstance(error, BrokenPipeError) else error
    return None
