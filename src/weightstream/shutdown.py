"""How the command line ends before its time: SIGINT and SIGTERM, at any moment, within a second.

Owns the process's handlers for the two. No KeyboardInterrupt is ever raised: it would come out of whatever code happens
to run, an import or somebody's `except`, as a traceback or not at all. Imports the standard library alone, and little
of it, because the handlers must be there before anything else is imported.
"""

from __future__ import annotations

import os
import select
import signal

TYPE_CHECKING = False  # typing's; see the module
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import FrameType
    from typing import NoReturn

__all__ = ["Shutdown", "tell"]

#: From the signal to the end, at the latest. The rest of a second is for a busy machine.
_DEADLINE_S = 0.7


class Shutdown:
    """Ends the process on a signal: at once, or, while `run` runs, after the work has been cancelled and cleaned up.

    Work that has not ended by the deadline (a read that hangs, a copy, an import) is left behind, and the process ends
    all the same. `cleanups` are called in both cases, latest first; they must be quick, may be called on any thread,
    and more than once.

    Attributes:
        codes: the exit code for each signal.
        cleanups: what must not stay behind: files, the state of the terminal.
    """

    def __init__(self) -> None:
        self.codes = {int(signal.SIGINT): 130, int(signal.SIGTERM): 143}
        self.cleanups: list[Callable[[], None]] = []
        self._cancel: Callable[[], object] | None = None
        self._signal = 0
        self._alarm = -1

    def install(self) -> None:
        """Take over both signals, also where the parent had them ignored, as a shell does for `command &`."""
        for number in self.codes:
            signal.signal(number, self._on_signal)

    def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work` on an event loop (uvloop) in this thread. Returns, or raises what `work` raises.

        The loop's thread answers signals: `work` must do whatever takes long on other threads.
        """
        import anyio  # noqa: PLC0415 - see the module

        anyio.run(self._attend, work, backend_options={"use_uvloop": True})

    async def _attend(self, work: Callable[[], Awaitable[None]]) -> None:
        import asyncio  # noqa: PLC0415
        import threading  # noqa: PLC0415

        import anyio  # noqa: PLC0415

        loop = asyncio.get_running_loop()
        reading, self._alarm = os.pipe()
        threading.Thread(target=self._end_in_time, args=(reading,), name="weightstream-shutdown", daemon=True).start()
        with anyio.CancelScope() as scope:
            self._cancel = lambda: loop.call_soon_threadsafe(scope.cancel)
            try:
                await work()
            finally:
                if self._signal:
                    self._end()
                self._cancel = None
                os.close(self._alarm)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self._signal = self._signal, number
        if again or self._cancel is None:
            self._end()
        os.write(self._alarm, b"!")  # not a lock: this may have interrupted whoever holds it
        self._cancel()

    def _end_in_time(self, alarm: int) -> None:
        asked = os.read(alarm, 1)
        if asked:
            import time  # noqa: PLC0415

            time.sleep(_DEADLINE_S)
            self._end()
        os.close(alarm)

    def _end(self) -> NoReturn:
        """End the process without Python's finalisation, which would wait for threads and could be interrupted."""
        for clean_up in reversed(self.cleanups):
            try:  # noqa: SIM105 - contextlib takes long to import
                clean_up()
            except Exception:  # noqa: BLE001, S110 - the others must have their turn
                pass
        code = self.codes[self._signal]
        if code:
            tell("interrupted\n")
        os._exit(code)


def tell(text: str) -> None:
    """Write to standard error if that is possible at once: past Python's buffers, whose lock somebody may hold."""
    try:
        if select.select([], [2], [], 0)[1]:
            os.write(2, text.encode())
    except (OSError, ValueError):
        pass
