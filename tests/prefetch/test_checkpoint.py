"""From a path to open shards: what is found, what may be opened, how index and headers must agree."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.builders import (
    INDEX,
    SINGLE,
    entry,
    leaves_nothing,
    random_tensors,
    raw_file,
    shard_name,
    unreadable,
    write_checkpoint,
    write_index,
    write_shard,
)
from weightstream.errors import (
    CheckpointError,
    HeaderError,
    IndexMismatchError,
    IntegrityError,
    MissingShardError,
    ReadError,
    UnsupportedFormatError,
)
from weightstream.prefetch.checkpoint import open_checkpoint
from weightstream.prefetch.header import MAX_STRINGS
from weightstream.prefetch.index import MAX_INDEX_BYTES

TENSORS = random_tensors({"a": [2, 3], "b": [5], "c": [], "d": [4, 1]})
FIRST, SECOND = shard_name(0, 2), shard_name(1, 2)


@pytest.fixture(autouse=True)
def _no_leaks() -> Generator[None, None, None]:
    with leaves_nothing():
        yield


@pytest.fixture(name="folder")
def fixture_folder(tmp_path: Path) -> Path:
    """A checkpoint of two shards: a and b in the first, c and d in the second."""
    return write_checkpoint(tmp_path / "checkpoint", TENSORS, num_shards=2)


def names_in(path: Path, *, allow_outside_links: bool = False) -> set[str]:
    with open_checkpoint(path, allow_outside_links=allow_outside_links) as checkpoint:
        return set(checkpoint.tensors)


# What is found


@pytest.mark.parametrize("given", ["folder", "index", "text"])
def test_shards_of_an_index_are_opened_and_their_bytes_are_found(folder: Path, given: str) -> None:
    path = {"folder": folder, "index": folder / INDEX}.get(given, str(folder))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.path == folder / INDEX
        assert [shard.path.name for shard in checkpoint.shards] == [FIRST, SECOND]
        assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
        for name, tensor in TENSORS.items():
            spec = checkpoint.tensors[name]
            shard = checkpoint.shards[spec.shard]
            assert shard.path.name == (FIRST if name in "ab" else SECOND)
            assert os.pread(shard.fd, spec.num_bytes, spec.begin) == tensor.numpy().tobytes()
            assert (spec.dtype, spec.shape) == ("F32", tuple(tensor.shape))


@pytest.mark.parametrize("given", ["folder", "file"])
def test_single_file_is_opened(tmp_path: Path, given: str) -> None:
    folder = write_checkpoint(tmp_path, TENSORS)
    with open_checkpoint(folder if given == "folder" else folder / SINGLE) as checkpoint:
        assert checkpoint.path == folder / SINGLE
        assert set(checkpoint.tensors) == set(TENSORS)


def test_index_of_another_name_may_be_named(folder: Path) -> None:
    write_index(folder, {"a": FIRST, "b": FIRST}, "half.safetensors.index.json")
    assert names_in(folder / "half.safetensors.index.json") == {"a", "b"}


def test_shards_may_lie_in_folders_below(tmp_path: Path) -> None:
    write_shard(tmp_path / "part" / "x.safetensors", {"a": TENSORS["a"]})
    write_index(tmp_path, {"a": "part/x.safetensors"})
    assert names_in(tmp_path) == {"a"}


def test_checkpoint_may_be_closed_twice(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    checkpoint.close()
    checkpoint.close()


# What is no checkpoint


def test_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder") as caught:
        open_checkpoint(tmp_path / "none")
    assert caught.value.file == str(tmp_path / "none")


@pytest.mark.parametrize("path", ["a\0b", "/proc/self/status/x"], ids=["NUL", "below a file"])
def test_path_that_cannot_be_there_is_refused(path: str) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(path)


# The index


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "not valid", id="empty"),
        pytest.param("[]", "not valid", id="array"),
        pytest.param("{}", "there is no `weight_map`", id="no weight_map"),
        pytest.param('{"weight_map":null}', "not valid", id="null"),
        pytest.param('{"weight_map":[]}', "not valid", id="array for weight_map"),
        pytest.param('{"weight_map":{"a":1}}', "Expected `str`, got `int`", id="number for a shard"),
        pytest.param('{"weight_map":{"a":["x"]}}', "Expected `str`", id="array for a shard"),
        pytest.param('{"weight_map":{"a":"x"}', "not valid", id="cut"),
        pytest.param('{"weight_map":' + "[" * 100_000, "not valid", id="deep"),
        pytest.param('{"weight_map":{"a":"x","a":"y"}}', "the key 'a' is there twice", id="doubled name"),
        pytest.param('{"weight_map":{"a":"x","\\u0061":"x"}}', "the key 'a' is there twice", id="escaped double"),
        pytest.param('{"weight_map":{"a":"x"},"weight_map":{"b":"x"}}', "'weight_map' is there twice", id="two maps"),
        pytest.param(
            '{"weight_m\\u0061p":{"a":"x"},"weight_map":{"b":"x"}}',
            "'weight_map' is there twice",
            id="two maps, escaped",
        ),
        pytest.param('{"weight_map":{"a\udcff":"x"}}', "not valid", id="not UTF-8"),
        pytest.param('{"weight_map":{"a":"x"},"y":"\udcff"}', "utf-8", id="not UTF-8 elsewhere"),
        pytest.param('{"y":{"z":1},"weight_map":{"a":"x"},"y":2}', "'y' is there twice", id="other member twice"),
        pytest.param('{"weight_map":{"a":"x"},"y":NaN}', "not valid", id="NaN elsewhere"),
        pytest.param('{"weight_map":{"a":"x"}}x', "trailing", id="more behind it"),
        pytest.param("[" + '""' * (MAX_STRINGS + 1), f"more than {MAX_STRINGS} strings", id="too many strings"),
        pytest.param('{"weight_map":{}}', "the index lists no tensors", id="no tensors"),
    ],
)
def test_malformed_index_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.file == str(tmp_path / INDEX)


def test_tensor_may_be_called_weight_map(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", {"weight_map": TENSORS["a"]})
    write_index(tmp_path, {"weight_map": "x.safetensors"})
    assert names_in(tmp_path) == {"weight_map"}


def test_other_members_of_the_index_do_not_matter(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", {"a": TENSORS["a"]})
    index = {"metadata": {"total_size": 1e3, "x": [None]}, "weight_map": {"a": "x.safetensors"}, "y": 1}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert names_in(tmp_path) == {"a"}


@pytest.mark.parametrize("gone", [FIRST, SECOND])
def test_missing_shard_is_named(folder: Path, gone: str) -> None:
    (folder / gone).unlink()
    with pytest.raises(MissingShardError, match=f"the shard does not exist. {INDEX} names it") as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder / gone)


def test_name_in_the_index_that_no_header_has_is_refused(folder: Path) -> None:
    write_index(folder, {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND, "e": SECOND})
    with pytest.raises(
        IndexMismatchError, match=rf"1 named in the index but in no header: e \(index: {SECOND}\)"
    ) as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder / INDEX)


def test_name_in_a_header_that_the_index_lacks_is_refused(folder: Path) -> None:
    write_index(folder, {"a": FIRST, "c": SECOND, "d": SECOND})
    with pytest.raises(IndexMismatchError, match=rf"does not name there: b \(in {FIRST}; index: not listed\)"):
        open_checkpoint(folder)


def test_tensor_in_another_shard_than_the_index_says_is_refused(folder: Path) -> None:
    write_index(folder, {"a": FIRST, "b": SECOND, "c": SECOND, "d": SECOND})
    with pytest.raises(IndexMismatchError, match=rf"b \(in {FIRST}; index: {SECOND}\)"):
        open_checkpoint(folder)


def test_tensor_in_two_shards_is_refused(folder: Path) -> None:
    write_shard(folder / SECOND, {name: TENSORS[name] for name in "bcd"})
    with pytest.raises(IndexMismatchError, match=rf"b \(in {SECOND}; index: {FIRST}\)"):
        open_checkpoint(folder)


def test_message_of_a_large_mismatch_is_short(folder: Path) -> None:
    write_index(folder, {f"x{i}": FIRST for i in range(1000)})
    with pytest.raises(IndexMismatchError, match=r"1000 named .* and 995 more") as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 1000


def test_header_that_breaks_the_format_is_refused(folder: Path) -> None:
    path = folder / SECOND
    path.write_bytes(raw_file({"c": entry("F32", [1], 0, 4)}, bytes(5)))
    with pytest.raises(HeaderError, match="longer than its header says") as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(path)


def test_truncated_shard_is_refused(folder: Path) -> None:
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)
    with pytest.raises(HeaderError, match="truncated"):
        open_checkpoint(folder)


def test_unknown_dtype_is_unsupported(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(raw_file({"a": entry("F5", [8], 0, 5)}, bytes(5)))
    with pytest.raises(UnsupportedFormatError, match="unknown dtype"):
        open_checkpoint(tmp_path)


def test_index_that_is_too_long_is_refused_before_it_is_read(folder: Path) -> None:
    os.truncate(folder / INDEX, MAX_INDEX_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"too long: expected at most {MAX_INDEX_BYTES} bytes") as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder / INDEX)


# What may be opened


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x.safetensors", "part/../../x.safetensors", "..", "", "x\0.safetensors", "x/" * 1_000_000],
    ids=["absolute", "parent", "parent in the middle", "two dots", "empty", "NUL", "a million folders"],
)
def test_shard_whose_name_is_no_plain_relative_path_is_refused(tmp_path: Path, name: str) -> None:
    write_shard(tmp_path / "x.safetensors", {"a": TENSORS["a"]})
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_index(folder, {"a": name})
    with pytest.raises(CheckpointError, match="not a plain relative path") as caught:
        open_checkpoint(folder, allow_outside_links=True)
    assert caught.value.file == str(folder / INDEX)


def link_shard(folder: Path, target: Path | str) -> None:
    (folder / SECOND).unlink(missing_ok=True)
    (folder / SECOND).symlink_to(target)


def test_link_to_inside_the_folder_is_followed(folder: Path) -> None:
    (folder / SECOND).rename(folder / "other")
    (folder / SECOND).symlink_to("other")
    assert names_in(folder) == set(TENSORS)


def test_folder_may_be_a_link_itself(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert names_in(tmp_path / "link") == set(TENSORS)


def test_link_to_outside_the_folder_needs_the_option(folder: Path, tmp_path: Path) -> None:
    (folder / SECOND).rename(tmp_path / "other")
    (folder / SECOND).symlink_to("../other")
    with pytest.raises(CheckpointError, match=r"link to outside .* Set prefetch\.allow_outside_links") as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder / SECOND)
    assert str(caught.value.actual) == str(tmp_path / "other")
    assert names_in(folder, allow_outside_links=True) == set(TENSORS)


def test_index_that_is_a_link_to_outside_needs_the_option_or_its_own_name(folder: Path, tmp_path: Path) -> None:
    (folder / INDEX).rename(tmp_path / "other")
    (folder / INDEX).symlink_to("../other")
    with pytest.raises(CheckpointError, match="link to outside") as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder / INDEX)
    assert names_in(folder, allow_outside_links=True) == set(TENSORS)
    assert names_in(folder / INDEX) == set(TENSORS)


@pytest.mark.parametrize("other", ["./" + FIRST, "link", "hard"])
def test_two_names_for_one_file_are_refused(folder: Path, other: str) -> None:
    (folder / "link").symlink_to(FIRST)
    (folder / "hard").hardlink_to(folder / FIRST)
    write_index(folder, {"a": FIRST, "b": other})
    with pytest.raises(CheckpointError, match=f"two names for one file: found also {FIRST}"):
        open_checkpoint(folder)


def test_link_through_a_folder_to_outside_needs_the_option(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / SECOND).rename(tmp_path / "elsewhere" / SECOND)
    (folder / "part").symlink_to(tmp_path / "elsewhere")
    write_index(folder, {"a": FIRST, "b": FIRST, "c": f"part/{SECOND}", "d": f"part/{SECOND}"})
    with pytest.raises(CheckpointError, match="link to outside"):
        open_checkpoint(folder)
    assert names_in(folder, allow_outside_links=True) == set(TENSORS)


def test_link_to_a_folder_whose_name_begins_alike_is_outside(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint2").mkdir()
    (folder / SECOND).rename(tmp_path / "checkpoint2" / SECOND)
    (folder / SECOND).symlink_to(tmp_path / "checkpoint2" / SECOND)
    with pytest.raises(CheckpointError, match="link to outside"):
        open_checkpoint(folder)


def hub_cache(tmp_path: Path, repository: str = "models--org--name") -> Path:
    """The cache of the Hugging Face hub: a snapshot whose files are links into the blobs beside it."""
    model = tmp_path / repository
    snapshot = write_checkpoint(model / "snapshots" / "0123abcd", TENSORS, num_shards=2)
    (model / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(model / "blobs" / f"{number:040x}")
        file.symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_links_into_the_blobs_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    assert names_in(hub_cache(tmp_path)) == set(TENSORS)


def share(snapshot: Path, *, digits: str = "ab" * 32, is_marked: bool = True) -> Path:
    """Move the blob of the second shard into the store that the cache's repositories share; return it."""
    blob = (snapshot / SECOND).resolve()
    store = snapshot.parents[2] / "blobs"
    (store / digits[:2]).mkdir(parents=True)
    if is_marked:
        (store / ".huggingface-shared-blobs").write_text("1\n")
    blob.rename(store / digits[:2] / digits)
    blob.symlink_to(f"../../blobs/{digits[:2]}/{digits}")
    return store / digits[:2] / digits


def test_blobs_that_repositories_of_the_hub_cache_share_are_followed_and_have_their_own_names(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    with open_checkpoint(snapshot) as checkpoint:
        names = [shard.blob for shard in checkpoint.shards]
    share(snapshot)
    with open_checkpoint(snapshot) as checkpoint:
        assert [shard.blob for shard in checkpoint.shards] == names
        assert {spec.name for spec in checkpoint.tensors.values()} == set(TENSORS)
    (snapshot / SECOND).unlink()
    link_shard(snapshot, tmp_path / "blobs" / "ab" / ("ab" * 32))
    with open_checkpoint(snapshot) as checkpoint:
        assert [shard.blob for shard in checkpoint.shards] == [names[0], None], "this name is no digest of the bytes"


@pytest.mark.parametrize(
    ("digits", "is_marked"),
    [("ab" * 32, False), ("ab" * 31, True), ("AB" * 32, True)],
    ids=["no marker", "short name", "capitals"],
)
def test_what_only_resembles_the_shared_store_is_outside(tmp_path: Path, digits: str, is_marked: object) -> None:
    snapshot = hub_cache(tmp_path)
    share(snapshot, digits=digits, is_marked=bool(is_marked))
    with pytest.raises(CheckpointError, match="link to outside"):
        open_checkpoint(snapshot)


def test_blobs_that_are_a_link_to_elsewhere_are_outside(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="link to outside"):
        open_checkpoint(snapshot)


def test_files_that_are_no_links_are_looked_at_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index may list tens of thousands: to look at each folder above each of them took seconds."""
    tensors = {f"t{number}": TENSORS["a"] for number in range(40)}
    write_checkpoint(tmp_path, tensors, num_shards=40)
    looks: list[object] = []
    lstat = os.lstat

    def count(path: str) -> os.stat_result:
        looks.append(path)
        return lstat(path)

    monkeypatch.setattr(os, "lstat", count)
    assert names_in(tmp_path) == set(tensors)
    assert len(looks) < 40 + 2 * len(tmp_path.parts) + 2


@pytest.mark.parametrize("repository", ["backups", "backups/models--org--name/other", "models--"])
def test_links_into_blobs_beside_other_folders_called_snapshots_are_outside(tmp_path: Path, repository: str) -> None:
    with pytest.raises(CheckpointError, match="link to outside"):
        open_checkpoint(hub_cache(tmp_path, repository))


def test_links_into_a_folder_in_the_blobs_of_the_hub_cache_are_outside(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    blob = (snapshot / SECOND).resolve()
    (blob.parent / "folder").mkdir()
    blob.rename(blob.parent / "folder" / "x")
    link_shard(snapshot, blob.parent / "folder" / "x")
    with pytest.raises(CheckpointError, match="link to outside"):
        open_checkpoint(snapshot)


def test_links_from_a_folder_in_a_snapshot_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    (snapshot / "folder").mkdir()
    for file in [one for one in snapshot.iterdir() if one.is_symlink()]:
        (snapshot / "folder" / file.name).symlink_to(f"../../../blobs/{file.resolve().name}")
    assert names_in(snapshot / "folder") == set(TENSORS)


def test_blob_that_was_not_fetched_is_a_missing_shard(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    (snapshot / SECOND).resolve().unlink()
    with pytest.raises(MissingShardError):
        open_checkpoint(snapshot)


def test_links_into_the_blobs_of_another_model_are_outside(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (snapshot / SECOND).resolve().rename(other / "x")
    link_shard(snapshot, other / "x")
    with pytest.raises(CheckpointError, match="link to outside"):
        open_checkpoint(snapshot)


def test_link_that_leads_to_itself_is_a_read_error(folder: Path) -> None:
    link_shard(folder, SECOND)
    with pytest.raises(ReadError, match="cannot open the file: Too many levels of symbolic links"):
        open_checkpoint(folder)


def test_links_that_follow_each_other_without_end_are_a_weightstream_error(folder: Path) -> None:
    for number in range(2000):
        (folder / f"link{number}").symlink_to(f"link{number + 1}")
    (folder / SECOND).rename(folder / "link2000")
    link_shard(folder, "link0")
    with pytest.raises((CheckpointError, ReadError), match=r"too many links|Too many levels"):
        open_checkpoint(folder)


def test_name_that_is_too_long_is_a_read_error(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "x" * 300})
    with pytest.raises(ReadError, match="File name too long"):
        open_checkpoint(tmp_path)


def put_special(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        here = Path.cwd()
        with socket.socket(socket.AF_UNIX) as listener:
            os.chdir(path.parent)  # a socket's address is short, and paths of tests are not
            try:
                listener.bind(path.name)
            finally:
                os.chdir(here)


@pytest.mark.parametrize("kind", ["folder", "FIFO", "device", "socket"])
@pytest.mark.parametrize("name", [SECOND, INDEX])
def test_what_is_not_a_regular_file_is_refused_without_blocking(folder: Path, kind: str, name: str) -> None:
    path = folder / name
    path.unlink()
    put_special(path, kind)
    with pytest.raises(CheckpointError, match="not a regular file") as caught:
        open_checkpoint(folder, allow_outside_links=True)
    assert caught.value.file == str(path)
    assert caught.value.actual == stat.filemode(path.stat().st_mode)


@pytest.mark.parametrize("name", [SECOND, INDEX])
def test_unreadable_file_is_a_read_error(folder: Path, name: str) -> None:
    path = folder / name
    with unreadable(path), pytest.raises(ReadError, match=r"Permission denied \(errno 13\), after 0 retries") as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(path)


def test_unreadable_folder_is_a_read_error(folder: Path) -> None:
    with unreadable(folder), pytest.raises(ReadError, match="cannot look for it: Permission denied") as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder)


def test_file_in_an_unreadable_folder_is_a_read_error(folder: Path) -> None:
    with unreadable(folder), pytest.raises(ReadError, match="cannot look for it: Permission denied"):
        open_checkpoint(folder / INDEX)


def test_failing_read_of_the_index_is_a_read_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, count: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", refuse)
    with pytest.raises(ReadError, match=r"cannot read the index at offset 0: Input/output error \(errno 5\), after 0 "):
        open_checkpoint(folder)


def test_descriptor_that_cannot_be_closed_keeps_no_other_open(folder: Path) -> None:
    opened = open_checkpoint(folder)
    os.close(opened.shards[0].fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        opened.close()
    for shard in opened.shards:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(shard.fd)


def test_file_that_a_server_forgets_while_it_is_opened_is_a_read_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgotten(fd: int) -> os.stat_result:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", forgotten)
        with pytest.raises(ReadError, match="Stale file handle"):
            open_checkpoint(folder)


def test_file_that_is_replaced_while_it_is_opened_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens = os.open

    def replace_first(path: Path, flags: int, *args: int) -> int:
        if path == folder / FIRST:
            (folder / FIRST).replace(folder / "old")
            write_shard(folder / FIRST, {"a": TENSORS["a"], "b": TENSORS["b"]})
        return opens(path, flags, *args)

    monkeypatch.setattr(os, "open", replace_first)
    with pytest.raises(IntegrityError, match="replaced while it was being opened") as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder / FIRST)


# Changes after the preflight


def test_unchanged_files_pass(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check_unchanged()


def rewrite(path: Path) -> None:
    """Write the same bytes again, at another time (given by hand: clocks of file systems are coarse)."""
    before = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def truncate(path: Path) -> None:
    before = path.stat()
    os.truncate(path, before.st_size - 1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    """Put another file with equal bytes and equal times there."""
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [rewrite, truncate, replace])
@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_changed_file_is_noticed(folder: Path, name: str, change: object) -> None:
    assert callable(change)
    with open_checkpoint(folder) as checkpoint:
        change(folder / name)
        with pytest.raises(
            IntegrityError, match=r"the file changed while it was being loaded: expected .* found"
        ) as caught:
            checkpoint.check_unchanged()
    assert caught.value.file == str(folder / name)


def test_removed_file_is_noticed(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        (folder / SECOND).unlink()
        with pytest.raises(IntegrityError, match=r"vanished .* No such file") as caught:
            checkpoint.check_unchanged()
    assert caught.value.file == str(folder / SECOND)
