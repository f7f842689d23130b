"""Files of `torch.save` load as `torch.load` loads them, bit for bit, by every strategy, onto meta and onto storage."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weightstream as ws
from tests.builders import assert_same, write_index
from tests.fakes.rig import KIB, Rig
from tests.models import SmallNet, tensors_of
from weightstream import samples
from weightstream.errors import MissingKeysError, PlacementError, UnexpectedKeysError, UnsupportedFormatError

LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])


def save(path: Path, value: object, *, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


class Holder(nn.Module):
    """A buffer for each tensor, of its shape and dtype."""

    def __init__(self, tensors: dict[str, torch.Tensor], device: str) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, torch.zeros(tensor.shape, dtype=tensor.dtype, device=device))


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def contains_itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def doubling(times: int) -> list[Any]:
    """A list that a walk over it would never see the end of."""
    value: list[Any] = [1]
    for _ in range(times):
        value = [value, value]
    return value


def odd_tensors() -> dict[str, torch.Tensor]:
    """What safetensors would not hold: views with strides, tensors that share bytes, a large one transposed."""
    base = torch.randn(40, 50)
    large = torch.randn(700, 500)  # more than a megabyte
    return {
        "whole": base,
        "part": base[3:9],
        "column": base[:, 7],
        "window": base[5:30, 10:20],
        "transposed": base.t(),
        "steps": torch.arange(100, dtype=torch.int32)[1::3],
        "expanded": torch.randn(1, 5).expand(4, 5),
        "large": large.t(),
        "permuted": torch.randn(3, 4, 5).bfloat16().permute(2, 0, 1),
        "scalar": base[3, 4],
        "nothing": base[:0],
        "ones": torch.randn(4, 1, 3)[:, :, :1],
    }


@LAYOUTS
@pytest.mark.parametrize("where", ["meta", "cpu"])
@pytest.mark.parametrize("strategy", ["stream", "preload", "direct", "map"])
async def test_state_dict_is_loaded(rig: Rig, tmp_path: Path, strategy: str, where: str, *, zipped: bool) -> None:
    if strategy == "map" and rig.device != "host":
        pytest.skip("tensors in mapped files are on the host")
    tensors = tensors_of(SmallNet())
    with torch.device(where):
        model = SmallNet()
    path = save(tmp_path / "pytorch_model.bin", tensors, zipped=zipped)
    async with rig.loader(strategy=strategy) as loader:
        report = await loader.load(model, tmp_path)
    expected = torch.load(path, weights_only=True)
    assert set(model.state_dict()) == set(expected)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, expected[name])
    assert (report.num_tensors, report.checkpoint) == (len(tensors), str(path))


@LAYOUTS
@pytest.mark.parametrize("where", ["meta", "cpu"])
@pytest.mark.parametrize("strategy", ["stream", "preload", "direct", "map"])
async def test_views_and_shared_bytes_are_loaded(
    rig: Rig, tmp_path: Path, strategy: str, where: str, *, zipped: bool
) -> None:
    if strategy == "map" and rig.device != "host":
        pytest.skip("tensors in mapped files are on the host")
    tensors = odd_tensors()
    path = save(tmp_path / "model.pt", tensors, zipped=zipped)
    model = Holder(tensors, where)
    async with rig.loader(strategy=strategy) as loader:
        await loader.load(model, path)
    for name, tensor in torch.load(path, weights_only=True).items():
        found = model.get_buffer(name)
        assert_same(found, tensor)
        assert found.is_contiguous()


@LAYOUTS
async def test_stream_yields_every_tensor(rig: Rig, tmp_path: Path, *, zipped: bool) -> None:
    tensors = odd_tensors()
    path = save(tmp_path / "model.pth", tensors, zipped=zipped)
    expected = torch.load(path, weights_only=True)
    seen: set[str] = set()
    async with rig.loader(host_memory=8 * 1024 * KIB) as loader:
        async for name, tensor in loader.stream(path):
            assert_same(tensor, expected[name])
            seen.add(name)
    assert seen == set(tensors)


async def test_views_are_cast(rig: Rig, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in odd_tensors().items() if tensor.is_floating_point()}
    path = save(tmp_path / "model.bin", tensors)
    for where in ("meta", "cpu"):
        model = Holder({name: tensor.to(torch.float16) for name, tensor in tensors.items()}, where)
        async with rig.loader() as loader:
            await loader.load(model, path)
        for name, tensor in tensors.items():
            assert_same(model.get_buffer(name), tensor.to(torch.float16).contiguous())


@pytest.mark.parametrize("where", ["meta", "cpu"])
async def test_ties_may_share_one_storage_in_the_file(rig: Rig, tmp_path: Path, where: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 4, bias=False, device=where)
            self.b = nn.Linear(6, 4, bias=False, device=where)
            self.b.weight = self.a.weight

    shared = torch.randn(6, 4).t()  # strided, and under both names
    path = save(tmp_path / "model.bin", {"a.weight": shared, "b.weight": shared})
    model = Tied()
    async with rig.loader() as loader:
        await loader.load(model, path)
    assert model.a.weight is model.b.weight
    assert_same(model.a.weight, shared.contiguous())


async def test_module_that_loads_itself_is_given_views(rig: Rig, tmp_path: Path) -> None:
    reference = nn.BatchNorm1d(8)
    state = dict(reference.state_dict())
    state["weight"] = torch.randn(8, 3)[:, 1]
    path = save(tmp_path / "model.bin", state)
    with torch.device("meta"):
        model = nn.BatchNorm1d(8)
    async with rig.loader() as loader:
        await loader.load(model, path)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, state[name].contiguous())


class Keeper(nn.Linear):
    """Keeps something besides parameters."""

    def __init__(self, where: str) -> None:
        super().__init__(2, 3, device=where)
        self.kept: Any = None

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


class TestExtraStateThatIsNoTensor:
    @LAYOUTS
    @pytest.mark.parametrize("where", ["meta", "cpu"])
    @pytest.mark.parametrize(
        "state",
        [
            pytest.param(None, id="None"),
            pytest.param(7, id="number"),
            pytest.param("text", id="text"),
            pytest.param(b"\x00bytes\xff", id="bytes"),
            pytest.param({"step": 3, "scale": 0.1, "names": ["a", ("b", True)], 5: 2**70}, id="dict"),
            pytest.param(OrderedDict(b=1, a=[]), id="OrderedDict"),
            pytest.param([], id="nothing in it"),
            pytest.param({"a", 1, 2.5, None, b"b\xff", 3 + 4j}, id="set"),
            pytest.param(set[int](), id="empty set"),
            pytest.param([1.5 - 2j], id="complex"),
            pytest.param(bytearray(b"\0a\xff"), id="bytearray"),
            pytest.param(bytearray(), id="empty bytearray"),
        ],
    )
    async def test_is_given_to_its_module(
        self, rig: Rig, tmp_path: Path, where: str, state: Any, *, zipped: bool
    ) -> None:
        keeper, other = Keeper(where), Keeper("cpu")
        model = nn.Sequential(nn.Linear(2, 2, device=where), keeper)
        reference = nn.Sequential(nn.Linear(2, 2), other)
        other.kept = state
        path = save(tmp_path / "model.bin", reference.state_dict(), zipped=zipped)
        other.kept = "lost"
        reference.load_state_dict(torch.load(path, weights_only=True))
        async with rig.loader() as loader:
            report = await loader.load(model, path)
        assert keeper.kept == other.kept == state
        assert type(keeper.kept) is type(state)
        assert_same(keeper.weight, other.weight)
        assert f"format: {path}; for modules alone, as it is no tensor: 1._extra_state" in report.decisions
        assert not report.missing_keys

    @LAYOUTS
    async def test_has_the_tensors_that_are_in_it(self, rig: Rig, tmp_path: Path, *, zipped: bool) -> None:
        base = torch.randn(4, 6)
        tensors = [base.t(), base[1:3], torch.ones(0, 2), torch.tensor(3).to(torch.int16), torch.randn(3).bfloat16()]
        reference = Keeper("cpu")
        reference.kept = {"history": tensors, "step": 1}
        path = save(
            tmp_path / "model.bin", {"net": nn.Linear(1, 1).state_dict(), **reference.state_dict()}, zipped=zipped
        )
        model = Keeper("meta")
        async with rig.loader() as loader:
            await loader.load(model, path)
        for found, expected in zip(model.kept["history"], tensors, strict=True):
            assert_same(found, expected)
            assert found.stride() == expected.stride() or not found.numel()

    @pytest.mark.parametrize("strategy", ["preload", "direct"])
    async def test_follows_the_rules_for_names_and_may_be_in_any_shard(
        self, rig: Rig, tmp_path: Path, strategy: str
    ) -> None:
        reference = Keeper("cpu")
        reference.kept = [1, 2]
        state = {f"old.{name}": value for name, value in reference.state_dict().items()}
        save(tmp_path / "pytorch_model-1.bin", {"old.weight": state["old.weight"]})
        save(tmp_path / "pytorch_model-2.bin", {name: state[name] for name in ("old.bias", "old._extra_state")})
        weight_map = {name: f"pytorch_model-{1 if name == 'old.weight' else 2}.bin" for name in state}
        write_index(tmp_path, weight_map, "pytorch_model.bin.index.json")
        model = nn.Sequential(Keeper("meta"))
        async with rig.loader(strategy=strategy, rename=[{"pattern": r"^old\.", "to": "0."}]) as loader:
            await loader.load(model, tmp_path)
            assert model[0].kept == [1, 2]
        model = nn.Sequential(Keeper("meta"))
        part: dict[str, Any] = {
            "rename": [{"pattern": r"^old\.", "to": "0."}],
            "exclude": ["_extra_state"],
            "strict": False,
        }
        async with rig.loader(strategy=strategy, **part) as loader:
            report = await loader.load(model, tmp_path)
            assert model[0].kept is None
            assert not report.missing_keys  # what was not selected is not missing

    @pytest.mark.parametrize("where", ["meta", "cpu"])
    @pytest.mark.parametrize("state", [3, torch.tensor(3)], ids=["plain", "tensor"])
    async def test_of_a_module_with_two_names_is_there_twice(
        self, rig: Rig, tmp_path: Path, where: str, state: Any
    ) -> None:
        def twice(keeper: Keeper) -> nn.Module:
            return nn.ModuleDict({"a": keeper, "b": nn.ModuleList([keeper])})

        reference, keeper = Keeper("cpu"), Keeper(where)
        reference.kept = state
        saved = twice(reference).state_dict()
        assert {"a._extra_state", "b.0._extra_state"} <= saved.keys()
        async with rig.loader() as loader:
            report = await loader.load(twice(keeper), save(tmp_path / "model.bin", saved))
            assert keeper.kept == 3
            assert report.unexpected_keys == ()
            assert_same(keeper.weight, reference.weight)
            for changed in ("a._extra_state", "b.0._extra_state"):  # each name counts, and the last for good
                other, expected = Keeper(where), Keeper("cpu")
                path = save(tmp_path / "model.bin", saved | {changed: 5 if isinstance(state, int) else torch.tensor(5)})
                twice(expected).load_state_dict(torch.load(path, weights_only=True))
                await loader.load(twice(other), path)
                assert other.kept == expected.kept == (3 if changed.startswith("a") else 5)
            del saved["a._extra_state"]
            with pytest.raises((UnexpectedKeysError, MissingKeysError), match="_extra_state"):
                await loader.load(twice(Keeper(where)), save(tmp_path / "model.bin", saved))

    async def test_without_a_module_for_it_is_unexpected_as_in_torch(self, rig: Rig, tmp_path: Path) -> None:
        reference = nn.Sequential(Keeper("cpu"))
        path = save(tmp_path / "model.bin", reference.state_dict())
        plain = nn.Sequential(nn.Linear(2, 3))
        with pytest.raises(RuntimeError, match=r'Unexpected key.*"0\._extra_state"'):
            plain.load_state_dict(torch.load(path, weights_only=True))
        async with rig.loader() as loader:
            with pytest.raises(UnexpectedKeysError, match=r"0\._extra_state"):
                await loader.load(plain, path)
        async with rig.loader(strict=False) as loader:
            report = await loader.load(plain, path)
        assert report.unexpected_keys == ("0._extra_state",)

    @pytest.mark.parametrize(
        ("state", "says"),
        [
            pytest.param({"device": torch.device("cpu")}, "something else than plain data", id="device"),
            pytest.param(torch.float16, "something else than plain data", id="dtype"),
            pytest.param([torch.zeros(2**22), torch.zeros(1)], "more than 16777216 bytes", id="tensors"),
            pytest.param(b"a" * (2**24 + 1), "more than 16777216 bytes", id="bytes"),
            pytest.param([1] * 100_000, "more than 100000 values", id="values"),
            pytest.param(set(range(100_000)), "more than 100000 values", id="values of a set"),
            pytest.param(nested(40), "32 levels", id="levels"),
            pytest.param(contains_itself(), "32 levels", id="contains itself"),
            pytest.param(doubling(30), "more than 100000 values", id="one list again and again"),
        ],
    )
    async def test_that_cannot_be_had_is_refused_by_name_where_a_module_wants_it(
        self, rig: Rig, tmp_path: Path, state: Any, says: str
    ) -> None:
        reference = nn.Sequential(Keeper("cpu"))
        reference[0].kept = state
        path = save(tmp_path / "model.bin", reference.state_dict())
        model = nn.Sequential(Keeper("meta"))
        async with rig.loader() as loader:
            with pytest.raises(UnsupportedFormatError, match=says) as caught:
                await loader.load(model, path)
        assert (caught.value.tensor, caught.value.file) == ("0._extra_state", str(path))
        assert model[0].weight.is_meta
        assert rig.disk.num_begun == 0
        async with rig.loader(ignore_unexpected=["_extra_state"]) as loader:
            report = await loader.load(nn.Sequential(nn.Linear(2, 3)), path)
        assert report.num_tensors == 2


async def test_index_of_pickles_is_loaded(rig: Rig, tmp_path: Path) -> None:
    tensors = tensors_of(SmallNet())
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        save(tmp_path / file, {name: tensors[name] for name in part}, zipped=number == 0)
        weight_map |= dict.fromkeys(part, file)
    write_index(tmp_path, weight_map, "pytorch_model.bin.index.json")
    save(tmp_path / "training_args.bin", {"x": 1})
    with torch.device("meta"):
        model = SmallNet()
    async with rig.loader() as loader:
        report = await loader.load(model, tmp_path)
    assert report.num_shards == 2
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])


async def test_report_says_what_was_left_out(rig: Rig, tmp_path: Path) -> None:
    tensors = tensors_of(SmallNet())
    path = save(tmp_path / "last.pt", {"epoch": 3, "state_dict": tensors, "optimizer": {"state": {0: torch.zeros(2)}}})
    with torch.device("meta"):
        model = SmallNet()
    async with rig.loader() as loader:
        report = await loader.load(model, path)
    assert f"format: taken from under 'state_dict' in {path}; left out, as they are no tensors: epoch, optimizer" in (
        report.decisions
    )


async def test_failed_load_of_views_leaves_the_model_on_meta(rig: Rig, tmp_path: Path) -> None:
    tied = torch.randn(6, 4)
    path = save(tmp_path / "model.bin", {"a": tied.t(), "b": tied.t() + 1})
    with torch.device("meta"):
        model = nn.Module()
        model.a = model.b = nn.Parameter(torch.zeros(4, 6))
    async with rig.loader() as loader:
        with pytest.raises(PlacementError, match="the model ties this tensor"):
            await loader.load(model, path)
    assert model.a.is_meta
    assert model.a is model.b


@pytest.mark.parametrize("commit", ["progressive", "atomic"])
def test_expanded_tensor_is_not_written_out_on_its_way_to_storage(tmp_path: Path, commit: str) -> None:
    """It would be of any size, and `host_memory` does not hold it."""
    row = torch.randn(4000)
    path = save(tmp_path / "model.bin", {"a": row.expand(8000, 4000), "b": torch.zeros(2).expand(3, 2)})
    model = nn.ParameterDict({"a": nn.Parameter(torch.ones(8000, 4000)), "b": nn.Parameter(torch.ones(3, 2))})
    config = ws.LoaderConfig.model_validate(
        {"prefetch": {"chunk": "64KiB", "host_memory": "1MiB"}, "device": {"target": "cpu", "commit": commit}}
    )
    gauge = samples._Gauge()
    report = ws.load_sync(model, path, config=config)
    grown_bytes = gauge.peak_bytes
    assert torch.equal(model["a"], row.expand(8000, 4000))
    assert not model["b"].any()
    assert report.host_peak_bytes < 2**20
    assert grown_bytes is None or grown_bytes < 64 * 2**20, "half of what it has"
