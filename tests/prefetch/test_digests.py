"""What the SHA-256 of a file should be: who says so, and in which form."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.builders import obeying_modes, random_tensors, write_checkpoint, write_shard, write_sums
from weightstream.errors import CheckpointError, IntegrityError, ReadError
from weightstream.prefetch.checkpoint import open_checkpoint
from weightstream.prefetch.digests import MANIFEST_NAME, Digest, find_digests, no_digest, parse_manifest, write_manifest

A, B = "a" * 64, "b" * 64


@pytest.fixture(name="folder")
def fixture_folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "c", random_tensors({"a": (3, 4), "b": (5,)}), num_shards=2)


def digests(path: Path, *, allow_outside_links: bool = False) -> list[Digest | None]:
    with open_checkpoint(path, allow_outside_links=allow_outside_links) as checkpoint:
        return find_digests(checkpoint, allow_outside_links=allow_outside_links)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (f"{A}  x.safetensors\n", "x.safetensors"),
        (f"{A} *x.safetensors\n", "x.safetensors"),
        (f"{A}  ./x.safetensors\n", "x.safetensors"),
        (f"{A}  sub//x.safetensors", "sub/x.safetensors"),
        (f"{A.upper()}  x\n", "x"),
        (f"{A}  x\r\n", "x"),
        (f"# made by hand\n\n{A}  x\n", "x"),
        (f"{A}   x \n", " x "),
        (f"{A} **x\n", "*x"),
        (f"\\{A}  a\\\\b\\nc\\rd\n", "a\\b\nc\rd"),
        (f"{A}  a\\nb\n", "a\\nb"),
        (f"{A}  \udcff\n", "\udcff"),
    ],
    ids=[
        "text", "binary", "dot", "folder", "capitals", "carriage-return", "comment", "spaces", "asterisk", "escaped",
        "backslash-that-escapes-nothing", "not-utf-8",
    ],
)  # fmt: skip
def test_line_of_a_manifest(line: str, name: str) -> None:
    assert parse_manifest(os.fsencode(line), file="SHA256SUMS") == [(name, A)]


@pytest.mark.parametrize(
    "line",
    [A, f"{A}  ", f"{A} x", f"{A[:-1]}  x", f"{A}a  x", f"{'g' * 64}  x", f"SHA256 (x) = {A}", f"\\{A}  a\\tb", f"\\{A}  a\\"],
    ids=["no-name", "empty-name", "one-space", "short", "long", "no-digits", "bsd", "unknown-escape", "cut-escape"],
)  # fmt: skip
def test_line_that_is_not_in_the_format_is_named(line: str) -> None:
    with pytest.raises(CheckpointError, match="line 2 of the manifest is not in the format of sha256sum"):
        parse_manifest(f"{B}  y\n{line}\n".encode(), file="SHA256SUMS")


@pytest.mark.parametrize("name", ["SHA256SUMS", "weights.sha256"])
def test_manifest_says_it(folder: Path, name: str) -> None:
    write_sums(folder, name)
    files = sorted(folder.glob("*.safetensors"))
    assert digests(folder) == [Digest(sha256(file), "manifest") for file in files]
    assert digests(files[1]) == [Digest(sha256(files[1]), "manifest")]


def test_several_manifests_say_it_together(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        (folder / f"{file.name}.sha256").write_text(f"{sha256(file)}  {file.name}\n")
    assert digests(folder) == [Digest(sha256(file), "manifest") for file in files]


def test_nobody_says_it(folder: Path) -> None:
    assert digests(folder) == [None, None]
    (folder / "SHA256SUMS").write_text(f"{A}  config.json\n{A}  /{folder}/model-00001-of-00002.safetensors\n")
    assert digests(folder) == [None, None]
    with open_checkpoint(folder) as checkpoint:
        error = str(no_digest(checkpoint.shards[0]))
    assert str(folder) in error
    assert "verify --write-manifest" in error


def test_manifests_that_disagree_are_refused(folder: Path) -> None:
    write_sums(folder)
    write_sums(folder, "other.sha256")
    assert None not in digests(folder)
    (folder / "other.sha256").write_text(f"{A}  model-00001-of-00002.safetensors\n")
    with pytest.raises(IntegrityError, match="two opinions"):
        digests(folder)
    with open_checkpoint(folder) as checkpoint:
        assert find_digests(checkpoint, except_manifest="SHA256SUMS")[0] == Digest(A, "manifest")


def snapshot(tmp_path: Path, digest: str) -> Path:
    """A file as it lies in the Hugging Face cache, under a name of our choice."""
    blobs, revision = tmp_path / "models--o--n" / "blobs", tmp_path / "models--o--n" / "snapshots" / "1234"
    revision.mkdir(parents=True)
    write_shard(blobs / digest, random_tensors({"a": (3,)}))
    (revision / "model.safetensors").symlink_to(Path("../../blobs") / digest)
    return revision


def test_blob_of_the_hub_s_cache_is_named_by_it(tmp_path: Path) -> None:
    revision = snapshot(tmp_path, A)
    assert digests(revision) == digests(revision / "model.safetensors") == [Digest(A, "hub")]
    (revision / "SHA256SUMS").write_text(f"{A}  model.safetensors\n")
    assert digests(revision) == [Digest(A, "manifest")]
    (revision / "SHA256SUMS").write_text(f"{B}  model.safetensors\n")
    with pytest.raises(IntegrityError, match="two opinions"):
        digests(revision)


@pytest.mark.parametrize("name", ["c" * 40, "A" * 64, A + ".incomplete"], ids=["git-hash", "capitals", "other"])
def test_other_blob_s_name_says_nothing(tmp_path: Path, name: str) -> None:
    revision = snapshot(tmp_path, name)
    assert digests(revision) == [None]
    with open_checkpoint(revision) as checkpoint:
        assert name in str(no_digest(checkpoint.shards[0]))


def test_link_to_elsewhere_says_nothing(tmp_path: Path) -> None:
    write_shard(tmp_path / "elsewhere" / A, random_tensors({"a": (3,)}))
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere" / A)
    assert digests(folder, allow_outside_links=True) == [None]


def test_manifest_is_opened_by_the_rules_for_shards(folder: Path, tmp_path: Path) -> None:
    elsewhere = write_sums(folder).rename(tmp_path / "sums")
    (folder / "SHA256SUMS").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="outside the checkpoint's folder"):
        digests(folder)
    assert None not in digests(folder, allow_outside_links=True)
    (folder / "SHA256SUMS").unlink()
    os.mkfifo(folder / "SHA256SUMS")
    with pytest.raises(CheckpointError, match="not a regular file"):
        digests(folder)
    (folder / "SHA256SUMS").unlink()
    with (folder / "SHA256SUMS").open("wb") as file:
        file.truncate(2**24 + 1)
    with pytest.raises(CheckpointError, match="the manifest is too long"):
        digests(folder)


def test_folder_that_cannot_be_listed(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint, obeying_modes():
        folder.chmod(0o100)
        try:
            with pytest.raises(ReadError, match="cannot look for a manifest"):
                find_digests(checkpoint)
        finally:
            folder.chmod(0o700)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum")
def test_sha256sum_accepts_what_is_written_and_writes_what_is_accepted(tmp_path: Path) -> None:
    names = ["plain", "with space", " led", "back\\slash", "line\nfeed", "return\r", "*", "#x", "\udcff"]
    for name in names:
        (tmp_path / name).write_bytes(os.fsencode(name))
    found = [(name, sha256(tmp_path / name)) for name in names]
    path = write_manifest(tmp_path, found)
    assert path == tmp_path / "SHA256SUMS"
    check = subprocess.run(["sha256sum", "-c", "--strict", path.name], cwd=tmp_path, capture_output=True, check=False)
    assert (check.returncode, check.stdout.count(b": OK")) == (0, len(names)), check
    assert parse_manifest(path.read_bytes(), file="") == found
    theirs = subprocess.run(
        ["sha256sum", "--", *map(os.fsencode, names)], cwd=tmp_path, capture_output=True, check=True
    )
    assert parse_manifest(theirs.stdout, file="") == found


def test_manifest_that_is_there_is_replaced_only_if_asked(tmp_path: Path) -> None:
    write_manifest(tmp_path, [("x", A)])
    with pytest.raises(FileExistsError):
        write_manifest(tmp_path, [("x", B)])
    assert parse_manifest((tmp_path / "SHA256SUMS").read_bytes(), file="") == [("x", A)]
    write_manifest(tmp_path, [("x", B)], overwrite=True)
    assert parse_manifest((tmp_path / "SHA256SUMS").read_bytes(), file="") == [("x", B)]
    assert os.listdir(tmp_path) == ["SHA256SUMS"]


def test_what_another_process_has_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """Also where this one has its number now."""
    (tmp_path / f".{MANIFEST_NAME}.{os.getpid()}").touch()
    assert write_manifest(tmp_path, [("x", A)]) == tmp_path / MANIFEST_NAME


def test_manifest_that_cannot_be_finished_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_manifest(tmp_path, [("x", A)])
    assert os.listdir(tmp_path) == []
