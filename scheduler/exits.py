"""The end of the process: loads that still run then are stopped, and their threads are waited for, and those of their files.

A load's thread works in torch, and torch works without the interpreter for much of that time. If the interpreter has gone
when such a thread wants it back, Python ends the thread from inside torch's C++, which aborts the process ("terminate
called without an active exception"): 3 of 600 processes that ended in mid-load. `atexit` comes just before that.
"""

from __future__ import annotations

import atexit
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

__all__ = ["FILES_GRACE_S", "ended_at_exit"]

#: How long a process that ends waits for its loads. One that was stopped works in torch no more after milliseconds; this
#: is for one that waits for a file system, which it does in Python, where its thread may be ended.
_GRACE_S = 2.0
#: And for a thread that closes files: it is in torch only if the garbage collector has chosen it to free tensors of the
#: program's; and if it hangs in a file system, nobody should wait for it.
FILES_GRACE_S = 0.25

_running: dict[threading.Thread, tuple[Callable[[BaseException], None], float]] = {}


@contextmanager
def ended_at_exit(stop: Callable[[BaseException], None], grace_s: float = _GRACE_S) -> Generator[None, None, None]:
    """Have the calling thread waited for, after a call of `stop` from another one, if the process ends meanwhile.

    `stop` is given SystemExit: a daemon thread of the program's that waits for the load ends with that, without a word.
    """
    thread = threading.current_thread()
    _running[thread] = stop, grace_s
    try:
        yield
    finally:
        _running.pop(thread, None)


def _end_all() -> None:
    """End them all, whatever signals say: KeyboardInterrupt would come out here, and what was waited for abort the process."""
    if not _running:
        return
    before = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if before is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    began_s = time.monotonic()
    running = dict(_running)
    for stop, _ in running.values():
        stop(SystemExit("the process ends"))
    for thread, (_, grace_s) in running.items():
        thread.join(max(0.0, began_s + grace_s - time.monotonic()))
    if before is not None:
        signal.signal(signal.SIGINT, before)


for _ in range(2):  # a second time, because the first may be interrupted before it begins
    atexit.register(_end_all)
