"""What the kernel answers when a disk or a server breaks: at the first, a middle and the last chunk of a load."""

from __future__ import annotations

import asyncio
import errno
import hashlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

import weightstream as ws
from tests.builders import INDEX, SINGLE, assert_same, leaves_nothing, random_tensors, write_checkpoint
from tests.fakes.accelerator import FakeAccelerator
from tests.fakes.filesystem import Behaviour, Fault, mounted
from tests.fakes.fixtures import requires_fuse
from tests.fakes.ring import PoisonedRing
from weightstream.api import Loader
from weightstream.errors import IntegrityError, LoadTimeoutError, ReadError
from weightstream.prefetch.digests import MANIFEST_NAME, write_manifest
from weightstream.scheduler.machine import Machine, open_backend

pytestmark = requires_fuse

KIB = 2**10
CHUNK = 64 * KIB

#: Ten chunks and a bit; no tensor begins where a chunk does.
TENSORS = random_tensors({f"t{i:02}": (1001 + i, 8) for i in range(20)})
NUM_BYTES = sum(tensor.nbytes for tensor in TENSORS.values())

RETRIES = 2


@pytest.fixture(name="folder", scope="module")
def fixture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("faults"), TENSORS)


@pytest.fixture(name="offset", params=["first", "middle", "last"])
def fixture_offset(request: pytest.FixtureRequest, folder: Path) -> int:
    """A byte of the first, a middle and the last chunk."""
    end = (folder / SINGLE).stat().st_size
    return {"first": end - NUM_BYTES + 1, "middle": end - NUM_BYTES // 2, "last": end - 1}[request.param]


@pytest.fixture(name="io", params=["buffered", "direct"])
def fixture_io(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Run = Callable[..., ws.LoadReport]


@pytest.fixture(name="run", params=["host", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def fixture_run(request: pytest.FixtureRequest, io: str) -> Generator[Run, None, None]:
    """Loads a model, several times by one loader, onto the host and onto the fake accelerator."""
    accelerator = FakeAccelerator()
    backend = (lambda _: accelerator) if request.param == "fake" else open_backend
    target = "cuda" if request.param == "cuda" else "cpu"
    machine = Machine(open_backend=backend, ring=PoisonedRing)

    def run(
        model: nn.Module,
        *paths: Path,
        before_last: Callable[[], None] = lambda: None,
        after_last: Callable[[], None] = lambda: None,
    ) -> ws.LoadReport:
        """Load from each path in turn; every load but the last must fail, with what `error_of` returns."""

        async def load() -> ws.LoadReport:
            prefetch = {
                "io": io,
                "chunk": CHUNK,
                "workers": 2,
                "host_memory": 5 * (CHUNK + 8 * KIB),
                "retries": RETRIES,
                "stall_s": 0.3,
            }
            config = ws.LoaderConfig.model_validate({"prefetch": prefetch, "device": {"target": target}})
            async with Loader(config, machine=machine) as loader:
                for path in paths[:-1]:
                    with pytest.raises(ws.WeightstreamError) as caught:
                        await loader.load(model, path)
                    errors.append(caught.value)
                    assert all(parameter.is_meta for parameter in model.parameters())
                before_last()
                try:
                    return await loader.load(model, paths[-1])
                finally:
                    after_last()

        with leaves_nothing():
            return asyncio.run(load())

    errors: list[ws.WeightstreamError] = []
    run.errors = errors  # type: ignore[attr-defined]  # what the loads that had to fail failed with
    yield run
    accelerator.close()
    assert accelerator.hazards == []


def on_meta() -> nn.Module:
    return nn.ParameterDict({n: nn.Parameter(torch.empty(t.shape, device="meta")) for n, t in TENSORS.items()})


def assert_loaded(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        assert_same(tensor, TENSORS[name])


def error_of(run: Run) -> ws.WeightstreamError:
    (error,) = run.errors  # type: ignore[attr-defined]  # see above
    assert isinstance(error, ws.WeightstreamError)
    return error


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE], ids=lambda number: errno.errorcode[number])
def test_error_that_passes_is_tried_again(run: Run, folder: Path, offset: int, number: int) -> None:
    fault = Fault(SINGLE, "error", offset=offset, number=number)
    with mounted(folder, Behaviour(faults=(fault,), is_cached=False)) as mount:
        model = on_meta()
        report = run(model, mount.path)
        assert mount.statistics().num_faults == (1,)
    assert report.num_retries == 1
    assert_loaded(model)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENXIO], ids=["transient", "final"])
def test_error_that_stays_ends_the_load(run: Run, folder: Path, offset: int, number: int) -> None:
    fault = Fault(SINGLE, "error", offset=offset, number=number, times=None)
    with mounted(folder, Behaviour(faults=(fault,), is_cached=False)) as mount:
        model = on_meta()
        run(model, mount.path, mount.path, before_last=lambda: mount.change(faults=()))
        error = error_of(run)
        assert isinstance(error, ReadError)
        assert error.file == str(mount.path / SINGLE)
        assert f"errno {number}" in str(error)
        assert f"after {RETRIES if number == errno.EIO else 0} retries" in str(error)
    assert_loaded(model)


@pytest.mark.parametrize("num_bytes", [1000, 8 * KIB], ids=["odd", "pages"])
def test_short_read_goes_on_where_it_stopped(run: Run, folder: Path, offset: int, num_bytes: int) -> None:
    fault = Fault(SINGLE, "short", offset=offset, num_bytes=num_bytes)
    with mounted(folder, Behaviour(faults=(fault,), is_cached=False)) as mount:
        model = on_meta()
        report = run(model, mount.path)
        assert mount.statistics().num_faults == (1,)
    assert report.num_retries == 0
    assert_loaded(model)


def test_stall_ends_the_load_and_the_next_one_works(run: Run, folder: Path, offset: int) -> None:
    fault = Fault(SINGLE, "stall", offset=offset)
    with mounted(folder, Behaviour(faults=(fault,), is_cached=False)) as mount:
        model = on_meta()
        # The fault is for once. What is stuck stays so while the next load runs, with another thread and slot.
        run(model, mount.path, mount.path, before_last=mount.wait_stalled, after_last=mount.release)
        error = error_of(run)
        assert isinstance(error, LoadTimeoutError)
        assert error.file == str(mount.path / SINGLE)
        assert "at most 0.3 s" in str(error)
        assert "offset" in str(error)
    assert_loaded(model)


def test_truncation_in_mid_load_ends_it(run: Run, folder: Path, offset: int) -> None:
    fault = Fault(SINGLE, "truncate", offset=offset, num_bytes=offset - 1)
    with mounted(folder, Behaviour(faults=(fault,), is_cached=False)) as mount:
        model = on_meta()
        run(model, mount.path, folder)
        error = error_of(run)
        assert isinstance(error, (ReadError, IntegrityError))
        assert error.file == str(mount.path / SINGLE)
        assert "while it was being" in str(error)
    assert_loaded(model)


@pytest.mark.parametrize("effect", ["error", "stall", "truncate"])
def test_fault_in_a_stream_reaches_its_consumer(
    folder: Path, offset: int, effect: Literal["error", "stall", "truncate"]
) -> None:
    fault = Fault(SINGLE, effect, offset=offset, num_bytes=offset - 1, times=None)
    sections = {"prefetch": {"chunk": CHUNK, "workers": 2, "stall_s": 0.3, "retries": 1}, "device": {"target": "cpu"}}
    with mounted(folder, Behaviour(faults=(fault,), is_cached=False)) as mount, leaves_nothing():
        found: dict[str, torch.Tensor] = {}
        with pytest.raises((ReadError, IntegrityError, LoadTimeoutError)):  # noqa: PT012 - what came before it counts
            for name, tensor in ws.iter_tensors(mount.path, ws.LoaderConfig.model_validate(sections)):
                found[name] = tensor  # noqa: PERF403 - see above
        mount.release()
    for name, tensor in found.items():  # what was handed out was right
        assert_same(tensor, TENSORS[name])


@pytest.mark.parametrize("name", [SINGLE, INDEX, MANIFEST_NAME], ids=["header", "index", "manifest"])
@pytest.mark.parametrize("times", [1, None], ids=["once", "for ever"])
def test_error_in_what_describes_the_bytes_is_like_one_in_them(tmp_path: Path, name: str, times: int | None) -> None:
    folder = write_checkpoint(tmp_path / "c", {"a": torch.ones(2, 2)}, num_shards=2 if name == INDEX else 1)
    shards = [path.name for path in folder.glob("*.safetensors")]
    write_manifest(folder, [(shard, hashlib.sha256((folder / shard).read_bytes()).hexdigest()) for shard in shards])
    prefetch = {"retries": RETRIES, "verify": "sha256"}
    config = ws.LoaderConfig.model_validate({"prefetch": prefetch, "device": {"target": "cpu"}})
    fault = Fault(name, "error", offset=0, times=times)
    with mounted(folder, Behaviour(faults=(fault,), is_cached=False)) as mount, leaves_nothing():
        model = nn.ParameterDict({"a": nn.Parameter(torch.empty(2, 2, device="meta"))})
        if times is not None:
            assert ws.load_sync(model, mount.path, config=config).num_retries == 1
            return
        with pytest.raises(ReadError) as caught:
            ws.load_sync(model, mount.path, config=config)
        assert caught.value.file == str(mount.path / name)
        assert str(caught.value).endswith(f"at offset 0: Input/output error (errno 5), after {RETRIES} retries")
        assert model["a"].is_meta
