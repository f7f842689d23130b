"""docs/errors.md: every class has its section, with a message that really comes."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import weightstream as ws
from tests.builders import INDEX, flip, shard_name, write_checkpoint, write_index, write_sums
from tests.documents import ROOT, blocks
from weightstream import errors
from weightstream.prefetch.source import ByteRange, FileSource
from weightstream.scheduler.machine import Machine

SECOND = shard_name(1, 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))


def load(folder: Path, model: nn.Module | None = None, **sections: object) -> ws.LoadReport:
    config = ws.LoaderConfig.model_validate({"device": {"target": "cpu"}, **sections})
    with torch.device("meta"):
        return ws.load_sync(model or Net(), folder, config=config)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Write the checkpoint anew, with tensors added, replaced, or (None) left out."""
    wanted = {**tensors_in_order(), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    write_checkpoint(folder, {name: tensor for name, tensor in wanted.items() if tensor is not None}, num_shards=2)


def tensors_in_order() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(tensor.shape) for name, tensor in Net().state_dict().items()}


def not_a_checkpoint(folder: Path) -> None:
    (folder / INDEX).unlink()
    for file in folder.iterdir():
        file.rename(file.with_suffix(".part"))
    load(folder)


def missing_shard(folder: Path) -> None:
    (folder / SECOND).unlink()
    load(folder)


def truncated(folder: Path) -> None:
    os.truncate(folder / SECOND, 4000)
    load(folder)


def index_of_another_version(folder: Path) -> None:
    write_index(folder, {**dict.fromkeys(tensors_in_order(), SECOND), "embed.weight": shard_name(0, 2)})
    load(folder)


def other_format(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "model.gguf").touch()
    load(folder)


def tied_and_different(folder: Path) -> None:
    change(folder, layers__1__weight=torch.ones(32, 32))
    with torch.device("meta"):
        model = Net()
    model.layers[1].weight = model.layers[0].weight
    load(folder, model)


def other_shape(folder: Path) -> None:
    change(folder, embed__weight=torch.zeros(65, 32))
    load(folder)


def other_dtype(folder: Path) -> None:
    change(folder, embed__weight=torch.zeros(64, 32).to(torch.float8_e4m3fn))
    load(folder)


def missing_key(folder: Path) -> None:
    change(folder, layers__1__bias=None)
    load(folder)


def unexpected_key(folder: Path) -> None:
    change(folder, lm_head__weight=torch.zeros(64, 32))
    load(folder)


def read_that_fails(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to(SECOND)
    load(folder)


def flipped_bit(folder: Path) -> None:
    write_sums(folder)
    flip(folder / SECOND, (folder / SECOND).stat().st_size - 5)
    load(folder, prefetch={"verify": "sha256"})


def too_little_memory(folder: Path) -> None:
    change(folder, embed__weight=torch.zeros(2048, 1024))
    config = {"strategy": "stream", "device": {"target": "cpu"}, "prefetch": {"chunk": "1MiB", "host_memory": "4MiB"}}
    list(ws.iter_tensors(folder, ws.LoaderConfig.model_validate(config)))


def too_slow(folder: Path) -> None:
    load(folder, scheduler={"timeout_s": 1e-6})


def cancelled(folder: Path) -> None:
    may_read = threading.Event()

    class Source(FileSource):
        def read(self, wanted: ByteRange, buffers: Sequence[memoryview]) -> None:
            assert may_read.wait(20)
            super().read(wanted, buffers)

    async def cancel_it() -> None:
        config = ws.LoaderConfig.model_validate({"strategy": "stream", "device": {"target": "cpu"}})
        async with ws.Loader(config, machine=Machine(open_source=Source)) as loader:
            with torch.device("meta"):
                handle = await loader.start(Net(), folder)
            cancelling = asyncio.create_task(handle.cancel())
            await asyncio.sleep(0)  # it has been asked for, and reads go on only now
            may_read.set()
            await cancelling
            await handle.wait()

    asyncio.run(cancel_it())


PROVOKED: dict[type[ws.WeightstreamError], Callable[[Path], None]] = {
    ws.CheckpointError: not_a_checkpoint,
    ws.MissingShardError: missing_shard,
    ws.HeaderError: truncated,
    ws.IndexMismatchError: index_of_another_version,
    ws.UnsupportedFormatError: other_format,
    ws.PlacementError: tied_and_different,
    ws.ShapeMismatchError: other_shape,
    ws.DtypeMismatchError: other_dtype,
    ws.MissingKeysError: missing_key,
    ws.UnexpectedKeysError: unexpected_key,
    ws.ReadError: read_that_fails,
    ws.IntegrityError: flipped_bit,
    ws.MemoryBudgetError: too_little_memory,
    ws.LoadTimeoutError: too_slow,
    ws.LoadCancelledError: cancelled,
}


def sections() -> list[str]:
    return re.findall(r"^### (\w+Error)$", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)


def test_every_class_has_its_section() -> None:
    assert sorted([*sections(), "WeightstreamError"]) == errors.__all__
    assert {cls.__name__ for cls in PROVOKED} == set(sections())
    assert len(PROVOKED) == len(messages()), "each message on the page is one that comes"


@pytest.mark.parametrize("cls", PROVOKED, ids=lambda cls: cls.__name__)
def test_message_on_the_page_is_the_one_that_comes(cls: type[ws.WeightstreamError], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "my-model", tensors_in_order(), num_shards=2)
    with pytest.raises(ws.WeightstreamError) as caught:
        PROVOKED[cls](folder)
    assert type(caught.value) is cls
    message = str(caught.value).replace(str(folder), "/models/my-model")
    assert comparable(message) in messages()


def messages() -> set[str]:
    return {comparable(block.text.rstrip("\n")) for block in blocks("docs/errors.md", "text")}


def comparable(message: str) -> str:
    """Leave out what differs from run to run (times) or from one version of safetensors to the next (digests)."""
    return re.sub(r"[\d.]+(e-\d+)? s\b", "N s", re.sub(r"[0-9a-f]{64}", "DIGEST", message))
