"""`weightstream verify`: what is in a checkpoint's files, against what should be."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.builders import flip, open_files, write_checkpoint, write_sums
from tests.cli.conftest import Run, Start
from tests.fakes.filesystem import Behaviour, Fault, mounted
from tests.fakes.fixtures import requires_fuse
from weightstream import hashing
from weightstream.prefetch.digests import MANIFEST_NAME


@pytest.fixture(name="folder")
def fixture_folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "c", {name: torch.rand(100, 7) for name in "abcdef"}, num_shards=3)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_good_checkpoint(weightstream: Run, folder: Path) -> None:
    write_sums(folder)
    result = weightstream("verify", folder, "--quiet")
    assert not any(".safetensors" in file for file in open_files().values())
    assert (result.code, result.err) == (0, "")
    assert "3 of 3 files are what they should be" in result.out
    assert result.out.count("says the manifest  OK") == 3


def test_every_wrong_file_is_named(weightstream: Run, folder: Path) -> None:
    write_sums(folder)
    first, second, third = sorted(folder.glob("*.safetensors"))
    expected = sha256(first)
    for file in (first, third):
        flip(file, file.stat().st_size - 1)
    result = weightstream("verify", folder, "--quiet")
    assert result.code == 1
    assert "1 of 3 files are what they should be" in result.out
    assert result.out.count("WRONG") == 2
    for text in (first.name, third.name, expected, sha256(first)):
        assert text in result.out
    result = weightstream("verify", folder, "--json")
    assert result.code == 1
    found = json.loads(result.out)
    assert (found["ok"], found["num_shards"]) == (False, 3)
    assert found["num_bytes"] == sum(file.stat().st_size for file in (first, second, third))
    assert [shard["status"] for shard in found["shards"]] == ["wrong", "ok", "wrong"]
    assert [shard["sha256"] for shard in found["shards"]] == [sha256(file) for file in (first, second, third)]
    assert found["shards"][0]["expected"] == expected
    assert found["shards"][0]["source"] == "manifest"


def test_unknown_is_not_good(weightstream: Run, folder: Path) -> None:
    result = weightstream("verify", folder, "--json", "--quiet")
    assert (result.code, result.err) == (1, "")
    found = json.loads(result.out)
    assert (found["ok"], {shard["status"] for shard in found["shards"]}) == (False, {"unknown"})
    assert "--write-manifest" in weightstream("verify", folder).out


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum")
def test_sha256sum_accepts_what_it_writes(weightstream: Run, folder: Path) -> None:
    result = weightstream("verify", folder, "--write-manifest")
    assert result.code == 0
    assert "0 of 3 files are what they should be, and 3 are in the manifest from now on" in result.out
    assert str(folder / "SHA256SUMS") in result.out
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)
    assert weightstream("verify", folder).code == 0


def test_manifest_is_replaced_only_by_force(weightstream: Run, folder: Path) -> None:
    manifest = folder / "SHA256SUMS"
    manifest.write_text(f"{'0' * 64}  model-00001-of-00003.safetensors\n")
    before = manifest.read_bytes()
    result = weightstream("verify", folder, "--write-manifest")
    assert (result.code, result.out) == (2, "")
    assert "SHA256SUMS exists: --force replaces it" in result.err
    assert manifest.read_bytes() == before
    assert weightstream("verify", folder, "--force").code == 2
    assert weightstream("verify", folder, "--write-manifest", "--force").code == 0
    assert weightstream("verify", folder).code == 0


@pytest.fixture(name="full_disk")
def fixture_full_disk(folder: Path, tmp_path: Path) -> Iterator[Path]:
    """The checkpoint on a file system of its own, a real one, with no byte left beside it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield Path(shutil.copytree(folder, disk / "model"))
    finally:
        subprocess.run(["umount", disk], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(disk).free == 0


@pytest.mark.parametrize("options", [(), ("--json", "--quiet")], ids=["text", "json"])
def test_full_disk_leaves_no_half_manifest(weightstream: Run, full_disk: Path, options: tuple[str, ...]) -> None:
    fill(full_disk.parent)
    before = sorted(full_disk.iterdir())
    result = weightstream("verify", full_disk, "--write-manifest", *options)
    assert (result.code, result.out) == (1, "")
    assert (
        result.err.splitlines()[-1] == f"error: {full_disk / MANIFEST_NAME}: No space left on device (-v shows where)"
    )
    assert sorted(full_disk.iterdir()) == before


def test_full_disk_leaves_the_manifest_that_is_there(weightstream: Run, full_disk: Path) -> None:
    assert weightstream("verify", full_disk, "--write-manifest").code == 0
    manifest = (full_disk / MANIFEST_NAME).read_bytes()
    fill(full_disk.parent)
    before = sorted(full_disk.iterdir())
    assert weightstream("verify", full_disk, "--write-manifest", "--force").code == 1
    assert (full_disk / MANIFEST_NAME).read_bytes() == manifest
    assert sorted(full_disk.iterdir()) == before
    assert weightstream("verify", full_disk).code == 0


def test_wrong_file_is_not_written_down_as_right(weightstream: Run, folder: Path) -> None:
    write_sums(folder, "published.sha256")
    flip(min(folder.glob("*.safetensors")), 2000)
    result = weightstream("verify", folder, "--write-manifest", "--json")
    assert result.code == 1
    assert json.loads(result.out)["manifest"] is None
    assert not (folder / "SHA256SUMS").exists()


def test_progress_is_told_on_standard_error(weightstream: Run, folder: Path) -> None:
    write_sums(folder)
    result = weightstream("verify", folder)
    assert "hashed" in result.err
    assert "(100%)" in result.err
    assert "hashed 8" not in result.out


@pytest.mark.parametrize(
    ("args", "code"),
    [(["/nowhere"], 1), ([], 2), (["--nonsense", "x"], 2)],
    ids=["no-checkpoint", "no-path", "unknown"],
)
def test_exit_codes(weightstream: Run, args: list[str], code: int) -> None:
    result = weightstream("verify", *args)
    assert (result.code, result.out) == (code, "")
    assert result.err


def test_file_that_cannot_be_read(weightstream: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setenv("WEIGHTSTREAM_PREFETCH__RETRIES", "0")
    monkeypatch.setattr(os, "preadv", broken)
    write_sums(folder)
    result = weightstream("verify", folder)
    assert not any(".safetensors" in file for file in open_files().values())
    assert (result.code, result.out) == (1, "")
    assert "cannot read at offset 136: Input/output error (errno 5), after 0 retries" in result.err


def test_thread_that_ends_early_does_not_make_a_digest(
    weightstream: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_PIECE_BYTES", 2**62)  # more memory than there is
    result = weightstream("verify", folder, "--write-manifest", "--quiet")
    assert (result.code, result.out) == (1, "")
    assert "MemoryError" in result.err
    assert not (folder / "SHA256SUMS").exists()


def test_hashes_without_torch(folder: Path) -> None:
    write_sums(folder)
    program = (
        "import sys\n"
        "from weightstream.commands import run\n"
        f"code = run(['verify', {os.fspath(folder)!r}, '--quiet'])\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, capture_output=True).returncode == 0


def test_files_of_torch_save_are_hashed_whole(weightstream: Run, tmp_path: Path) -> None:
    """Also if their tensors share bytes, which a load that verifies refuses."""
    whole = torch.rand(4, 3)
    file = tmp_path / "model.bin"
    torch.save({"a": whole, "b": whole[1:]}, file)
    assert weightstream("verify", file, "--write-manifest", "--quiet").code == 0
    result = weightstream("verify", file, "--json", "--quiet")
    assert (result.code, json.loads(result.out)["shards"][0]["sha256"]) == (0, sha256(file))
    flip(file, file.read_bytes().index(b"ZZZZ"))  # padding, which nothing else looks at
    assert weightstream("verify", file, "--quiet").code == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_unfinished_manifest_does_not_stay_behind(start: Start, folder: Path, number: signal.Signals) -> None:
    running = start("verify", folder, "--write-manifest", prepare="os.fsync = lambda fd: hang()")
    running.wait_for("REACHED")
    assert len(list(folder.glob(f".{MANIFEST_NAME}.*"))) == 1
    assert running.end_by(number).code == 128 + number
    assert list(folder.glob(f"*{MANIFEST_NAME}*")) == []


@requires_fuse
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_header_that_cannot_be_read_once_is_read_again(weightstream: Run, folder: Path, command: str) -> None:
    write_sums(folder)
    fault = Fault(sorted(folder.glob("*.safetensors"))[1].name, "error", request=0)
    with mounted(folder, Behaviour(faults=(fault,), is_cached=False)) as mount:
        result = weightstream(command, mount.path)
        assert mount.statistics().num_faults == (1,)
    assert result.code == 0, result.err


@requires_fuse
def test_repeated_reads_are_counted(weightstream: Run, folder: Path) -> None:
    write_sums(folder)
    faults = (
        Fault(MANIFEST_NAME, "error"),
        Fault(sorted(folder.glob("*.safetensors"))[1].name, "error", request=0),
    )
    with mounted(folder, Behaviour(faults=faults, is_cached=False)) as mount:
        result = weightstream("verify", mount.path, "--json")
        assert mount.statistics().num_faults == (1, 1)
    assert (result.code, json.loads(result.out)["num_retries"]) == (0, 2), result.err


@requires_fuse
def test_summary_says_that_reads_were_repeated(weightstream: Run, folder: Path) -> None:
    write_sums(folder)
    with mounted(folder, Behaviour(faults=(Fault(MANIFEST_NAME, "error"),), is_cached=False)) as mount:
        result = weightstream("verify", mount.path)
    assert result.code == 0
    assert ["retries", "1"] in [line.split() for line in result.out.splitlines()]
