"""The `weightstream` command: from the process's start to its exit code. The commands themselves are in `commands`.

Exit codes: 0 done, 1 the load failed, 2 usage or configuration, 130 interrupted (143 by SIGTERM).
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from weightstream.shutdown import Shutdown

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line and exit. Called once per process, in its main thread."""
    shutdown = Shutdown()
    shutdown.install()
    # Not before: Ctrl-C while this is imported would be a traceback.
    from weightstream.commands import run  # noqa: PLC0415

    code = run(sys.argv[1:], shutdown)
    _flush()
    sys.exit(code)


def _flush() -> None:
    """Write what is left to standard output, so that a reader that has gone away does not make Python complain."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
