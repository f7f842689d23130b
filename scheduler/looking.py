"""Looking at checkpoints outside of loads, within the limits that loads have, and away from signals."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from weightstream.prefetch.attempts import Attempts
from weightstream.prefetch.checkpoint import Checkpoint, open_checkpoint
from weightstream.scheduler.clock import SystemClock
from weightstream.scheduler.config import Settings
from weightstream.scheduler.files import Files
from weightstream.scheduler.stragglers import Stragglers

__all__ = ["look", "looking", "open_for"]


@contextmanager
def looking(
    settings: Settings, *, on_retry: Callable[[], None] = lambda: None
) -> Generator[tuple[Files, Attempts], None, None]:
    """Have a thread for files, with the limits `prefetch.stall_s` and `scheduler.timeout_s`, and close what it opened.

    What hangs is not waited for: see `Files`. Not for a thread that gets signals.

    Args:
        settings: the limits, and `prefetch.retries`.
        on_retry: told of each.
    """
    clock = SystemClock()
    timeout_s = settings.scheduler.timeout_s
    deadline = None if timeout_s is None else clock.now() + timeout_s
    files = Files(clock, Stragglers(clock), stall_s=settings.prefetch.stall_s, timeout_s=timeout_s, deadline=deadline)
    try:
        yield files, Attempts(settings.prefetch.retries, pause=files.pause, on_retry=on_retry, on_begin=files.begin)
    finally:
        files.close()


def look(settings: Settings) -> Checkpoint:
    """Open the checkpoint that the settings name, check it as a load would, and close it; return what was found.

    Not for a thread that gets signals.

    Raises:
        CheckpointError, IntegrityError, ReadError: see `open_checkpoint`.
        LoadTimeoutError: a file system did not answer in time.
    """
    with looking(settings) as (files, attempts):
        return files.call(lambda: open_for(settings, files, attempts))


def open_for(settings: Settings, files: Files, attempts: Attempts, *, hashes: bool = False) -> Checkpoint:
    """Open the checkpoint that the settings name, on the thread of `files`, which closes it; see `open_checkpoint`."""
    assert settings.checkpoint is not None
    checkpoint = open_checkpoint(
        settings.checkpoint,
        variant=settings.prefetch.variant,
        allow_outside_links=settings.prefetch.allow_outside_links,
        hashes=hashes,
        attempts=attempts,
    )
    files.opened.callback(checkpoint.close)
    return checkpoint
