"""What only a real GPU can show: other streams, its memory, its errors, and what uses it beside us."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
from collections.abc import Generator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weightstream as ws
from tests.builders import SINGLE, assert_same, flip, write_checkpoint, write_in_order, write_sparse, write_sums
from tests.fakes.ring import PoisonedRing
from tests.models import SmallNet, tensors_of
from tests.real.families import logits_of, save_small
from weightstream.api import Loader
from weightstream.scheduler.machine import Machine

pytestmark = pytest.mark.gpu

KIB, MIB = 2**10, 2**20
#: torch has no types for some of it.
cuda: Any = torch.cuda
DEVICE = "cuda:0"
TENSORS = tensors_of(SmallNet())


@pytest.fixture(name="path", scope="module")
def fixture_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_in_order(tmp_path_factory.mktemp("cuda"), TENSORS, num_shards=2)


@pytest.fixture(autouse=True)
def _device_memory_comes_back() -> Generator[None, None, None]:
    """Whatever a test does, what it leaves on the device is what was there before."""
    gc.collect()
    before = torch.cuda.memory_allocated(DEVICE)
    yield
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # 32 MiB that matrix products keep
    assert torch.cuda.memory_allocated(DEVICE) == before


def config(**sections: Any) -> ws.LoaderConfig:
    prefetch = {"chunk": 64 * KIB, "host_memory": 8 * MIB, "workers": 3, "io": "buffered"} | sections.pop(
        "prefetch", {}
    )
    device = {"target": DEVICE} | sections.pop("device", {})
    return ws.LoaderConfig.model_validate({"prefetch": prefetch, "device": device, **sections})


def on_meta() -> SmallNet:
    with torch.device("meta"):
        return SmallNet()


def on_device() -> SmallNet:
    with torch.device(DEVICE):
        return SmallNet()


def assert_loaded(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        assert tensor.device == torch.device(DEVICE)
        assert_same(tensor, TENSORS[name])


class TestStreams:
    def test_load_waits_for_what_the_user_s_stream_still_does_to_parameters(self, path: Path) -> None:
        model = on_device()
        stream = cuda.Stream(DEVICE)
        stream.wait_stream(torch.cuda.current_stream(DEVICE))
        with torch.cuda.stream(stream), torch.no_grad():
            cuda._sleep(200_000_000)  # a tenth of a second and more, at any clock that GPUs have
            for parameter in model.parameters():
                parameter.fill_(3)
            assert not stream.query()
            ws.load_sync(model, path, config=config())
        assert_loaded(model)

    def test_tensors_may_be_used_on_any_stream_at_once(self, path: Path) -> None:
        """Nothing synchronises: whoever gets the model may be on a stream that has waited for nobody."""
        model = on_meta()
        ws.load_sync(model, path, config=config())
        others = [cuda.Stream(DEVICE) for _ in range(4)]
        found: list[torch.Tensor] = []
        for stream in others:
            with torch.cuda.stream(stream):
                found.append(model.large.weight.detach().clone())
        torch.cuda.synchronize(DEVICE)
        for tensor in found:
            assert_same(tensor, TENSORS["large.weight"])

    async def test_tensors_of_a_stream_that_are_let_go_are_not_overwritten_while_they_are_used(
        self, tmp_path: Path
    ) -> None:
        """Each is used behind a long kernel, and dropped at once; what comes later must not get its memory."""
        tensors = {f"t{i:02d}": torch.full((2 * MIB,), i, dtype=torch.uint8) for i in range(24)}
        write_in_order(tmp_path, tensors)
        user = cuda.Stream(DEVICE)
        sums: dict[str, torch.Tensor] = {}
        async with Loader(config(prefetch={"chunk": 1 * MIB})) as loader:
            with torch.cuda.stream(user):
                async for name, tensor in loader.stream(tmp_path):
                    cuda._sleep(2_000_000)  # about a millisecond
                    sums[name] = tensor.long().sum()
                    del tensor
        torch.cuda.synchronize(DEVICE)
        assert {name: int(found) for name, found in sums.items()} == {f"t{i:02d}": i * 2 * MIB for i in range(24)}

    def test_slots_are_not_reused_before_their_copies_are_done(self, tmp_path: Path) -> None:
        """Released slots are overwritten at once, and there are five of them for two thousand chunks."""
        tensors = {f"t{i}": torch.randint(256, (MIB + 7 * i,), dtype=torch.uint8) for i in range(128)}
        write_in_order(tmp_path, tensors)
        model = nn.Module()
        for name, tensor in tensors.items():
            model.register_buffer(name, torch.empty_like(tensor, device="meta"))
        machine = Machine(ring=PoisonedRing)

        async def load() -> ws.LoadReport:
            settings = config(prefetch={"host_memory": 5 * 72 * KIB})
            async with Loader(settings, machine=machine) as loader:
                return await loader.load(model, tmp_path)

        report = asyncio.run(load())
        assert report.num_copies >= 2000
        assert report.pinned_bytes > 0
        for name, tensor in model.state_dict().items():
            assert_same(tensor, tensors[name])


class TestMemory:
    def test_more_than_is_free_is_refused_before_anything_moves(self, tmp_path: Path) -> None:
        total = torch.cuda.mem_get_info(DEVICE)[1]
        write_sparse(tmp_path / SINGLE, [(f"w{i}", "F32", [total // 16]) for i in range(5)])  # five quarters of it
        model = nn.ParameterDict({f"w{i}": nn.Parameter(torch.empty(total // 16, device="meta")) for i in range(5)})
        with pytest.raises(ws.MemoryBudgetError, match="memory of cuda:0"):
            ws.load_sync(model, tmp_path, config=config(prefetch={"chunk": 16 * MIB, "host_memory": 256 * MIB}))
        assert all(parameter.is_meta for parameter in model.parameters())

    def test_out_of_memory_in_mid_load_rolls_back_and_the_next_load_works(self, tmp_path: Path) -> None:
        """Seen as free, and refused by torch all the same: another process may have taken it meanwhile."""
        tensors = {f"w{i}": torch.rand(4 * MIB) for i in range(8)}
        write_in_order(tmp_path, tensors)
        model = nn.ParameterDict(
            {name: nn.Parameter(torch.empty_like(t, device="meta")) for name, t in tensors.items()}
        )
        before = list(model.parameters())
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info(DEVICE)[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(DEVICE) + 70 * MIB) / total)
        try:
            with pytest.raises((ws.WeightstreamError, torch.OutOfMemoryError)):
                ws.load_sync(model, tmp_path, config=config())
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert all(one is other for one, other in zip(model.parameters(), before, strict=True))
        ws.load_sync(model, tmp_path, config=config())
        for name, tensor in model.items():
            assert_same(tensor.detach(), tensors[name])

    def test_ring_is_page_locked_and_let_go(self, path: Path) -> None:
        async def load() -> ws.LoadReport:
            async with Loader(config()) as loader:
                await loader.load(on_meta(), path)
                return await loader.load(on_meta(), path)

        report = asyncio.run(load())
        assert report.pinned_bytes > 0
        assert report.fallbacks == ()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_cast_on_the_device_is_torch_s(self, tmp_path: Path, dtype: torch.dtype) -> None:
        stored = {"w": torch.randn(300_001, dtype=torch.float64), "v": torch.randn(17, dtype=torch.float16)}
        write_checkpoint(tmp_path, stored)
        model = nn.Module()
        for name, tensor in stored.items():
            model.register_buffer(name, torch.empty(tensor.shape, dtype=dtype, device="meta"))
        ws.load_sync(model, tmp_path, config=config())
        for name, tensor in model.state_dict().items():
            assert_same(tensor, stored[name].to(DEVICE).to(dtype))


class TestFailure:
    @pytest.mark.parametrize("make", [on_meta, on_device])
    def test_wrong_digest_leaves_the_model_as_it_was(self, tmp_path: Path, make: Any) -> None:
        write_in_order(tmp_path, TENSORS)
        write_sums(tmp_path)
        flip(tmp_path / SINGLE, -1)
        model = make()
        before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        atomic = config(prefetch={"verify": "sha256"}, device={"commit": "atomic"})
        with pytest.raises(ws.IntegrityError):
            ws.load_sync(model, tmp_path, config=atomic)
        for name, tensor in model.state_dict().items():
            assert tensor.is_meta if make is on_meta else torch.equal(tensor, before[name])

    def test_forked_child_is_refused_and_touches_no_driver(self, path: Path) -> None:
        program = (
            "import asyncio, os, sys, torch\n"
            "import weightstream as ws\n"
            "torch.zeros(1, device='cuda')\n"
            "async def main():\n"
            "    async with ws.Loader(ws.LoaderConfig(device={'target': 'cuda'})) as loader:\n"
            "        child = os.fork()\n"
            "        if not child:\n"
            "            try:\n"
            "                await loader.load(torch.nn.Linear(1, 1), sys.argv[1])\n"
            "            except RuntimeError as error:\n"
            "                os.write(1, str(error).encode())\n"
            "            os._exit(0)\n"
            "        os.waitpid(child, 0)\n"
            "asyncio.run(main())\n"
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, str(path)], capture_output=True, text=True, check=True
        )
        assert "fork" in done.stdout


class TestSmallTensors:
    def test_there_are_at_most_two_copies_for_a_chunk(self, tmp_path: Path) -> None:
        tensors = {f"t{i:05d}": torch.full((128,), i, dtype=torch.int32) for i in range(16_384)}
        write_in_order(tmp_path, tensors)  # 8 MiB
        model = nn.Module()
        for name, tensor in tensors.items():
            model.register_buffer(name, torch.empty_like(tensor, device="meta"))
        report = ws.load_sync(model, tmp_path, config=config(prefetch={"chunk": MIB, "host_memory": 8 * MIB}))
        assert report.num_copies <= 2 * 9
        found = torch.stack(list(model.state_dict().values()))
        assert torch.equal(found.cpu(), torch.stack(list(tensors.values())))


class TestClients:
    @pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gpt2"])
    def test_from_pretrained_is_transformers_own(self, tmp_path: Path, family: str) -> None:
        kind: Any = save_small(family, tmp_path, dtype=torch.bfloat16)
        expected = kind.from_pretrained(tmp_path, device_map={"": 0})
        found: Any = import_module("weightstream.integrations.transformers").from_pretrained(tmp_path, config=config())
        assert {parameter.device for parameter in found.parameters()} == {torch.device(DEVICE)}
        device = torch.device(DEVICE)
        assert torch.equal(logits_of(family, found, device), logits_of(family, expected, device))

    def test_load_checkpoint_in_model_is_accelerate_s(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, TENSORS, num_shards=2)
        device_map = {"": 0, "layers.1": "cpu"}
        ours, theirs = on_meta(), on_meta()
        import_module("weightstream.integrations.accelerate").load_checkpoint_in_model(ours, tmp_path, device_map)
        import_module("accelerate").load_checkpoint_in_model(theirs, tmp_path, device_map)
        expected = theirs.state_dict()
        for name, tensor in ours.state_dict().items():
            assert tensor.device == expected[name].device
            assert_same(tensor, expected[name])

    def test_command_loads_to_the_first_device_by_itself(self, tmp_path: Path) -> None:
        save_small("llama", tmp_path, dtype=torch.bfloat16)
        file = tmp_path / "warm.yaml"
        file.write_text(f"checkpoint: {tmp_path}\nmodel: transformers\n")
        command = [sys.executable, "-m", "weightstream", "warm", str(file), "--json", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["device"] == DEVICE
        assert report["num_copies"] > 0
        assert report["pinned_bytes"] > 0
        assert report["fallbacks"] == []
