"""`Shutdown` by itself: what happens between a signal and the end of a process."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator

import pytest

from tests.cli.conftest import DEADLINE_S
from weightstream.shutdown import _DEADLINE_S

Launch = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture(name="launch")
def fixture_launch() -> Iterator[Launch]:
    """Starts a program that has a `shutdown`, and waits until it has written a line."""
    started: list[subprocess.Popen[str]] = []

    def launch(program: str) -> subprocess.Popen[str]:
        head = "import os, sys, time, anyio\nfrom weightstream.shutdown import Shutdown\nshutdown = Shutdown()\n"
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", f"{head}shutdown.install()\n{textwrap.dedent(program)}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def ends_within(process: subprocess.Popen[str], seconds: float, number: int = signal.SIGINT) -> tuple[int, str, str]:
    begin = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - begin < seconds
    return process.returncode, out, err


def test_without_a_loop_the_process_ends_at_once(launch: Launch) -> None:
    process = launch("print('ready')\ntime.sleep(60)")
    assert ends_within(process, _DEADLINE_S) == (130, "", "interrupted\n")


def test_work_is_cancelled_and_cleans_up(launch: Launch) -> None:
    process = launch("""
        async def work():
            try:
                print("ready")
                await anyio.sleep_forever()
            finally:
                print("cancelled")
        shutdown.cleanups.append(lambda: print("second"))
        shutdown.cleanups.append(lambda: 1 / 0)
        shutdown.cleanups.append(lambda: print("first"))
        shutdown.run(work)
        print("not reached")
    """)
    assert ends_within(process, _DEADLINE_S) == (130, "cancelled\nfirst\nsecond\n", "interrupted\n")


@pytest.mark.parametrize(
    "blocked",
    ["time.sleep(60)", "with anyio.CancelScope(shield=True): await anyio.sleep_forever()"],
    ids=["blocked loop", "shielded wait"],
)
def test_work_that_does_not_end_is_left_behind(launch: Launch, blocked: str) -> None:
    process = launch(f"""
        async def work():
            print("ready")
            {blocked}
        shutdown.cleanups.append(lambda: print("cleaned up"))
        shutdown.run(work)
    """)
    assert ends_within(process, DEADLINE_S) == (130, "cleaned up\n", "interrupted\n")


def test_second_signal_does_not_wait_for_the_work(launch: Launch) -> None:
    process = launch("""
        async def work():
            with anyio.CancelScope(shield=True):
                print("ready")
                await anyio.sleep_forever()
        shutdown.run(work)
    """)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    code, _, _ = ends_within(process, _DEADLINE_S)
    assert code in (130, 143)


def test_signal_after_the_work_ends_the_process_too(launch: Launch) -> None:
    process = launch("""
        async def work(): pass
        shutdown.run(work)
        print("ready")
        time.sleep(60)
    """)
    assert ends_within(process, _DEADLINE_S, signal.SIGTERM) == (143, "", "interrupted\n")


def test_code_that_was_set_is_the_process_s(launch: Launch) -> None:
    process = launch("""
        import signal
        async def work():
            shutdown.codes[signal.SIGTERM] = 0
            print("ready")
            await anyio.sleep_forever()
        shutdown.run(work)
    """)
    assert ends_within(process, _DEADLINE_S, signal.SIGTERM) == (0, "", "")


def test_standard_error_that_nobody_reads_does_not_hold_the_end_up(launch: Launch) -> None:
    process = launch("""
        async def work():
            os.set_blocking(2, False)
            try:
                while True: os.write(2, b"x" * 4096)
            except BlockingIOError:
                os.set_blocking(2, True)
            print("ready")
            await anyio.sleep_forever()
        shutdown.run(work)
    """)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert time.monotonic() - begin < DEADLINE_S


def test_error_of_the_work_is_raised(launch: Launch) -> None:
    process = launch("""
        async def work(): raise ArithmeticError
        try:
            shutdown.run(work)
        except ArithmeticError:
            print("ready")
    """)
    assert process.wait(30) == 0
