"""SIGINT and SIGTERM, at many moments: the right code, within a second, and nothing left behind."""

from __future__ import annotations

import signal
import textwrap
from pathlib import Path

import pytest

from tests.cli.conftest import Start


@pytest.fixture(autouse=True)
def fixture_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that have just been written are in the page cache, and would be mapped: there would be nothing to read."""
    monkeypatch.setenv("WEIGHTSTREAM_STRATEGY", "stream")


MOMENTS = {
    "importing click": """
        class Finder:
            def find_spec(self, name, *rest):
                if name == "click": hang()
        sys.meta_path.insert(0, Finder())
    """,
    "importing torch": """
        class Finder:
            def find_spec(self, name, *rest):
                if name == "torch": hang()
        sys.meta_path.insert(0, Finder())
    """,
    "building the model": """
        import weightstream.building as building
        building.build_model = lambda *rest, **named: hang()
    """,
    "opening the files": """
        import weightstream.scheduler.job as job
        job.open_checkpoint = lambda *rest, **named: hang()
    """,
    "reading": """
        from weightstream.prefetch.source import FileSource
        FileSource.read = lambda *rest: hang()
    """,
    "binding": """
        from weightstream.device.binding import Binder
        Binder.bind = lambda self, places: hang() if places else []
    """,
    "printing": """
        import weightstream.summary as summary
        summary.print_report = lambda *rest: hang()
    """,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupt_ends_with_130_in_time(moment: str, config: Path, start: Start) -> None:
    """Even where the thread that does the work never comes back."""
    running = start("warm", config, prepare=MOMENTS[moment])
    running.wait_for("REACHED")
    result = running.end_by(signal.SIGINT)
    assert result.code == 130
    assert "Traceback" not in result.err
    assert result.err.endswith("interrupted\n")
    assert result.out == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_signal_while_the_interpreter_ends_leaves_no_traceback(number: signal.Signals, code: int, start: Start) -> None:
    running = start("schema", prepare="import atexit; atexit.register(hang)")
    running.wait_for("REACHED")
    result = running.end_by(number)
    assert (result.code, "Traceback" in result.err) == (code, False)


def test_termination_while_loading_ends_with_143(config: Path, start: Start) -> None:
    running = start("warm", config, "--hold", prepare=MOMENTS["reading"])
    running.wait_for("REACHED")
    result = running.end_by(signal.SIGTERM)
    assert (result.code, "Traceback" in result.err) == (143, False)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_held_weights_go_with_the_signal(number: signal.Signals, code: int, config: Path, start: Start) -> None:
    """Also where the parent had the signals ignored, as shells do for `command &`."""
    prepare = f"import signal; signal.signal({int(number)}, signal.SIG_IGN)"
    running = start("warm", config, "--hold", "--json", "--quiet", prepare=prepare)
    running.wait_for(f"weightstream: holding the weights in process {running.pid}")
    result = running.end_by(number)
    assert result.code == code
    assert result.out.startswith("{")
    assert result.out.endswith("}\n")
    assert result.err.splitlines()[1:] == (["interrupted"] if code else [])


def test_load_that_is_interrupted_ends_by_itself_where_it_can(config: Path, start: Start) -> None:
    """Not only by the deadline: readers are slow here, but they come back."""
    prepare = """
        import atexit, os
        from weightstream.prefetch.source import FileSource
        from weightstream.scheduler.engine import Engine
        read, close = FileSource.read, Engine.close
        def slow(*rest):
            reached()
            time.sleep(0.1)
            read(*rest)
        FileSource.read = slow
        def tell(self, **options):
            close(self, **options)
            os.write(2, b"CLOSED\\n")
        Engine.close = tell
    """
    running = start("warm", config, prepare=prepare)
    running.wait_for("REACHED")
    result = running.end_by(signal.SIGINT)
    assert result.code == 130
    assert "CLOSED" in result.err


DEMO_MOMENTS = {
    "writing": """
        import weightstream.toy as toy
        header, count = toy._header, 0
        def stop_at_the_second(tensors):
            global count
            count += sys._getframe(1).f_code.co_name == "write_checkpoint"
            return hang() if count == 2 else header(tensors)
        toy._header = stop_at_the_second
    """,
    "loading": MOMENTS["reading"],
    "checking": """
        import weightstream.toy as toy
        toy._same_bytes = lambda *rest: hang()
    """,
}

#: A small demo: what it writes is otherwise half a gigabyte.
SMALL = "import weightstream.toy as toy; toy._HIDDEN, toy._VOCABULARY, toy._SHARD_BYTES = 64, 128, 2**21\n"


@pytest.mark.parametrize("moment", DEMO_MOMENTS)
def test_interrupted_demo_leaves_all_of_the_checkpoint_or_nothing(moment: str, start: Start, tmp_path: Path) -> None:
    prepare = SMALL + textwrap.dedent(DEMO_MOMENTS[moment])
    running = start("demo", prepare=prepare, environment={"XDG_CACHE_HOME": str(tmp_path)})
    running.wait_for("REACHED")
    if moment == "writing":
        partial = tmp_path / "weightstream" / f"demo.partial-{running.pid}"
        assert len(list(partial.iterdir())) == 2, "it must be in the middle of it"
    result = running.end_by(signal.SIGINT)
    assert result.code == 130
    assert "Traceback" not in result.err
    left = sorted(path.name for path in (tmp_path / "weightstream").iterdir())
    assert left == (["demo.lock"] if moment == "writing" else ["demo", "demo.lock"])


def test_demo_leaves_the_checkpoint_alone_while_another_one_loads_it(start: Start, tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path), "WEIGHTSTREAM_DEVICE__TARGET": "cpu"}
    first = start("demo", prepare=SMALL + textwrap.dedent(DEMO_MOMENTS["loading"]), environment=environment)
    first.wait_for("REACHED")
    folder = tmp_path / "weightstream" / "demo"
    before = folder.stat().st_ino
    assert start("demo", prepare=SMALL, environment=environment).result().code == 0, "reading disturbs nobody"
    fresh = start("demo", "--fresh", prepare=SMALL, environment=environment)
    fresh.wait_for("waiting for another demo")
    assert folder.stat().st_ino == before
    assert fresh.end_by(signal.SIGINT).code == 130, "also while it waits"
    assert folder.stat().st_ino == before
    fresh = start("demo", "--fresh", prepare=SMALL, environment=environment)
    fresh.wait_for("waiting for another demo")
    first.end_by(signal.SIGINT)
    result = fresh.result()
    assert (result.code, "written now" in result.out) == (0, True)


def test_demo_uses_what_another_one_is_writing(start: Start, tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path), "WEIGHTSTREAM_DEVICE__TARGET": "cpu"}
    slow = """
        import weightstream.toy as toy
        write = toy.write_checkpoint
        def write_slowly(*rest):
            reached()
            while not os.path.exists(os.environ["XDG_CACHE_HOME"] + "/go"): time.sleep(0.01)
            write(*rest)
        toy.write_checkpoint = write_slowly
    """
    first = start("demo", prepare=SMALL + textwrap.dedent(slow), environment=environment)
    first.wait_for("REACHED")
    second = start("demo", prepare=SMALL, environment=environment)
    second.wait_for("waiting for another demo")
    (tmp_path / "go").touch()
    for running, origin in ((first, "written now"), (second, "there from an earlier run")):
        result = running.result()
        assert (result.code, origin in result.out) == (0, True)


def test_inspect_can_be_interrupted(checkpoint: Path, start: Start) -> None:
    prepare = """
        import weightstream.prefetch.checkpoint as module
        module.open_checkpoint = lambda *rest, **named: hang()
    """
    running = start("inspect", checkpoint, prepare=prepare)
    running.wait_for("REACHED")
    assert running.end_by(signal.SIGINT).code == 130
