"""The garbage collector, held off while many objects are made at once.

Making tens of thousands of parameters lets the collector scan the whole model again and again (0.33 s a scan for
46,000 modules), for nothing: none of the new objects is garbage.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["no_garbage_collection"]

_lock = threading.Lock()
_holders = 0
_was_enabled = False


@contextmanager
def no_garbage_collection() -> Generator[None, None, None]:
    """Switch the collector off until the last of all concurrent holders is done. Not for code that waits for I/O."""
    global _holders, _was_enabled  # noqa: PLW0603 (the collector is the process's, and so is this count)
    with _lock:
        if _holders == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0 and _was_enabled:
                gc.enable()
