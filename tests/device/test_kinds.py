"""Tensors of other kinds: views of one another, split over several processes, and subclasses that store something else."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import weightstream as ws
from tests.builders import assert_same, bytes_of, random_tensors, write_in_order
from tests.fakes.rig import KIB, Rig
from weightstream.scheduler.report import LoadReport


async def load(rig: Rig, folder: Path, model: nn.Module, tensors: dict[str, torch.Tensor], **device: Any) -> LoadReport:
    path = write_in_order(folder / "checkpoint", tensors)
    async with rig.loader(**device) as loader:
        return await loader.load(model, path)


#: Of the tensors of `TestSharedMemory.model`, in another order than there.
SHAPES = {"part": (2, 3), "right": (4, 3), "whole": (5, 3), "left": (4, 3), "alone": (7,)}


class TestSharedMemory:
    @staticmethod
    def model() -> nn.Module:
        """`part` is two rows of `whole`; `left` and `right` lie in each other's gaps."""
        model = nn.Module()
        model.whole = nn.Parameter(torch.zeros(5, 3))
        model.part = nn.Parameter(model.whole.data[1:3])
        columns = torch.zeros(4, 6)
        model.register_buffer("left", columns[:, :3])
        model.register_buffer("right", columns[:, 3:])
        model.alone = nn.Parameter(torch.zeros(7))
        return model

    async def test_views_are_loaded_and_stay_views(self, rig: Rig, tmp_path: Path) -> None:
        model, tensors = self.model(), random_tensors(SHAPES)
        tensors["part"] = tensors["whole"][1:3]
        addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        await load(rig, tmp_path, model, tensors)
        for name, tensor in model.state_dict().items():
            assert_same(tensor, tensors[name])
            assert tensor.data_ptr() == addresses[name]

    async def test_one_of_two_is_enough(self, rig: Rig, tmp_path: Path) -> None:
        model, tensors = self.model(), random_tensors(SHAPES)
        del tensors["part"]
        report = await load(rig, tmp_path, model, tensors, strict=False)
        assert report.missing_keys == ("part",)
        assert_same(model.get_parameter("part"), tensors["whole"][1:3])

    async def test_other_bytes_for_the_same_memory_are_an_error(self, rig: Rig, tmp_path: Path) -> None:
        model, tensors = self.model(), random_tensors(SHAPES)
        with pytest.raises(ws.PlacementError, match="in the memory of another one") as caught:
            await load(rig, tmp_path, model, tensors)
        assert caught.value.tensor == "whole"  # the first in the model, which the second has been copied over
        assert {"whole", "part"} <= set(caught.value.partly_written)

    async def test_on_meta_each_gets_storage_of_its_own(self, rig: Rig, tmp_path: Path) -> None:
        with torch.device("meta"):
            model = self.model()
        tensors = random_tensors(SHAPES)
        await load(rig, tmp_path, model, tensors)
        for name, tensor in model.state_dict().items():
            assert_same(tensor, tensors[name])


def slices_before_loading(module: nn.Module, hook: Callable[..., None]) -> None:
    register: Callable[..., object] = module._register_load_state_dict_pre_hook  # torch gives it no types
    register(hook)


class Split(nn.Linear):
    """Keeps some rows of what the checkpoint has, as AutoDeploy's hooks for tensor parallelism do.

    They are registered in torch's old way (no module among the arguments), for one parameter each.
    """

    RANK, WORLD = 1, 2

    def __init__(self, where: str) -> None:
        super().__init__(4, 3, device=where)
        for key in ("weight", "bias"):
            hook = partial(self._slice, key=key, shape=self._parameters[key].shape)  # type: ignore[union-attr]  # both are there
            slices_before_loading(self, hook)

    @classmethod
    def _slice(cls, state: dict[str, Any], prefix: str, *_: Any, key: str, shape: torch.Size) -> None:
        name = prefix + key
        if name in state and state[name].shape != shape:
            state[name] = torch.tensor_split(state[name], cls.WORLD)[cls.RANK]


@pytest.fixture(params=["meta", "cpu"], ids=["adopt", "in-place"])
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestHooksThatSlice:
    async def test_rows_of_this_rank_are_kept(self, rig: Rig, tmp_path: Path, where: str) -> None:
        model = nn.Sequential(Split(where), nn.Linear(3, 2, device=where))
        tensors = random_tensors({"0.weight": (6, 4), "0.bias": (6,), "1.weight": (2, 3), "1.bias": (2,)})
        held = dict(model.named_parameters())
        report = await load(rig, tmp_path, model, tensors)
        assert_same(model.get_parameter("0.weight"), tensors["0.weight"][3:])
        assert_same(model.get_parameter("0.bias"), tensors["0.bias"][3:])
        assert_same(model.get_parameter("1.weight"), tensors["1.weight"])
        assert dict(model.named_parameters()) == held
        assert report.fallbacks[0].endswith("hooks of their own: 0 (Split)")

    async def test_slice_does_not_keep_what_it_was_cut_from(self, rig: Rig, tmp_path: Path) -> None:
        model = Split("meta")
        await load(rig, tmp_path, model, random_tensors({"weight": (6, 4), "bias": (6,)}))
        for parameter in model.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.nbytes

    async def test_hook_of_the_whole_model_is_obeyed(self, rig: Rig, tmp_path: Path, where: str) -> None:
        """A graph module has the hooks of all its parameters itself."""
        model = nn.Sequential(nn.Linear(4, 3, device=where), nn.Linear(3, 2, device=where))
        hook = partial(Split._slice, key="0.weight", shape=torch.Size([3, 4]))
        slices_before_loading(model, hook)
        tensors = random_tensors({"0.weight": (6, 4), "0.bias": (3,), "1.weight": (2, 3), "1.bias": (2,)})
        await load(rig, tmp_path, model, tensors)
        assert_same(model.get_parameter("0.weight"), tensors["0.weight"][3:])
        assert_same(model.get_parameter("1.weight"), tensors["1.weight"])

    async def test_sliced_tensor_is_cast(self, rig: Rig, tmp_path: Path, where: str) -> None:
        model = Split(where)
        tensors = random_tensors({"weight": (6, 4), "bias": (6,)}, torch.bfloat16)
        await load(rig, tmp_path, model, tensors)
        assert_same(model.weight, tensors["weight"][3:].float())


@pytest.fixture
def mesh() -> Generator[DeviceMesh, None, None]:
    """The second of two processes; what it would send to the other goes nowhere."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


@pytest.fixture
def alone(tmp_path: Path) -> Generator[DeviceMesh, None, None]:
    """A single process that really could talk to others."""
    file = tmp_path / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def split(tensor: torch.Tensor, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(tensor, mesh, [placement], src_data_rank=None))


def local(model: nn.Module, name: str) -> torch.Tensor:
    found = model.get_parameter(name)
    assert isinstance(found, DTensor)
    return found.to_local()


class TestDTensor:
    @pytest.mark.parametrize(
        ("placement", "rows", "columns"),
        [
            (Shard(0), slice(3, 5), slice(None)),  # of five rows the first process has three
            (Shard(1), slice(None), slice(2, 4)),
            (Replicate(), slice(None), slice(None)),
        ],
        ids=["rows", "columns", "replicated"],
    )
    async def test_own_part_is_filled_in_place(
        self, rig: Rig, tmp_path: Path, mesh: DeviceMesh, placement: Placement, rows: slice, columns: slice
    ) -> None:
        model = nn.Linear(4, 5)
        model.weight = split(torch.zeros(5, 4), mesh, placement)
        held, address = model.weight, local(model, "weight").data_ptr()
        tensors = random_tensors({"weight": (5, 4), "bias": (5,)})
        await load(rig, tmp_path, model, tensors)
        assert model.weight is held
        assert local(model, "weight").data_ptr() == address
        assert_same(local(model, "weight"), tensors["weight"][rows, columns])
        assert_same(model.bias, tensors["bias"])

    async def test_one_process_has_all(self, rig: Rig, tmp_path: Path, alone: DeviceMesh) -> None:
        model = nn.Linear(4, 5)
        model.weight = split(torch.zeros(5, 4), alone, Shard(0))
        tensors = random_tensors({"weight": (5, 4), "bias": (5,)}, torch.bfloat16)
        await load(rig, tmp_path, model, tensors)
        assert_same(local(model, "weight"), tensors["weight"].float())

    async def test_module_that_loads_itself_gets_its_part(self, rig: Rig, tmp_path: Path, mesh: DeviceMesh) -> None:
        model = nn.BatchNorm1d(6)
        model.weight = split(torch.zeros(6), mesh, Shard(0))
        shapes = {name: (6,) for name in ("weight", "bias", "running_mean", "running_var")}  # noqa: C420
        tensors = {**random_tensors(shapes), "num_batches_tracked": torch.tensor(3)}
        await load(rig, tmp_path, model, tensors)
        assert_same(local(model, "weight"), tensors["weight"][3:])
        assert_same(model.bias, tensors["bias"])

    @pytest.mark.parametrize("different", [False, True], ids=["equal", "different"])
    async def test_ties_are_compared(
        self,
        rig: Rig,
        tmp_path: Path,
        mesh: DeviceMesh,
        different: bool,  # noqa: FBT001
    ) -> None:
        model = nn.Module()
        model.a = model.b = split(torch.zeros(4, 2), mesh, Shard(0))
        tensors = random_tensors({"a": (4, 2), "b": (4, 2)})
        if different:
            with pytest.raises(ws.PlacementError, match="ties this tensor"):
                await load(rig, tmp_path, model, tensors)
            return
        tensors["b"] = tensors["a"]
        await load(rig, tmp_path, model, tensors)
        assert_same(local(model, "b"), tensors["a"][2:])

    async def test_direct_holds_one_whole_tensor_at_a_time(self, rig: Rig, tmp_path: Path, mesh: DeviceMesh) -> None:
        model = nn.Sequential(*(nn.Linear(32, 32 * (i + 1), bias=False) for i in range(3)))
        for i, layer in enumerate(model):
            layer.weight = split(torch.zeros_like(model.get_parameter(f"{i}.weight")), mesh, Shard(0))
        tensors = random_tensors({f"{i}.weight": (32 * (i + 1), 32) for i in range(3)})
        report = await load(rig, tmp_path, model, tensors, strategy="direct")
        for i in range(3):
            assert_same(local(model, f"{i}.weight"), tensors[f"{i}.weight"][16 * (i + 1) :])
        largest = tensors["2.weight"].nbytes
        slot_bytes = (
            largest + 2 * 4 * KIB if rig.io == "direct" else 0
        )  # of whole pages; else it is read to where it is staged
        if rig.device != "fake":  # DTensors of the CPU
            assert report.host_peak_bytes == slot_bytes + largest
        elif rig.device == "fake":  # what has storage on the CPU stays there, also beside a real one
            assert report.device_peak_bytes == largest

    async def test_whole_shape_counts(self, rig: Rig, tmp_path: Path, mesh: DeviceMesh) -> None:
        model = nn.Linear(4, 5, bias=False)
        model.weight = split(torch.zeros(5, 4), mesh, Shard(0))
        with pytest.raises(ws.ShapeMismatchError):
            await load(rig, tmp_path, model, random_tensors({"weight": (2, 4)}))
        assert rig.disk.num_begun == 0

    @pytest.mark.parametrize("kind", ["meta", "partial"])
    async def test_what_has_no_part_here_is_refused_by_name(
        self, rig: Rig, tmp_path: Path, mesh: DeviceMesh, kind: str
    ) -> None:
        model = nn.Linear(4, 4, bias=False)
        if kind == "meta":
            model.weight = split(torch.zeros(4, 4, device="meta"), mesh, Shard(0))
        else:
            model.weight = nn.Parameter(DTensor.from_local(torch.zeros(4, 4), mesh, [Partial()]))
        with pytest.raises(ws.PlacementError, match="to_empty" if kind == "meta" else "found Partial") as caught:
            await load(rig, tmp_path, model, random_tensors({"weight": (4, 4)}))
        assert caught.value.tensor == "weight"
        assert rig.disk.num_begun == 0


class Quantises(nn.Parameter):
    """As bitsandbytes' parameters are: plain until they are moved to a device, and then something else."""

    def to(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("nobody is to move it")


class TestSubclasses:
    @pytest.mark.parametrize("own", [False, True], ids=["plain-module", "loads-itself"])
    async def test_one_that_changes_when_it_is_moved_is_refused_by_name(
        self,
        rig: Rig,
        tmp_path: Path,
        own: bool,  # noqa: FBT001
    ) -> None:
        model = nn.Sequential(Split("meta") if own else nn.Linear(4, 3, device="meta"))
        model[0].weight = Quantises(torch.zeros(3, 4, device="meta"))
        with pytest.raises(ws.PlacementError, match=r"storage of its own kind .*Quantises") as caught:
            await load(rig, tmp_path, model, random_tensors({"0.weight": (3, 4), "0.bias": (3,)}))
        assert caught.value.tensor == "0.weight"
        assert rig.disk.num_begun == 0
        assert model[0].weight.is_meta

    async def test_with_storage_it_is_refused_too(self, rig: Rig, tmp_path: Path) -> None:
        model = nn.Linear(4, 3)
        model.weight = Quantises(torch.zeros(3, 4))
        before = bytes_of(model.weight)
        with pytest.raises(ws.PlacementError, match="Quantises"):
            await load(rig, tmp_path, model, random_tensors({"weight": (3, 4), "bias": (3,)}))
        assert bytes_of(model.weight) == before
