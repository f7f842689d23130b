"""The arms that are weightstream's own, and the ceilings: what the machine does with no checkpoint format at all."""

from __future__ import annotations

import asyncio
import functools
from importlib import import_module

import uvloop
from torch import nn

import weightstream as ws
from benchmarks.arms import Arm, Case
from weightstream.ceilings import WINDOW_BYTES, copy_ceiling, read_ceiling
from weightstream.scheduler.report import LoadReport

__all__ = ["ARMS", "CEILINGS"]

_IMPORTS = ("weightstream.api", "weightstream.config")


def _config(case: Case, strategy: str) -> ws.LoaderConfig:
    sections: dict[str, object] = {"strategy": strategy, "device": {"target": str(case.device)}}
    if strategy == "preload":
        sections["prefetch"] = {"host_memory": 2 * case.num_bytes}
    return ws.LoaderConfig.model_validate(sections)


def _configure(case: Case, *, strategy: str) -> None:
    case.state = _config(case, strategy)


def _load_sync(case: Case) -> nn.Module:
    case.report = ws.load_sync(case.model, case.path, config=case.state).to_dict()
    return case.model


def _open_and_load_once(case: Case) -> None:
    """Open a Loader and load another model with it, so that threads and host memory are there."""
    runner = case.cleanup.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
    loader = ws.Loader(_config(case, "stream"))
    runner.run(loader.__aenter__())
    case.cleanup.callback(lambda: runner.run(loader.__aexit__(None, None, None)))
    runner.run(loader.load(case.build(), case.path))
    case.state = runner, loader


def _load_again(case: Case) -> nn.Module:
    runner, loader = case.state
    case.report = runner.run(loader.load(case.model, case.path)).to_dict()
    return case.model


def _build_and_load(case: Case) -> nn.Module:
    """What `from_pretrained` does: read the configuration, build the model, load it."""
    integration = import_module("weightstream.integrations.transformers")
    model: nn.Module = integration.build_on_meta(case.path, device=case.device)
    case.report = ws.load_sync(model, case.path, config=case.state).to_dict()
    return model


def _stream_and_drop(case: Case) -> None:
    """Take tensor after tensor from a stream and keep none: everything goes through staging memory, 64 MiB of it."""
    case.report = uvloop.run(_consume(case)).to_dict()


async def _consume(case: Case) -> LoadReport:
    async with ws.Loader(case.state) as loader, loader.stream(case.path) as tensors:
        async for _ in tensors:
            pass
        return await tensors.report()


def _configure_staging(case: Case) -> None:
    prefetch = {"host_memory": "64MiB", "chunk": "4MiB"}
    case.state = ws.LoaderConfig.model_validate(
        {"strategy": "stream", "prefetch": prefetch, "device": {"target": "cpu"}}
    )


_stream = functools.partial(_configure, strategy="stream")


def _strategy(strategy: str, *, allocated: bool = False) -> Arm:
    """A strategy beside `stream` and `map`, from meta or into parameters that have storage."""
    return Arm(
        f"ws-{strategy}{'-allocated' if allocated else ''}",
        f"weightstream {strategy}",
        "weightstream",
        _load_sync,
        begins="allocated" if allocated else "meta",
        imports=_IMPORTS,
        prepare=functools.partial(_configure, strategy=strategy),
    )


ARMS = (
    Arm("ws-stream", "weightstream stream", "weightstream", _load_sync, imports=_IMPORTS, prepare=_stream),
    Arm(
        "ws-again",
        "weightstream stream, warm Loader",
        "weightstream",
        _load_again,
        imports=_IMPORTS,
        prepare=_open_and_load_once,
    ),
    Arm(
        "ws-allocated",
        "weightstream stream",
        "weightstream",
        _load_sync,
        begins="allocated",
        imports=_IMPORTS,
        prepare=_stream,
    ),
    Arm(
        "ws-map",
        "weightstream map",
        "weightstream",
        _load_sync,
        imports=_IMPORTS,
        prepare=functools.partial(_configure, strategy="map"),
        devices=("cpu",),
    ),
    _strategy("auto"),
    _strategy("preload"),
    _strategy("direct"),
    _strategy("auto", allocated=True),
    _strategy("preload", allocated=True),
    _strategy("direct", allocated=True),
    Arm(
        "ws-llama",
        "weightstream build_on_meta, stream",
        "weightstream",
        _build_and_load,
        begins="nothing",
        imports=(*_IMPORTS, "weightstream.integrations.transformers", "transformers.models.llama.modeling_llama"),
        prepare=_stream,
        families=("llama",),
    ),
    Arm(
        "ws-staged",
        "weightstream Loader.stream, nothing kept",
        "weightstream",
        _stream_and_drop,
        begins="nothing",
        imports=_IMPORTS,
        prepare=_configure_staging,
        families=(),  # it loads no model: a measurement of `growth` alone
    ),
)


def _read(case: Case, *, num_threads: int, direct: bool) -> None:
    window = None if case.device.type == "cpu" else WINDOW_BYTES
    found = read_ceiling(case.shards, num_threads=num_threads, direct=direct, window_bytes=window)
    case.wall_s = found.wall_s


def _copy(case: Case) -> None:
    case.wall_s = copy_ceiling(case.device, num_bytes=case.num_bytes, chunk_bytes=16 * 2**20).wall_s


#: Where what is read stays in host memory, more threads than this do not read faster.
_MOST_ON_THE_HOST = 8


def _reader(num_threads: int, *, direct: bool) -> Arm:
    how = "direct" if direct else "buffered"
    return Arm(
        f"{how}-{num_threads}",
        f"raw reads, {how}, {num_threads} thread{'s' if num_threads > 1 else ''}",
        "ceiling",
        functools.partial(_read, num_threads=num_threads, direct=direct),
        begins="nothing",
        devices=("cpu", "cuda") if num_threads <= _MOST_ON_THE_HOST else ("cuda",),
        caches=("cold",) if direct else ("cold", "warm"),  # past the page cache: what is in it is no help
    )


CEILINGS = (
    *(_reader(threads, direct=direct) for direct in (False, True) for threads in (1, 2, 4, 8, 12, 16)),
    Arm(
        "copy",
        "raw page-locked copy to the device",
        "ceiling",
        _copy,
        begins="nothing",
        devices=("cuda",),
    ),
)
