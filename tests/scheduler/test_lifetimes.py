"""What a load leaves behind of the program's own: nothing, however it ends, and whoever stays open or keeps its error."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weightstream as ws
from tests.builders import write_checkpoint
from tests.models import tensors_of


class Held:
    """Something that a function of the program has as a local variable."""


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = write_checkpoint(tmp_path / "c", tensors_of(net()))
    (path / "SHA256SUMS").write_text("0" * 64 + "  model.safetensors\n")
    return path


async def are_gone(references: list[weakref.ref[Any]]) -> bool:
    ending = ("weightstream-load", "weightstream-files")
    while any(thread.name.startswith(ending) for thread in threading.enumerate()):  # noqa: ASYNC110 - they set no event
        await asyncio.sleep(0)  # they have told the end of the load, and are about to end
    for _ in range(3):  # the event loop refers to what has woken this task, until its next turns
        await asyncio.sleep(0)
    gc.collect()
    return bool(references) and all(reference() is None for reference in references)


def config(**sections: Any) -> ws.LoaderConfig:
    device = {"target": "cpu", **sections.pop("device", {})}
    return ws.LoaderConfig.model_validate({"device": device, **sections})


async def iterate(loader: ws.Loader, path: Path, references: list[weakref.ref[Any]]) -> None:
    held = Held()
    references.append(weakref.ref(held))
    async for _ in loader.stream(path):
        pass


@pytest.mark.parametrize(
    ("sections", "error"),
    [
        ({"prefetch": {"verify": "sha256"}}, ws.IntegrityError),
        ({"scheduler": {"timeout_s": 1e-9}}, ws.LoadTimeoutError),
    ],
    ids=["integrity", "timeout"],
)
async def test_stream_that_failed_keeps_nothing_of_its_consumer(
    path: Path, sections: dict[str, Any], error: type[Exception]
) -> None:
    references: list[weakref.ref[Any]] = []
    async with ws.Loader(config(**sections)) as loader:
        for _ in range(3):
            with pytest.raises(error):
                await iterate(loader, path, references)
        assert len(references) == 3
        assert await are_gone(references)  # also while the loader is open


async def test_stream_whose_loader_was_closed_keeps_nothing_of_its_consumer(path: Path) -> None:
    references: list[weakref.ref[Any]] = []
    begun, closed = asyncio.Event(), asyncio.Event()

    async def consume(loader: ws.Loader) -> None:
        held = Held()
        references.append(weakref.ref(held))
        stream = loader.stream(path)
        await anext(stream)
        begun.set()
        await closed.wait()
        async for _ in stream:
            pass

    async with ws.Loader(config(prefetch={"chunk": "64KiB"})) as loader:
        task = asyncio.create_task(consume(loader))
        await begun.wait()
    closed.set()
    await asyncio.wait([task])
    assert task.exception() is None or isinstance(task.exception(), ws.LoadCancelledError)
    del task
    assert await are_gone(references)


def with_a_hook_that_fails() -> nn.Sequential:
    def fail(*_: Any) -> None:
        raise RuntimeError("half-way")

    model = net()
    register: Callable[..., object] = model[1].register_load_state_dict_post_hook
    register(fail)
    return model


def of_another_shape() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(4))


def with_more_tensors() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))


@pytest.mark.parametrize("where", ["meta", "cpu"])
@pytest.mark.parametrize("keep_error", [False, True], ids=["", "error kept"])
@pytest.mark.parametrize(
    ("make", "sections"),
    [
        (net, {"prefetch": {"verify": "sha256"}}),
        (net, {"scheduler": {"timeout_s": 1e-9}}),
        (of_another_shape, {}),
        (with_more_tensors, {}),
        (with_a_hook_that_fails, {}),
    ],
    ids=["digest", "timeout", "shape", "missing", "hook"],
)
async def test_open_loader_keeps_no_model_whose_load_failed(
    path: Path,
    make: Callable[[], nn.Module],
    sections: dict[str, Any],
    where: str,
    keep_error: bool,  # noqa: FBT001
) -> None:
    kept: list[BaseException] = []

    async def fail(loader: ws.Loader) -> list[weakref.ref[Any]]:
        with torch.device(where):
            model = make()
        references: list[weakref.ref[Any]] = [weakref.ref(one) for one in (*model.modules(), *model.parameters())]
        try:
            await loader.load(model, path)
        except ws.WeightstreamError as error:
            if keep_error:
                kept.append(error.with_traceback(None))  # the frames of this program are the program's
        else:
            raise AssertionError("the load did not fail")
        return references

    async with ws.Loader(config(**sections)) as loader:
        references = await fail(loader)
        assert await are_gone(references)


@pytest.mark.parametrize("error", [ValueError, SystemExit, asyncio.CancelledError])
@pytest.mark.parametrize("commit", ["progressive", "atomic"])
def test_whatever_a_hook_raises_the_model_is_on_meta_again(path: Path, error: type[BaseException], commit: str) -> None:
    def fail(*_: Any) -> None:
        raise error("half-way")

    with torch.device("meta"):
        model = net()
    before = dict(model.named_parameters())
    register: Callable[..., object] = model[1].register_load_state_dict_post_hook
    register(fail)
    with pytest.raises(ws.PlacementError if error is ValueError else error):
        ws.load_sync(model, path, config=config(device={"commit": commit}))
    assert all(parameter.is_meta and before[name] is parameter for name, parameter in model.named_parameters())


@pytest.mark.parametrize("change", ["half", "rows", "other"])
def test_memory_that_a_hook_has_replaced_is_put_back(tmp_path: Path, change: str) -> None:
    """`weight.data = ...` in a hook, and a module behind it that fails."""

    def replace(module: nn.Module, _: object) -> None:
        weight = module.get_parameter("weight")
        weight.data = {"half": weight.data.half(), "rows": weight.data[:2], "other": weight.data.clone()}[change]

    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), with_a_hook_that_fails())
    tensors = tensors_of(model)
    path = write_checkpoint(tmp_path / "other", tensors)
    register: Callable[..., object] = model[1].register_load_state_dict_post_hook
    register(replace)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    with pytest.raises(ws.PlacementError) as caught:
        ws.load_sync(model, path, config=config(device={"commit": "atomic"}))
    assert caught.value.partly_written == ()
    for name, tensor in model.state_dict().items():
        pointer, contents = before[name]
        assert (tensor.data_ptr(), tensor.dtype, tensor.shape) == (pointer, contents.dtype, contents.shape), name
        assert torch.equal(tensor, contents), name
