"""`weightstream bench`: what it measures, what it says about it, and how it ends. No times are looked at."""

from __future__ import annotations

import errno
import json
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from tests.builders import INDEX, random_tensors, write_checkpoint
from tests.cli.conftest import Run, Start
from tests.contract import BENCH_KEYS, REPORT_KEYS
from tests.fakes.filesystem import Behaviour, Fault, mounted
from tests.fakes.fixtures import requires_fuse
from weightstream import bench, ceilings, pagecache, samples
from weightstream.building import model_for
from weightstream.ceilings import ReadCeiling
from weightstream.errors import PlacementError, UnsupportedFormatError
from weightstream.prefetch.checkpoint import open_checkpoint
from weightstream.prefetch.header import TensorSpec


@pytest.fixture(autouse=True)
def _on_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSTREAM_DEVICE__TARGET", "cpu")
    monkeypatch.setattr(samples, "usable_cores", lambda: 2)


@pytest.fixture(name="_direct")
def fixture_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Direct reads work, whatever the file system of the tests."""
    real = ceilings.read_ceiling

    def read(paths: Any, *, num_threads: int, direct: bool, **named: Any) -> ReadCeiling:
        found = real(paths, num_threads=num_threads, direct=False, **named)
        return ReadCeiling(found.num_bytes, found.wall_s, num_threads, direct)

    monkeypatch.setattr(ceilings, "read_ceiling", read)


READS = [f"read, {how}, {threads}" for how in ("O_DIRECT", "cached") for threads in ("1 thread", "2 threads")]
COLD_READS = [name.replace("O_DIRECT", "cold") for name in READS[:2]]


@pytest.mark.usefixtures("_direct")
def test_json_is_everything_that_was_measured(weightstream: Run, checkpoint: Path) -> None:
    result = weightstream("bench", checkpoint, "--json", "--runs", "2")
    assert result.code == 0
    found: dict[str, Any] = json.loads(result.out)
    assert list(found) == BENCH_KEYS
    assert (found["checkpoint"], found["num_tensors"], found["num_shards"]) == (str(checkpoint / INDEX), 8, 3)
    assert [row["name"] for row in found["rows"]] == [*READS, "weightstream, cached"]
    assert [len(row["samples"]) for row in found["rows"]] == [2] * 5
    load = found["rows"][-1]
    assert load["ceiling"] in READS
    assert load["bound"].startswith("It waited for ")
    assert [list(sample["report"]) for sample in load["samples"]] == [REPORT_KEYS] * 2
    assert found["rows"][0]["samples"][0]["report"] is None


@pytest.mark.usefixtures("_direct")
def test_findings_are_printed_after_the_plan(weightstream: Run, checkpoint: Path) -> None:
    result = weightstream("bench", checkpoint)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == "Measuring 1.15 kB, 8 tensors in 3 shards, onto cpu"
    facts = {line[:16].strip(): line[16:] for line in lines[1 : lines.index("")]}
    assert list(facts) == ["checkpoint", "measured", "page cache", "host memory"]
    assert facts["measured"].startswith("3 times in turn: raw reads with 1 and 2 threads, ")
    table = lines[lines.index("Ceilings, and loads as shares of theirs (medians)") + 1 :]
    assert table[0].split() == ["s", "min-max", "rate", "share", "CPU", "s", "memory"]
    assert [line[2:].partition("  ")[0] for line in table[1:6]] == [*READS, "weightstream, cached"]
    phases = lines[lines.index("Where the time went: weightstream, cached") + 1 :]
    assert [line.split()[0] for line in phases[:5]] == ["preflight", "disk", "copy", "bind", "other"]
    assert any(line.startswith("weightstream, cached: ") and "% of the ceiling (read, " in line for line in phases)
    assert any(line.startswith("  why           It waited for ") for line in phases)


@pytest.mark.usefixtures("_direct")
def test_progress_goes_to_standard_error(weightstream: Run, checkpoint: Path) -> None:
    lines = weightstream("bench", checkpoint, "--runs", "1").err.splitlines()
    assert lines == [
        f"weightstream: {step}"
        for step in (
            "importing torch",
            "checking the checkpoint",
            "a first read and a first load, which do not count",
            *(f"run 1 of 1: {name}" for name in [*READS, "weightstream, cached"]),
        )
    ]
    assert weightstream("bench", checkpoint, "--runs", "1", "--quiet").err == ""


@pytest.mark.usefixtures("_direct")
def test_cold_runs_begin_with_an_empty_page_cache(
    weightstream: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[int] = []

    def drop(paths: tuple[Path, ...]) -> None:
        dropped.append(len(paths))
        monkeypatch.setattr(pagecache, "resident_share", lambda _: 0.0 if len(dropped) else 1.0)

    monkeypatch.setattr(pagecache, "drop", drop)
    found = json.loads(weightstream("bench", checkpoint, "--cold", "--runs", "2", "--json").out)
    names = [row["name"] for row in found["rows"]]
    assert names == [*COLD_READS, *READS, "weightstream, cold", "weightstream, cached"]
    assert dropped == [3] * 3 * 2
    assert found["rows"][-2]["ceiling"] not in READS[2:]


@pytest.mark.usefixtures("_direct")
def test_page_cache_that_cannot_be_emptied_is_said(
    weightstream: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagecache, "drop", lambda _: None)
    monkeypatch.setattr(pagecache, "resident_share", lambda _: 1.0)
    found = json.loads(weightstream("bench", checkpoint, "--cold", "--runs", "2", "--json").out)
    assert [row["name"] for row in found["rows"]] == [*READS, "weightstream, cached"]
    (note,) = found["notes"]
    assert note.startswith("cold reads were not measured: 100% of the files stayed in the page cache")


@pytest.mark.usefixtures("_direct")
def test_page_cache_that_keeps_nothing_is_said(
    weightstream: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagecache, "resident_share", lambda _: 0.25)
    result = weightstream("bench", checkpoint, "--runs", "1")
    assert "  note          the page cache kept only 25% of the files" in result.out


@pytest.mark.usefixtures("_direct")
def test_files_of_somebody_else_are_measured_though_the_kernel_does_not_tell_what_is_cached(
    weightstream: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagecache, "resident_shares", lambda *_, **__: [None])
    found = json.loads(weightstream("bench", checkpoint, "--cold", "--runs", "2", "--json").out)
    assert [row["name"] for row in found["rows"]] == [*READS, "weightstream, cached"]
    filled, emptied = found["notes"]
    assert filled.startswith("whether the page cache kept the files is unknown")
    assert emptied.startswith("cold reads were not measured: whether the files left the page cache is unknown")


@requires_fuse
def test_what_fails_for_a_moment_is_tried_again(weightstream: Run, checkpoint: Path) -> None:
    (first, *_) = sorted(checkpoint.glob("*.safetensors"))
    fault = Fault(first.name, "error", offset=0, times=1)
    with mounted(checkpoint, Behaviour(faults=(fault,), is_cached=False)) as mount:
        assert weightstream("bench", mount.path, "--runs", "1", "--json").code == 0
        assert mount.statistics().num_faults == (1,)  # while it was opened


@pytest.mark.usefixtures("_direct")
def test_raw_read_that_fails_for_a_moment_is_measured_anew(
    weightstream: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]
    real = ceilings.read_ceiling

    def read(*rest: Any, **named: Any) -> ReadCeiling:
        if errors:
            raise errors.pop()
        return real(*rest, **named)

    monkeypatch.setattr(ceilings, "read_ceiling", read)
    assert weightstream("bench", checkpoint, "--runs", "1").code == 0
    assert not errors


def test_file_system_without_direct_reads_is_said(
    weightstream: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(paths: Any, *, num_threads: int, direct: bool, **_: Any) -> ReadCeiling:
        if direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(paths, num_threads=num_threads, direct=False)

    real = ceilings.read_ceiling
    monkeypatch.setattr(ceilings, "read_ceiling", refuse)
    found = json.loads(weightstream("bench", checkpoint, "--json").out)
    assert [row["name"] for row in found["rows"]] == [*READS[2:], "weightstream, cached"]
    assert found["notes"] == ["O_DIRECT was not measured: the file system refuses it"]


def test_error_of_a_raw_read_ends_with_1(weightstream: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*rest: Any, **named: Any) -> ReadCeiling:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(ceilings, "read_ceiling", fail)
    result = weightstream("bench", checkpoint)
    assert result.code == 1
    assert "broken" in result.err


def test_too_little_memory_is_an_error_that_says_what_to_do(
    weightstream: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "available_bytes", lambda: 1000)
    result = weightstream("bench", checkpoint, "--quiet")
    assert (result.code, result.out) == (1, "")
    assert "too little memory to measure with" in result.err
    assert "found 1.00 kB. Free some, or measure one shard of it" in result.err


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:99", "device.target: there is no cuda:99 here"), ("CPU", "device.target: String should match")],
    ids=["missing", "wrong"],
)
def test_wrong_device_ends_with_2(weightstream: Run, checkpoint: Path, device: str, message: str) -> None:
    result = weightstream("bench", checkpoint, "--device", device, "--quiet")
    assert (result.code, result.out) == (2, "")
    assert message in result.err


def test_missing_checkpoint_ends_with_1(weightstream: Run, tmp_path: Path) -> None:
    result = weightstream("bench", tmp_path / "nothing", "--quiet")
    assert (result.code, result.err) == (1, f"error: {tmp_path / 'nothing'}: no such file or folder\n")


def test_kernel_that_does_not_reset_the_peak_leaves_it_unknown(
    weightstream: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    result = weightstream("bench", checkpoint, "--runs", "1")
    assert result.code == 0
    assert "unknown" in result.out


@pytest.mark.parametrize("moment", ["reading", "loading"])
def test_interrupt_ends_with_130_in_time(moment: str, checkpoint: Path, start: Start) -> None:
    prepare = {
        "reading": """
            import weightstream.ceilings as ceilings
            ceilings.read_ceiling = lambda *rest, **named: hang()
        """,
        "loading": """
            from weightstream.prefetch.source import FileSource
            FileSource.read = lambda *rest: hang()
        """,
    }
    running = start("bench", checkpoint, "--json", prepare=prepare[moment])
    running.wait_for("REACHED")
    result = running.end_by(signal.SIGINT)
    assert (result.code, result.out) == (130, "")
    assert "Traceback" not in result.err


# The model


def specs_of(folder: Path) -> tuple[TensorSpec, ...]:
    with open_checkpoint(folder) as checkpoint:
        return tuple(checkpoint.tensors.values())


def test_model_has_the_tensors_of_the_checkpoint_and_no_memory(tmp_path: Path) -> None:
    tensors = {
        **random_tensors({"layers.0.weight": (2, 3), "layers.10.a.b": (), "top": (5,)}),
        "layers.0.scales": torch.zeros(3, dtype=torch.int8),
    }
    model = model_for(specs_of(write_checkpoint(tmp_path, tensors)))
    found = dict(model.named_parameters())
    assert {name: (one.shape, one.dtype) for name, one in found.items()} == {
        name: (one.shape, one.dtype) for name, one in tensors.items()
    }
    assert all(parameter.is_meta for parameter in found.values())
    assert isinstance(model.get_submodule("layers.10.a"), nn.Module)


@pytest.mark.parametrize("names", [("a", "a.b"), ("a..b",), ("forward",)], ids=["both", "empty", "taken"])
def test_names_that_no_module_can_have_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    specs = specs_of(write_checkpoint(tmp_path, random_tensors(dict.fromkeys(names, (1,)))))
    with pytest.raises(PlacementError, match="no torch module can have a tensor of this name"):
        model_for(specs)


def test_dtype_that_torch_lacks_is_refused(tmp_path: Path) -> None:
    (spec,) = specs_of(write_checkpoint(tmp_path, random_tensors({"a": (1,)})))
    strange = msgspec.structs.replace(spec, dtype="F6_E2M3")
    with pytest.raises(UnsupportedFormatError, match="no such dtype"):
        model_for((strange,))


@pytest.mark.usefixtures("_direct")
def test_files_of_torch_save_are_measured(weightstream: Run, tmp_path: Path) -> None:
    whole = torch.rand(100, 30)
    torch.save({"whole": whole, "turned": whole.t(), "steps": torch.tensor(3)}, tmp_path / "model.bin")
    result = weightstream("bench", tmp_path, "--json")
    assert result.code == 0
    found: dict[str, Any] = json.loads(result.out)
    assert (found["num_tensors"], found["num_bytes"]) == (3, 2 * 12_000 + 8)
    assert [row["name"] for row in found["rows"]] == [*READS, "weightstream, cached"]
