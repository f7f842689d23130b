"""Bad input, from the front door: each kind has its own error, the model stays untouched, nothing leaks."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import weightstream as ws
from tests.builders import INDEX, leaves_nothing, shard_name, unreadable, write_checkpoint, write_index, write_shard
from tests.models import SmallNet, tensors_of
from weightstream.device.backend import Backend
from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.prefetch.config import PrefetchConfig
from weightstream.prefetch.source import ByteRange, FileSource
from weightstream.scheduler.machine import Machine, open_backend

KIB = 1024
FIRST, SECOND = shard_name(0, 2), shard_name(1, 2)


def make_config(**device: object) -> ws.LoaderConfig:
    """Small chunks, so that a load has many reads; one thread, so that their order is known."""
    return ws.LoaderConfig.model_validate(
        {
            "strategy": "stream",
            "prefetch": {"workers": 1, "chunk": 64 * KIB, "host_memory": 2**20},
            "device": {"target": "cpu", **device},
        }
    )


def make_model(kind: str) -> nn.Module:
    if kind == "meta":
        with torch.device("meta"):
            return SmallNet()
    model = SmallNet()
    model.load_state_dict(tensors_of(model, seed=1))
    return model


def run(how: str, model: nn.Module, path: Path, config: ws.LoaderConfig) -> ws.LoadReport:
    if how == "load_sync":
        return ws.load_sync(model, path, config=config)
    return asyncio.run(ws.load(model, path, config=config))


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Check that the model has the same tensor objects as before, on the same devices, with the same bytes."""
    before = {
        name: (tensor, tensor.device, tensor._version, None if tensor.is_meta else tensor.detach().clone())
        for name, tensor in tensors_in(model)
    }
    yield
    assert [name for name, _ in tensors_in(model)] == list(before)
    for name, tensor in tensors_in(model):
        same, device, version, values = before[name]
        assert tensor is same, name
        assert tensor.device == device, name
        if values is not None:
            assert tensor._version == version, name
            assert torch.equal(tensor, values), name


def tensors_in(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


# What is wrong with a checkpoint


class Wrong(NamedTuple):
    """What a broken checkpoint must be answered with. The parts are searched for in the message; `{folder}` is known."""

    error: type[ws.WeightstreamError]
    parts: Sequence[str]
    tensor: str | None = None
    file: str | None = None


def rewrite_shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Write the second shard anew with other tensors, and the index with it."""
    tensors = tensors_of(SmallNet())
    change(tensors)
    for file in folder.iterdir():
        file.unlink()
    write_checkpoint(folder, tensors, num_shards=2)


def missing_shard(folder: Path) -> Wrong:
    (folder / SECOND).unlink()
    return Wrong(ws.MissingShardError, [SECOND, "does not exist", "fetch it again"], file=SECOND)


def truncated_shard(folder: Path) -> Wrong:
    size = (folder / SECOND).stat().st_size
    os.truncate(folder / SECOND, size - 100)
    return Wrong(
        ws.HeaderError,
        ["truncated", f"expected {size} bytes", f"found {size - 100} bytes", "Fetch the file again"],
        file=SECOND,
    )


def shard_cut_in_its_header(folder: Path) -> Wrong:
    os.truncate(folder / SECOND, 20)
    return Wrong(ws.HeaderError, ["ends inside its header", "bytes or more, found 20 bytes"], file=SECOND)


def index_of(folder: Path) -> dict[str, str]:
    names = list(tensors_of(SmallNet()))
    half = len(names) // 2
    return {name: FIRST if number < half else SECOND for number, name in enumerate(names)}


def name_only_in_the_index(folder: Path) -> Wrong:
    write_index(folder, index_of(folder) | {"layers.9.weight": SECOND})
    return Wrong(ws.IndexMismatchError, ["in no header: layers.9.weight", SECOND], file=INDEX)


def name_only_in_a_header(folder: Path) -> Wrong:
    weight_map = index_of(folder)
    del weight_map["scale"]
    write_index(folder, weight_map)
    return Wrong(ws.IndexMismatchError, ["scale (in", "index: not listed"], file=INDEX)


def wrong_shape(folder: Path) -> Wrong:
    rewrite_shard(folder, lambda tensors: tensors.update({"layers.2.bias": torch.zeros(41)}))
    return Wrong(
        ws.ShapeMismatchError,
        ["expected (40,) (model)", "found (41,) (checkpoint)"],
        tensor="layers.2.bias",
        file=SECOND,
    )


def wrong_dtype(folder: Path) -> Wrong:
    rewrite_shard(folder, lambda tensors: tensors.update({"layers.2.bias": torch.zeros(40, dtype=torch.int8)}))
    return Wrong(
        ws.DtypeMismatchError,
        ["expected torch.float32 (model)", "found torch.int8 (checkpoint)"],
        tensor="layers.2.bias",
        file=SECOND,
    )


def missing_keys(folder: Path) -> Wrong:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["scale"], tensors["layers.0.bias"]

    rewrite_shard(folder, drop)
    return Wrong(ws.MissingKeysError, ["2 tensors of the model are not in the checkpoint", "scale", "layers.0.bias"])


def unexpected_keys(folder: Path) -> Wrong:
    rewrite_shard(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(2)}))
    return Wrong(ws.UnexpectedKeysError, ["1 tensors of the checkpoint are not in the model", "lm_head.weight"])


def empty_folder(folder: Path) -> Wrong:
    for file in folder.iterdir():
        file.unlink()
    return Wrong(ws.CheckpointError, ["the folder is empty", f"expected {INDEX}"], file="")


def not_a_checkpoint(folder: Path) -> Wrong:
    for file in folder.iterdir():
        file.unlink()
    (folder / "notes.txt").touch()
    return Wrong(ws.CheckpointError, ["not a checkpoint", f"expected {INDEX}", "found notes.txt"], file="")


def other_format(folder: Path) -> Wrong:
    for file in folder.iterdir():
        file.unlink()
    (folder / "model.gguf").touch()
    return Wrong(ws.UnsupportedFormatError, ["cannot be loaded", "model.gguf", "Convert"], file="")


def broken_index(folder: Path) -> Wrong:
    (folder / INDEX).write_text('{"weight_map": {')
    return Wrong(ws.CheckpointError, ["the index is not valid", "weight_map"], file=INDEX)


#: What is wrong whatever the model is, and what is wrong for this model.
UNUSABLE = [
    missing_shard,
    truncated_shard,
    shard_cut_in_its_header,
    name_only_in_the_index,
    name_only_in_a_header,
    empty_folder,
    not_a_checkpoint,
    other_format,
    broken_index,
]
UNFITTING = [wrong_shape, wrong_dtype, missing_keys, unexpected_keys]


@pytest.fixture(name="folder")
def fixture_folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", tensors_of(SmallNet()), num_shards=2)


def check(error: ws.WeightstreamError, wrong: Wrong, folder: Path) -> None:
    assert type(error) is wrong.error
    message = str(error)
    for part in wrong.parts:
        assert part in message, part
    if wrong.file is not None:
        file = str(folder / wrong.file)
        assert error.file == file
        assert file in message
    if wrong.tensor is not None:
        assert error.tensor == wrong.tensor
        assert wrong.tensor in message
    assert error.partly_written == ()


@pytest.mark.parametrize("how", ["load_sync", "load"])
@pytest.mark.parametrize("state", ["meta", "materialised"])
@pytest.mark.parametrize("break_it", UNUSABLE + UNFITTING, ids=lambda kind: kind.__name__)
def test_bad_checkpoint_has_its_own_error_and_changes_nothing(
    folder: Path, break_it: Callable[[Path], Wrong], state: str, how: str
) -> None:
    wrong = break_it(folder)
    model = make_model(state)
    with leaves_nothing(), untouched(model), pytest.raises(ws.WeightstreamError) as caught:
        run(how, model, folder, make_config())
    check(caught.value, wrong, folder)


@pytest.mark.parametrize("how", ["load_sync", "load"])
@pytest.mark.parametrize("state", ["meta", "materialised"])
@pytest.mark.parametrize("name", [SECOND, INDEX])
def test_unreadable_file_has_its_own_error_and_changes_nothing(folder: Path, name: str, state: str, how: str) -> None:
    model = make_model(state)
    with (
        unreadable(folder / name),
        leaves_nothing(),
        untouched(model),
        pytest.raises(ws.ReadError, match="Permission denied") as caught,
    ):
        run(how, model, folder, make_config())
    assert caught.value.file == str(folder / name)


def test_good_checkpoint_loads(folder: Path) -> None:
    """The tests above are worth nothing if this one fails."""
    for state in ("meta", "materialised"):
        model = make_model(state)
        with leaves_nothing():
            ws.load_sync(model, folder, config=make_config())
        for name, tensor in tensors_of(SmallNet()).items():
            assert torch.equal(model.state_dict()[name], tensor), name


def test_checkpoint_that_is_not_named_is_a_value_error() -> None:
    model = make_model("meta")
    with leaves_nothing(), untouched(model), pytest.raises(ValueError, match="no checkpoint: pass a path"):
        ws.load_sync(model, config=make_config())


@pytest.mark.parametrize("break_it", UNUSABLE, ids=lambda kind: kind.__name__)
def test_bad_checkpoint_is_refused_alike_where_there_is_no_model(
    folder: Path, break_it: Callable[[Path], Wrong]
) -> None:
    wrong = break_it(folder)
    with leaves_nothing(), pytest.raises(wrong.error) as caught:
        list(ws.iter_tensors(folder, make_config()))
    check(caught.value, wrong, folder)


# Configuration


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        pytest.param("checkpoint: .\nprefetch: {chunks: 1MiB}", "prefetch.chunks", "no such key", id="unknown key"),
        pytest.param("checkpoint: .\nprefetch: {chunk: 16MiBs}", "prefetch.chunk", "16MiBs", id="unknown unit"),
        pytest.param("checkpoint: .\nprefetch: {chunk: 16 miles}", "prefetch.chunk", "16 miles", id="wrong unit"),
        pytest.param("checkpoint: .\nprefetch: {chunk: 5000}", "prefetch.chunk", "65536", id="too little"),
        pytest.param("checkpoint: .\nprefetch: {chunk: 100001}", "prefetch", "multiple of 4KiB", id="no multiple"),
        pytest.param("checkpoint: .\nprefetch: {host_memory: 1MiB}", "prefetch", "must hold two slots", id="no room"),
        pytest.param("checkpoint: .\nscheduler: {timeout_s: 5min}", "scheduler.timeout_s", "5min", id="unit of time"),
        pytest.param("checkpoint: .\ndevice: {dtype: float31}", "device.dtype", "float31", id="unknown dtype"),
    ],
)
def test_bad_configuration_is_a_validation_error_that_names_file_and_key(
    tmp_path: Path, text: str, where: str, message: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with leaves_nothing(), pytest.raises(ValidationError) as caught:
        ws.LoaderConfig.from_yaml(path)
    for part in (str(path), where, message):
        assert part in str(caught.value)


# Files that change while they are loaded


class Meddling:
    """For `Machine.open_source`: a source that does something to the files before one of its reads, or after."""

    def __init__(self, meddle: Callable[[], None], *, before: int | None = None, after: int | None = None) -> None:
        self.num_reads = 0
        self.one_has_ended = threading.Event()
        self._meddle = meddle
        self._before = before
        self._after = after

    def open(self, checkpoint: Checkpoint, config: PrefetchConfig, **told: Callable[..., object]) -> FileSource:
        meddling = self

        class Source(FileSource):
            def read(self, wanted: ByteRange, buffers: Sequence[memoryview]) -> None:
                number, meddling.num_reads = meddling.num_reads, meddling.num_reads + 1
                if number == meddling._before:
                    meddling._meddle()
                super().read(wanted, buffers)
                meddling.one_has_ended.set()
                if number == meddling._after:
                    meddling._meddle()

        return Source(checkpoint, config, **told)  # type: ignore[arg-type]  # the three callbacks, passed on


async def load_meddled(
    model: nn.Module, folder: Path, meddling: Meddling, open_backend: Callable[[torch.device], Backend] = open_backend
) -> ws.LoadReport:
    machine = Machine(open_source=meddling.open, open_backend=open_backend)
    async with ws.Loader(make_config(), machine=machine) as loader:
        return await loader.load(model, folder)


async def test_meddling_that_does_nothing_lets_the_load_pass(folder: Path) -> None:
    model, meddling = make_model("meta"), Meddling(lambda: None, before=3)
    await load_meddled(model, folder, meddling)
    assert meddling.num_reads > 5


@pytest.mark.parametrize("number", [0, 1, 5])
async def test_shard_truncated_during_the_load_leaves_the_model_on_meta(folder: Path, number: int) -> None:
    model = make_model("meta")

    def truncate() -> None:
        for name in (FIRST, SECOND):
            os.truncate(folder / name, 50)

    meddling = Meddling(truncate, before=number)
    with (
        leaves_nothing(),
        untouched(model),
        pytest.raises(ws.ReadError, match="ended while it was being read") as caught,
    ):
        await load_meddled(model, folder, meddling)
    assert caught.value.file in (str(folder / FIRST), str(folder / SECOND))
    assert caught.value.partly_written == ()
    assert all(tensor.is_meta for _, tensor in tensors_in(model))


def overwrite(path: Path) -> None:
    """Change a byte of the last tensor and, as time goes on, the time of the last change."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


@pytest.mark.parametrize("number", [0, 5])
async def test_shard_overwritten_during_the_load_leaves_the_model_on_meta(folder: Path, number: int) -> None:
    model, meddling = make_model("meta"), Meddling(lambda: overwrite(folder / SECOND), after=number)
    with leaves_nothing(), untouched(model), pytest.raises(ws.IntegrityError, match="changed while") as caught:
        await load_meddled(model, folder, meddling)
    assert caught.value.file == str(folder / SECOND)
    assert caught.value.partly_written == ()


async def test_shard_replaced_during_the_load_leaves_the_model_on_meta(folder: Path, tmp_path: Path) -> None:
    """The load goes on with the file that it has open, and then says that this is not what lies there now."""
    other = write_shard(tmp_path / "other", {"x": torch.zeros(3)})
    model, meddling = make_model("meta"), Meddling(lambda: os.replace(other, folder / SECOND), before=0)  # noqa: PTH105
    with leaves_nothing(), untouched(model), pytest.raises(ws.IntegrityError, match="changed while"):
        await load_meddled(model, folder, meddling)


async def test_error_says_what_of_a_materialised_model_was_written(folder: Path) -> None:
    model = make_model("materialised")
    before = {name: tensor.detach().clone() for name, tensor in tensors_in(model)}
    loaded = tensors_of(SmallNet())

    def truncate() -> None:
        assert meddling.one_has_ended.wait(20)  # it went straight into parameters: their bytes are in the page cache
        os.truncate(folder / SECOND, 50)

    meddling = Meddling(truncate, before=3)
    with leaves_nothing(), pytest.raises(ws.ReadError) as caught:
        await load_meddled(model, folder, meddling)
    written = caught.value.partly_written
    assert written
    assert f"the model is partly written: {written[0]}" in str(caught.value)
    changed = [name for name, tensor in tensors_in(model) if not torch.equal(tensor, before[name])]
    assert set(changed) <= set(written) < set(before)
    whole = [name for name in changed if name != "large.weight"]  # which is in several chunks
    assert whole
    for name in whole:
        assert torch.equal(model.state_dict()[name], loaded[name]), name


async def test_integrity_error_says_what_of_a_materialised_model_was_written(folder: Path) -> None:
    model, meddling = make_model("materialised"), Meddling(lambda: overwrite(folder / SECOND), after=0)
    with leaves_nothing(), pytest.raises(ws.IntegrityError, match="the model is partly written") as caught:
        await load_meddled(model, folder, meddling)
    loaded = tensors_of(SmallNet())
    assert set(caught.value.partly_written) == {name for name, tensor in loaded.items() if tensor.numel()}


async def test_failed_load_keeps_neither_model_nor_tensors_alive(folder: Path) -> None:
    model, meddling = make_model("meta"), Meddling(lambda: os.truncate(folder / SECOND, 50), before=3)
    with leaves_nothing(), pytest.raises(ws.ReadError):
        await load_meddled(model, folder, meddling)
    left = weakref.ref(model)
    del model
    gc.collect()
    assert left() is None
