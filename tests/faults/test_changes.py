"""Files that change while they are loaded: an error, whatever changed and however they are loaded; never mixed weights."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.builders import leaves_nothing, open_files, write_checkpoint
from tests.fakes.rig import Rig
from tests.models import SmallNet, tensors_of
from weightstream.api import Loader
from weightstream.errors import IntegrityError, ReadError
from weightstream.prefetch.checkpoint import Checkpoint

MakeRig = Callable[..., Rig]


@pytest.fixture(name="path")
def fixture_path(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "c", tensors_of(SmallNet()), num_shards=2)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 8)


def rewrite(file: Path) -> None:
    """Other bytes, in the same file and of the same length."""
    content = bytearray(file.read_bytes())
    content[-4:] = b"\1\2\3\4"
    with file.open("r+b") as opened:
        opened.write(content)


def replace(file: Path) -> None:
    """Another file of the same content under its name."""
    other = file.with_suffix(".new")
    other.write_bytes(file.read_bytes())
    other.replace(file)


def extend(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"more")


def remove(file: Path) -> None:
    file.unlink()


changes = pytest.mark.parametrize("change", [truncate, rewrite, replace, extend, remove], ids=lambda one: one.__name__)


async def run(how: str, loader: Loader, model: SmallNet, path: Path) -> None:
    if how == "stream":
        _ = [name async for name, _ in loader.stream(path)]
    elif how == "page cache":
        await loader.warm(path)
    else:
        await loader.load(model, path)


@changes
@pytest.mark.parametrize("shard", [0, 1], ids=["file that is read", "file that is to be read"])
@pytest.mark.parametrize("how", ["model", "stream", "page cache", "preload", "direct"])
async def test_change_in_mid_load_is_noticed(
    make_rig: MakeRig, path: Path, how: str, shard: int, change: Callable[[Path], None]
) -> None:
    rig = make_rig("fake" if how == "model" else "host")
    gate = rig.disk.stop_at(2)
    with torch.device("meta"):
        model = SmallNet()
    strategy = how if how in ("preload", "direct") else "auto"
    num_slots = 3 if how == "model" else None
    with leaves_nothing():
        async with rig.loader(workers=1, strategy=strategy, scheduler={"order": "file"}, num_slots=num_slots) as loader:
            task = asyncio.create_task(run(how, loader, model, path))
            await asyncio.sleep(0)
            gate.wait_reached()
            change(path / f"model-{shard + 1:05}-of-00002.safetensors")
            gate.open()
            with pytest.raises((IntegrityError, ReadError), match="while it was being"):
                await task
            assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("change", [truncate, rewrite, replace, extend, remove], ids=lambda one: one.__name__)
async def test_change_of_the_index_in_mid_load_is_noticed(
    make_rig: MakeRig, path: Path, change: Callable[[Path], None]
) -> None:
    rig = make_rig("fake")
    gate = rig.disk.stop_at(2)
    with torch.device("meta"):
        model = SmallNet()
    index = path / "model.safetensors.index.json"
    async with rig.loader(workers=1) as loader:
        task = asyncio.create_task(loader.load(model, path))
        await asyncio.sleep(0)
        gate.wait_reached()
        change(index)
        gate.open()
        with pytest.raises(IntegrityError, match="while it was being loaded") as caught:
            await task
    assert caught.value.file == str(index)
    assert all(parameter.is_meta for parameter in model.parameters())


@changes
@pytest.mark.parametrize("how", ["model", "stream"])
async def test_change_of_a_mapped_file_is_noticed(
    make_rig: MakeRig, path: Path, how: str, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last moment at which it can be: what comes later is for who writes to files that are in use."""
    rig = make_rig("host")
    check = Checkpoint.check_unchanged

    def change_first(self: Checkpoint) -> None:
        change(path / "model-00001-of-00002.safetensors")
        check(self)

    monkeypatch.setattr(Checkpoint, "check_unchanged", change_first)
    with torch.device("meta"):
        model = SmallNet()
    async with rig.loader(strategy="map") as loader:
        with pytest.raises(IntegrityError, match="while it was being loaded"):
            await run(how, loader, model, path)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(str(path) in name for name in open_files().values())
