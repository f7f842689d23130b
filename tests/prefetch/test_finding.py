"""Which file a path stands for: in a folder, by its own path, and in the Hugging Face cache; and what is not guessed."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.builders import INDEX, SINGLE, assert_same, random_tensors, write_checkpoint, write_index, write_shard
from weightstream.api import load_sync
from weightstream.config import LoaderConfig
from weightstream.errors import CheckpointError, UnsupportedFormatError
from weightstream.prefetch.checkpoint import open_checkpoint
from weightstream.prefetch.finding import find_checkpoint, is_repository

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BIN_SHARDS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
TENSORS = random_tensors({"a": (2, 3), "b": (4,)})


def touch(folder: Path, names: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("names", "found"),
    [
        pytest.param([INDEX, *SHARDS], INDEX, id="index and its shards"),
        pytest.param([SINGLE, "config.json", "tokenizer.json"], SINGLE, id="single file"),
        pytest.param(["other.safetensors"], "other.safetensors", id="one file of another name"),
        pytest.param(["model-00001-of-00001.safetensors"], "model-00001-of-00001.safetensors", id="one of one"),
        pytest.param(["unet.safetensors.index.json", *SHARDS], "unet.safetensors.index.json", id="another index"),
        pytest.param([INDEX, *SHARDS, "model.fp16.safetensors"], INDEX, id="index before a variant of it"),
        pytest.param(
            [SINGLE, "model.fp16.safetensors", "model.non_ema.safetensors"], SINGLE, id="file before variants"
        ),
        pytest.param(["model.fp16.safetensors"], "model.fp16.safetensors", id="only a variant"),
        pytest.param(
            ["model.fp16.safetensors.index.json", "model.fp16-00001-of-00002.safetensors"],
            "model.fp16.safetensors.index.json",
            id="only an index of a variant",
        ),
        pytest.param(["pytorch_model.bin.index.json", *BIN_SHARDS], "pytorch_model.bin.index.json", id="bin index"),
        pytest.param(["pytorch_model.bin", "training_args.bin", "optimizer.bin"], "pytorch_model.bin", id="bin"),
        pytest.param(["model.pt", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"], "model.pt", id="pt"),
        pytest.param(["consolidated.00.pth", "params.json"], "consolidated.00.pth", id="pth"),
        pytest.param([SINGLE, "adapter_model.safetensors", "adapter_model.bin"], SINGLE, id="beside an adapter"),
        pytest.param(
            ["pytorch_model.bin", "adapter_model.safetensors"], "pytorch_model.bin", id="an adapter wins nothing"
        ),
    ],
)
def test_folder_stands_for_the_one_checkpoint_in_it(tmp_path: Path, names: list[str], found: str) -> None:
    assert find_checkpoint(touch(tmp_path, names)).path == tmp_path / found


@pytest.mark.parametrize(
    ("names", "found"),
    [
        pytest.param([SINGLE, "model.fp16.safetensors"], "model.fp16.safetensors", id="file"),
        pytest.param([INDEX, "model.fp16.safetensors.index.json"], "model.fp16.safetensors.index.json", id="index"),
        pytest.param(
            [INDEX, "model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"],
            "model.safetensors.index.fp16.json",
            id="index as transformers names it",
        ),
        pytest.param(["pytorch_model.bin", "pytorch_model.fp16.bin"], "pytorch_model.fp16.bin", id="bin"),
    ],
)
def test_variant_is_chosen_where_it_is_asked_for(tmp_path: Path, names: list[str], found: str) -> None:
    touch(tmp_path, names)
    assert find_checkpoint(tmp_path, variant="fp16").path == tmp_path / found


def test_variant_that_is_not_there_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, [SINGLE, "model.fp16.safetensors"])
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of this variant: expected prefetch\.variant bf16"
    ) as caught:
        find_checkpoint(tmp_path, variant="bf16")
    assert caught.value.actual == f"model.fp16.safetensors, {SINGLE}"


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["a.safetensors", "b.safetensors"], id="files"),
        pytest.param(["a.safetensors.index.json", "b.safetensors.index.json"], id="indexes"),
        pytest.param(["consolidated.safetensors", SINGLE], id="consolidated and single"),
        pytest.param(["model.bf16.safetensors", "model.fp16.safetensors"], id="variants alone"),
        pytest.param(["consolidated.00.pth", "consolidated.01.pth"], id="parts for several processes"),
        pytest.param(["a.bin", "b.pt"], id="pickles"),
    ],
)
def test_folder_with_several_candidates_is_refused_and_lists_them(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(
        CheckpointError, match="several checkpoints: found {}, {}. Give the path".format(*names)
    ) as caught:
        find_checkpoint(touch(tmp_path, names))
    assert caught.value.hint is not None
    assert str(tmp_path / names[0]) in caught.value.hint
    assert ("prefetch.variant" in caught.value.hint) == (names[0] == "model.bf16.safetensors")  # where it would help


@pytest.mark.parametrize("name", ["consolidated.safetensors", SINGLE], ids=["consolidated", "single"])
def test_file_beside_an_index_that_does_not_list_it_is_a_rival(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, TENSORS, num_shards=2)
    write_shard(tmp_path / name, TENSORS)
    with pytest.raises(CheckpointError, match=f"several checkpoints: found {INDEX}, {name}") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint == (
        f"Give the path of the one that is meant instead of the folder's, such as {tmp_path / INDEX}"
    )
    for choice in (name, INDEX):
        with open_checkpoint(tmp_path / choice) as checkpoint:
            assert (checkpoint.path, set(checkpoint.tensors)) == (tmp_path / choice, set(TENSORS))


def test_file_that_the_index_lists_is_a_shard_whatever_its_name(tmp_path: Path) -> None:
    write_shard(tmp_path / "anything.safetensors", TENSORS)
    write_index(tmp_path, dict.fromkeys(TENSORS, "anything.safetensors"))
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(TENSORS)


@pytest.mark.parametrize("shards", [SHARDS, BIN_SHARDS], ids=["safetensors", "bin"])
def test_shards_without_their_index_are_refused(tmp_path: Path, shards: list[str]) -> None:
    with pytest.raises(CheckpointError, match=f"no index that says what is in them: .* found {shards[0]}, {shards[1]}"):
        find_checkpoint(touch(tmp_path, shards))


def test_safetensors_win_and_the_report_says_so(tmp_path: Path) -> None:
    found = find_checkpoint(touch(tmp_path, [SINGLE, "pytorch_model.bin", "training_args.bin"]))
    assert found.path == tmp_path / SINGLE
    assert found.notes == ("format: safetensors files are there and were taken; left alone: pytorch_model.bin",)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"the folder is empty: expected {INDEX}"):
        find_checkpoint(tmp_path)


def test_folder_without_weights_is_refused_and_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a checkpoint: expected .*, found README\.md") as caught:
        find_checkpoint(touch(tmp_path, ["README.md"]))
    assert type(caught.value) is CheckpointError


def test_folder_with_an_adapter_alone_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model is here.* found adapter_model\.safetensors"):
        find_checkpoint(touch(tmp_path, ["adapter_model.safetensors", "adapter_config.json"]))
    assert find_checkpoint(tmp_path / "adapter_model.safetensors").named


@pytest.mark.parametrize("name", ["a.gguf", "tf_model.h5"])
def test_folder_with_other_formats_alone_is_unsupported(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedFormatError, match=f"cannot be loaded: found {name}"):
        find_checkpoint(touch(tmp_path, [name]))


@pytest.mark.parametrize("name", ["model.gguf", "config.json", "safetensors"])
def test_file_of_another_format_is_unsupported(tmp_path: Path, name: str) -> None:
    touch(tmp_path, [name])
    with pytest.raises(UnsupportedFormatError, match=r"not a checkpoint .* expected a folder, \*\.index\.json"):
        find_checkpoint(tmp_path / name)


# The Hugging Face cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as the library lays it out, with a repository that has a branch and a tag; and no network at all."""
    model = tmp_path / "hub" / "models--org--name"
    for revision, seed in (("a" * 40, 0), ("b" * 40, 1)):
        snapshot = write_checkpoint(
            model / "snapshots" / revision, random_tensors({"a": (2, 3)}, seed=seed), num_shards=1
        )
        (model / "blobs").mkdir(exist_ok=True)
        (snapshot / SINGLE).rename(model / "blobs" / revision)
        (snapshot / SINGLE).symlink_to(f"../../blobs/{revision}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    (model / "refs" / "v1").write_text("b" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(*_: object) -> None:
        raise AssertionError("a socket was made")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.chdir(tmp_path)
    return model


@pytest.mark.parametrize(
    ("given", "revision"),
    [("org/name", "a"), ("org/name@main", "a"), ("org/name@v1", "b"), ("org/name@" + "b" * 40, "b")],
    ids=["main", "branch", "tag", "commit"],
)
def test_repository_is_found_in_the_local_cache(cache: Path, given: str, revision: str) -> None:
    with open_checkpoint(given) as checkpoint:
        assert checkpoint.path == cache / "snapshots" / (revision * 40) / SINGLE
        assert set(checkpoint.tensors) == {"a"}


@pytest.mark.parametrize("strategy", ["stream", "preload", "direct", "map"])
def test_repository_is_loaded_by_its_name_without_a_network(cache: Path, strategy: str) -> None:
    model = nn.Module()
    model.register_buffer("a", torch.empty(2, 3, device="meta"))
    config = LoaderConfig.model_validate(
        {"strategy": strategy, "device": {"target": "cpu"}, "checkpoint": "org/name@v1"}
    )
    report = load_sync(model, config=config)
    assert_same(model.get_buffer("a"), random_tensors({"a": (2, 3)}, seed=1)["a"])
    assert report.checkpoint == str(cache / "snapshots" / ("b" * 40) / SINGLE)


def test_local_path_goes_before_the_cache(cache: Path) -> None:
    write_checkpoint(Path("org/name"), TENSORS)
    assert find_checkpoint("org/name").path == Path("org/name") / SINGLE


@pytest.mark.parametrize("given", ["org/other", "org/name@v2", "org/na--me", "org/name@" + "c" * 40])
def test_what_is_not_in_the_cache_is_refused_and_never_fetched(cache: Path, given: str) -> None:
    with pytest.raises(CheckpointError, match="nor a repository in the local Hugging Face cache") as caught:
        find_checkpoint(given)
    assert caught.value.file == given


def test_without_the_library_the_error_says_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"no such file or folder\. .* install weightstream\[hub\]"):
        find_checkpoint("org/name")


def test_where_the_cache_is_comes_from_the_environment() -> None:
    """The library reads HF_HOME and HF_HUB_CACHE when it is imported; this holds it to the names that we document."""
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    for variables, expected in (({"HF_HOME": "/x"}, "/x/hub"), ({"HF_HUB_CACHE": "/y"}, "/y")):
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/name", True),
        ("org/name@v1.0", True),
        ("/org/name", False),
        ("./name", False),
        ("../name", False),
        ("org/../x", False),
        ("a/b/c", False),
        ("name", False),
        ("org/na\0me", False),
    ],
)
def test_names_of_repositories_have_two_parts(path: str, expected: bool) -> None:  # noqa: FBT001
    assert is_repository(path) is expected
