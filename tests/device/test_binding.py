"""Parameters take what was loaded and stay what they are: objects, classes, attributes, ties."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightstream as ws
from tests.builders import assert_same, bytes_of, random_tensors, write_in_order
from tests.fakes.rig import Rig
from tests.models import SmallNet, tensors_of
from weightstream.errors import (
    DtypeMismatchError,
    MemoryBudgetError,
    MissingKeysError,
    PlacementError,
    ReadError,
    ShapeMismatchError,
    UnexpectedKeysError,
)
from weightstream.scheduler.report import LoadReport


async def load(rig: Rig, folder: Path, model: nn.Module, tensors: dict[str, torch.Tensor], **device: Any) -> LoadReport:
    path = write_in_order(folder / "checkpoint", tensors)
    async with rig.loader(num_slots=4, **device) as loader:
        return await loader.load(model, path)


def assert_loaded(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in state.items():
        assert_same(tensor, tensors[name])


@pytest.fixture(params=["meta", "cpu"], ids=["adopt", "in-place"])
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def small_net(where: str) -> SmallNet:
    with torch.device(where):
        return SmallNet()


async def test_every_tensor_has_its_bytes(rig: Rig, tmp_path: Path, where: str) -> None:
    model = small_net(where)
    tensors = tensors_of(model)
    report = await load(rig, tmp_path, model, tensors)
    assert_loaded(model, tensors)
    assert report.fallbacks == ()


async def test_tensor_with_storage_is_written_to_where_it_is(rig: Rig, tmp_path: Path) -> None:
    model = small_net("cpu")
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()}
    await load(rig, tmp_path, model, tensors_of(model))
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert (tensor, tensor.data_ptr()) == before[name] or (tensor is before[name][0])
        assert tensor.data_ptr() == before[name][1]


async def test_adopted_tensors_begin_on_256_bytes(rig: Rig, tmp_path: Path) -> None:
    model = small_net("meta")
    await load(rig, tmp_path, model, tensors_of(model))
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() % 256 == 0, name
        assert tensor.is_contiguous()


async def test_large_tensor_has_storage_of_its_own_and_small_ones_share(rig: Rig, tmp_path: Path) -> None:
    model = small_net("meta")
    await load(rig, tmp_path, model, tensors_of(model))
    large = model.large.weight
    assert large.untyped_storage().nbytes() - large.nbytes < 256
    shared = {layer.untyped_storage().data_ptr() for layer in model.layers.parameters()}
    assert len(shared) == 1
    assert large.untyped_storage().data_ptr() not in shared


async def test_class_attributes_and_requires_grad_are_kept(rig: Rig, tmp_path: Path, where: str) -> None:
    class Marked(nn.Parameter):
        """As some libraries make them, to say how to split a weight."""

    model = nn.Linear(3, 2, device=where)
    model.weight = Marked(torch.zeros(2, 3, device=where), requires_grad=False)
    vars(model.weight)["rows_per_rank"] = 2
    vars(model.bias)["scale"] = 3
    tensors = random_tensors({"weight": (2, 3), "bias": (2,)})
    await load(rig, tmp_path, model, tensors)
    assert type(model.weight) is Marked
    assert type(model.bias) is nn.Parameter
    assert (vars(model.weight), model.weight.requires_grad) == ({"rows_per_rank": 2}, False)
    assert (vars(model.bias), model.bias.requires_grad, model.bias.is_leaf) == ({"scale": 3}, True, True)
    assert_loaded(model, tensors)


async def test_who_holds_a_parameter_holds_the_loaded_one(rig: Rig, tmp_path: Path, where: str) -> None:
    model = nn.Linear(3, 2, device=where)
    held = dict(model.named_parameters())
    tensors = random_tensors({"weight": (2, 3), "bias": (2,)})
    await load(rig, tmp_path, model, tensors)
    for name, parameter in held.items():
        assert model.get_parameter(name) is parameter
        assert_same(parameter, tensors[name])


async def test_version_counters_are_independent(rig: Rig, tmp_path: Path, where: str) -> None:
    model = small_net(where)
    await load(rig, tmp_path, model, tensors_of(model))
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    with torch.no_grad():
        model.get_parameter("layers.0.weight").add_(1)
    for name, parameter in model.named_parameters():
        assert parameter._version == versions[name] + (name == "layers.0.weight")


async def test_loaded_model_can_be_trained(rig: Rig, tmp_path: Path, where: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4, device=where), nn.Linear(4, 2, device=where))
    tensors = random_tensors({"0.weight": (4, 3), "0.bias": (4,), "1.weight": (2, 4), "1.bias": (2,)})
    await load(rig, tmp_path, model, tensors)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(torch.ones(1, 3, device=next(model.parameters()).device)).sum()
    with torch.no_grad():
        model.get_parameter("0.bias").add_(
            0
        )  # a neighbour in the same block; autograd must not take it for a change of the others
    loss.backward()
    optimizer.step()
    for parameter in model.parameters():
        assert parameter.grad is not None
    assert bytes_of(model.get_parameter("1.bias")) != bytes_of(tensors["1.bias"])


class TestTies:
    class Tied(nn.Module):
        """A head that shares the embedding's weight."""

        def __init__(self, where: str) -> None:
            super().__init__()
            self.embed = nn.Embedding(30, 8, device=where)
            self.norm = nn.LayerNorm(8, device=where)
            self.head = nn.Linear(8, 30, bias=False, device=where)
            self.head.weight = self.embed.weight

    @pytest.mark.parametrize("names", [["embed"], ["head"], ["embed", "head"], ["head", "embed"]], ids="-and-".join)
    async def test_all_names_go_on_sharing_one(self, rig: Rig, tmp_path: Path, where: str, names: list[str]) -> None:
        model = self.Tied(where)
        rest = random_tensors({"norm.weight": (8,), "norm.bias": (8,)})
        weight = torch.rand(30, 8)
        report = await load(rig, tmp_path, model, rest | {f"{name}.weight": weight for name in names})
        assert model.head.weight is model.embed.weight
        assert_same(model.head.weight, weight)
        assert (report.missing_keys, report.unexpected_keys) == ((), ())

    async def test_both_names_are_ready_with_one(self, rig: Rig, tmp_path: Path, where: str) -> None:
        model = self.Tied(where)
        tensors = random_tensors({"norm.weight": (8,), "norm.bias": (8,), "head.weight": (30, 8)})
        path = write_in_order(tmp_path / "c", tensors)
        async with rig.loader() as loader:
            handle = await loader.start(model, path)
            await handle.ready("embed")
            await handle.ready("head.weight")
            assert handle.progress.total_tensors == 4

    async def test_different_bytes_under_two_names_are_refused(self, rig: Rig, tmp_path: Path, where: str) -> None:
        model = self.Tied(where)
        before = dict(model.named_parameters())
        shapes = {"norm.weight": (8,), "norm.bias": (8,), "embed.weight": (30, 8), "head.weight": (30, 8)}
        with pytest.raises(PlacementError, match="ties this tensor") as caught:
            await load(rig, tmp_path, model, random_tensors(shapes))
        assert caught.value.tensor == "head.weight"
        for name, parameter in model.named_parameters():
            assert parameter is before[name]
            assert parameter.is_meta == (where == "meta")
        assert model.head.weight is model.embed.weight
        assert bool(caught.value.partly_written) == (where == "cpu")

    async def test_cast_doubles_are_compared_after_the_cast(self, rig: Rig, tmp_path: Path, where: str) -> None:
        model = self.Tied(where)
        weight = torch.rand(30, 8).bfloat16()
        tensors = random_tensors({"norm.weight": (8,), "norm.bias": (8,)})
        await load(rig, tmp_path, model, tensors | {"embed.weight": weight, "head.weight": weight.float()})
        assert_same(model.head.weight, weight.float())


def before_loading(module: nn.Module, hook: Callable[..., None]) -> None:
    register: Callable[..., object] = module.register_load_state_dict_pre_hook  # torch gives it no types
    register(hook)


class TestModulesThatLoadThemselves:
    async def test_batch_norm(self, rig: Rig, tmp_path: Path, where: str) -> None:
        model = nn.Sequential(nn.Conv2d(1, 4, 3, device=where), nn.BatchNorm2d(4, device=where))
        tensors = tensors_of(model)
        held = model[1].weight
        report = await load(rig, tmp_path, model, tensors)
        assert_loaded(model, tensors)
        assert model[1].weight is held
        assert isinstance(held, nn.Parameter)
        assert held.requires_grad
        assert any("1 (BatchNorm2d)" in fallback for fallback in report.fallbacks)

    async def test_batch_norm_in_another_float(self, rig: Rig, tmp_path: Path, where: str) -> None:
        model = nn.BatchNorm1d(4, device=where)
        tensors = tensors_of(model, dtype=torch.bfloat16)
        await load(rig, tmp_path, model, tensors)
        for name, tensor in model.state_dict().items():
            assert_same(tensor, tensors[name].to(tensor.dtype))

    async def test_batch_norm_is_checked_beforehand(self, rig: Rig, tmp_path: Path, where: str) -> None:
        model = nn.BatchNorm1d(4, device=where)
        with pytest.raises(ShapeMismatchError):
            await load(rig, tmp_path, model, tensors_of(nn.BatchNorm1d(5)))
        tensors = tensors_of(model) | {"weight": torch.zeros(4, dtype=torch.float8_e4m3fn)}
        with pytest.raises(DtypeMismatchError):
            await load(rig, tmp_path, model, tensors)
        assert rig.disk.num_begun == 0

    class Head(nn.Linear):
        """Loads itself, and is tied to an embedding."""

        def _load_from_state_dict(self, *arguments: Any) -> None:
            super()._load_from_state_dict(*arguments)

    def tied(self, where: str, *, head_first: bool) -> nn.ModuleDict:
        embedding, head = nn.Embedding(4, 4, device=where), self.Head(4, 4, bias=False, device=where)
        embedding.weight = head.weight
        parts = {"embedding": embedding, "head": head}
        return nn.ModuleDict({name: parts[name] for name in sorted(parts, reverse=head_first)})

    @pytest.mark.parametrize("head_first", [True, False], ids=["head first", "head last"])
    @pytest.mark.parametrize("names", [["embedding"], ["head"], ["embedding", "head"]], ids="+".join)
    @pytest.mark.parametrize("commit", ["progressive", "atomic"])
    async def test_tied_to_a_module_that_does_not(
        self,
        rig: Rig,
        tmp_path: Path,
        where: str,
        head_first: bool,  # noqa: FBT001
        names: list[str],
        commit: str,
    ) -> None:
        model = self.tied(where, head_first=head_first)
        weight = torch.randn(4, 4)
        report = await load(rig, tmp_path, model, {f"{name}.weight": weight for name in names}, commit=commit)
        ((_, loaded),) = model.named_parameters()  # one: they are still tied
        assert_same(loaded, weight)
        assert report.missing_keys == ()

    @pytest.mark.parametrize("head_first", [True, False], ids=["head first", "head last"])
    async def test_tied_to_other_values(self, rig: Rig, tmp_path: Path, where: str, head_first: bool) -> None:  # noqa: FBT001
        tensors = {"embedding.weight": torch.zeros(4, 4), "head.weight": torch.ones(4, 4)}
        with pytest.raises(PlacementError, match="other values"):
            await load(rig, tmp_path, self.tied(where, head_first=head_first), tensors)

    @pytest.mark.parametrize("names", [["one"], ["other"], ["one", "other"]], ids="+".join)
    async def test_registered_twice(self, rig: Rig, tmp_path: Path, where: str, names: list[str]) -> None:
        norm = nn.BatchNorm1d(4, device=where)
        model = nn.ModuleDict({"one": norm, "other": norm})
        stored = tensors_of(nn.BatchNorm1d(4))
        report = await load(
            rig, tmp_path, model, {f"{name}.{key}": tensor for name in names for key, tensor in stored.items()}
        )
        assert_loaded(norm, stored)
        assert report.missing_keys == ()

    async def test_contents_that_cannot_be_copied_leave_its_own_parameters(
        self, make_rig: Callable[..., Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A hook hands out slices, which are copied, and for the first of them there is no memory left."""

        def split(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
            state[f"{prefix}weight"], state[f"{prefix}bias"] = state.pop(f"{prefix}both").split([4, 1], 1)
            state[f"{prefix}bias"] = state[f"{prefix}bias"].view(-1)

        model = nn.Linear(4, 4, device="meta")
        before_loading(model, split)
        held = dict(model.named_parameters())

        def refuse(tensor: torch.Tensor, **_: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("no memory")

        monkeypatch.setattr(torch.Tensor, "clone", refuse)
        with pytest.raises(MemoryBudgetError):
            await load(make_rig("host"), tmp_path, model, {"both": torch.ones(4, 5)})
        assert all(model.get_parameter(name) is parameter for name, parameter in held.items())
        assert all(parameter.is_meta for parameter in held.values())

    async def test_each_tensor_counts_once(self, rig: Rig, tmp_path: Path, where: str) -> None:
        model = nn.Sequential(nn.Linear(4, 4, device=where), nn.BatchNorm1d(4, device=where))
        path = write_in_order(tmp_path / "checkpoint", tensors_of(model))
        async with rig.loader(num_slots=4) as loader:
            handle = await loader.start(model, path)
            report = await handle.wait()
            assert handle.progress.total_tensors == handle.progress.tensors_ready == report.num_tensors == 7

    class Fused(nn.Module):
        """Takes `query` and `key` and keeps them as one, as attention modules do."""

        def __init__(self, where: str) -> None:
            super().__init__()
            self.both = nn.Parameter(torch.zeros(6, 4, device=where))
            before_loading(self, self._fuse)

        @staticmethod
        def _fuse(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
            parts = [state.pop(f"{prefix}{name}", None) for name in ("query", "key")]
            if all(part is not None for part in parts):
                state[f"{prefix}both"] = torch.cat(parts)

    async def test_pre_hook_that_renames_and_joins(self, rig: Rig, tmp_path: Path, where: str) -> None:
        model = nn.Sequential(nn.Linear(4, 4, device=where), self.Fused(where))
        shapes = {"0.weight": (4, 4), "0.bias": (4,), "1.query": (3, 4), "1.key": (3, 4)}
        tensors = random_tensors(shapes)
        report = await load(rig, tmp_path, model, tensors)
        assert_same(model.get_parameter("1.both"), torch.cat([tensors["1.query"], tensors["1.key"]]))
        assert_same(model.get_parameter("0.weight"), tensors["0.weight"])
        assert "Fused)" in report.fallbacks[0]
        assert isinstance(model[1].both, nn.Parameter)

    async def test_pre_hook_that_slices(self, rig: Rig, tmp_path: Path, where: str) -> None:
        model = nn.Linear(4, 2, bias=False, device=where)
        before_loading(
            model, lambda module, state, prefix, *_: state.update({f"{prefix}weight": state[f"{prefix}weight"][2:4]})
        )
        tensors = random_tensors({"weight": (6, 4)})
        await load(rig, tmp_path, model, tensors)
        assert_same(model.weight, tensors["weight"][2:4])

    async def test_what_the_module_misses_is_an_error(self, rig: Rig, tmp_path: Path, where: str) -> None:
        model = self.Fused(where)
        with pytest.raises(MissingKeysError, match="both"):
            await load(rig, tmp_path, model, random_tensors({"query": (3, 4)}))
        with pytest.raises(UnexpectedKeysError, match="value"):
            await load(rig, tmp_path, model, random_tensors({"both": (6, 4), "value": (1,)}))
        assert model.both.is_meta == (where == "meta")

    async def test_hook_that_fails_is_named_and_undone(self, rig: Rig, tmp_path: Path, where: str) -> None:
        def fail(*_: Any) -> None:
            raise KeyError("no such thing")

        model = nn.Sequential(nn.Linear(2, 2, device=where), nn.Linear(2, 2, device=where))
        before_loading(model[1], fail)
        before = dict(model.named_parameters())
        with pytest.raises(PlacementError, match="no such thing") as caught:
            await load(rig, tmp_path, model, tensors_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))
        assert caught.value.tensor == "1"
        for name, parameter in model.named_parameters():
            assert parameter is before[name]
            assert parameter.is_meta == (where == "meta")

    async def test_extra_state(self, rig: Rig, tmp_path: Path, where: str) -> None:
        class WithState(nn.Module):
            """Keeps something besides parameters."""

            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(3, device=where))
                self.scale = 0.0

            def get_extra_state(self) -> torch.Tensor:
                return torch.tensor(self.scale)

            def set_extra_state(self, state: torch.Tensor) -> None:
                self.scale = float(state)

        model = nn.Sequential(WithState())
        tensors = {"0.weight": torch.rand(3), "0._extra_state": torch.tensor(2.5)}
        await load(rig, tmp_path, model, tensors)
        assert model[0].scale == 2.5
        assert_same(model.get_parameter("0.weight"), tensors["0.weight"])

    async def test_post_hook_is_called(self, rig: Rig, tmp_path: Path, where: str) -> None:
        calls: list[Any] = []
        model = nn.Sequential(nn.Linear(2, 2, device=where))
        register: Callable[..., object] = model[0].register_load_state_dict_post_hook
        register(lambda module, keys: calls.append(module))
        tensors = random_tensors({"0.weight": (2, 2), "0.bias": (2,)})
        await load(rig, tmp_path, model, tensors)
        assert calls == [model[0]]
        assert_loaded(model, tensors)
        register(lambda module, keys: keys)  # torch asserts that it returns nothing
        with pytest.raises(AssertionError):
            nn.Sequential(model[0]).load_state_dict(tensors)
        with pytest.raises(PlacementError, match="a hook after loading returned a value"):
            await load(rig, tmp_path, model, tensors)


async def test_tied_names_of_a_module_that_loads_itself_may_not_differ_in_size(
    rig: Rig, tmp_path: Path, where: str
) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False, device=where), nn.Linear(3, 3, bias=False, device=where))
    model[1].weight = model[0].weight
    cast("Any", model).register_load_state_dict_pre_hook(lambda *_: None)
    tensors = random_tensors({"0.weight": (3, 3), "1.weight": (18,)})
    with pytest.raises(PlacementError, match=r"ties this tensor to \d\.weight, but the checkpoint has other values"):
        await load(rig, tmp_path, model, tensors)


async def test_lstm_computes_with_what_was_loaded(rig: Rig, tmp_path: Path, where: str) -> None:
    """It keeps its weights in a second list of its own."""
    model = nn.LSTM(3, 4, num_layers=2, device=where)
    tensors = tensors_of(model)
    await load(rig, tmp_path, model, tensors)
    for name, weight in zip(model._flat_weights_names, model._flat_weights, strict=True):
        assert getattr(model, name) is weight
    device = next(model.parameters()).device
    reference = nn.LSTM(3, 4, num_layers=2, device=device)
    reference.load_state_dict(tensors)
    data = torch.rand(5, 3, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cuDNN advises to put weights together that lie apart
        found = model(data)[0]
    torch.testing.assert_close(found, reference(data)[0], rtol=0, atol=0 if device.type == "cpu" else 1e-6)


async def test_parameter_that_is_not_contiguous_is_filled(rig: Rig, tmp_path: Path) -> None:
    model: nn.Module = cast("Any", nn.Conv2d(3, 4, 3)).to(
        memory_format=torch.channels_last
    )  # not in every torch's stubs
    weight = model.get_parameter("weight")
    assert not weight.is_contiguous()
    strides, address = weight.stride(), weight.data_ptr()
    tensors = random_tensors({"weight": (4, 3, 3, 3), "bias": (4,)})
    await load(rig, tmp_path, model, tensors)
    assert (weight.stride(), weight.data_ptr()) == (strides, address)
    assert_loaded(model, tensors)


async def test_rollback_gives_back_what_was_on_meta_with_its_strides(rig: Rig, tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, device="meta"), nn.Linear(2, 2, device="meta"), nn.BatchNorm1d(3, device="meta")
    )
    cast("Any", model).to(memory_format=torch.channels_last)  # in place, as always with modules
    model[1].weight.requires_grad_(False)
    described = {
        name: (tensor, tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    tensors = tensors_of(model)
    path = write_in_order(tmp_path / "c", tensors, num_shards=2)
    rig.disk.fail_at(1, ReadError("broken"))
    async with rig.loader(workers=1) as loader:
        with pytest.raises(ReadError):
            await loader.load(model, path)
        for name, tensor in model.state_dict(keep_vars=True).items():
            assert tensor is described[name][0]
            assert (tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad) == described[name][1:]
            assert tensor.is_meta
        await loader.load(model, path)
    assert_loaded(model, tensors)


async def test_buffers_are_loaded_and_stay_buffers(rig: Rig, tmp_path: Path, where: str) -> None:
    model = nn.Module()
    model.register_buffer("kept", torch.zeros(3, device=where))
    model.register_buffer("own", torch.ones(2), persistent=False)
    model.register_buffer("none", None)
    tensors = random_tensors({"kept": (3,)})
    await load(rig, tmp_path, model, tensors)
    assert_same(model.kept, tensors["kept"])  # type: ignore[arg-type]  # a buffer
    assert not isinstance(model.kept, nn.Parameter)
    assert dict(model.named_buffers()).keys() == {"kept", "own"}
    assert_loaded(model, tensors)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (1,), (1, 1, 1)], ids=str)
async def test_odd_shapes(rig: Rig, tmp_path: Path, where: str, shape: tuple[int, ...]) -> None:
    model = nn.Module()
    model.odd = nn.Parameter(torch.zeros(shape, device=where))
    model.even = nn.Parameter(torch.zeros(7, device=where))
    tensors = random_tensors({"odd": shape, "even": (7,)})
    await load(rig, tmp_path, model, tensors)
    assert_loaded(model, tensors)


async def test_scalar_may_be_stored_as_a_vector_of_one_as_in_load_state_dict(
    rig: Rig, tmp_path: Path, where: str
) -> None:
    def make(where: str) -> nn.Module:
        model = nn.Sequential(nn.BatchNorm1d(3, device=where))
        model.scale = nn.Parameter(torch.zeros((), device=where))
        model.low = nn.Parameter(torch.zeros((), device=where))
        model.register_buffer("count", torch.zeros((), dtype=torch.int64, device=where))
        return model

    model, reference = make(where), make("cpu")
    tensors = tensors_of(reference) | {"low": torch.tensor([0.3], dtype=torch.bfloat16)}
    tensors |= {name: tensors[name].reshape(1) for name in ("scale", "count", "0.num_batches_tracked")}
    reference.load_state_dict(tensors)
    await load(rig, tmp_path, model, tensors)
    assert_loaded(model, reference.state_dict())


@pytest.mark.parametrize("shape", [(0,), (2,), (1, 1)], ids=str)
async def test_no_other_shape_may_stand_for_a_scalar(
    rig: Rig, tmp_path: Path, where: str, shape: tuple[int, ...]
) -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.zeros((), device=where))
    tensors = {"scale": torch.zeros(shape)}
    with pytest.raises(ShapeMismatchError):
        await load(rig, tmp_path, model, tensors)
    reference = nn.Module()
    reference.scale = nn.Parameter(torch.zeros(()))
    with pytest.raises(RuntimeError, match="size mismatch"):
        reference.load_state_dict(tensors)


async def test_gradient_on_meta_goes_as_with_assign_and_comes_back_with_a_rollback(rig: Rig, tmp_path: Path) -> None:
    """A gradient without storage has no values that anybody could miss."""

    def make() -> nn.Linear:
        model = nn.Linear(3, 3, device="meta")
        model.weight.grad = torch.ones(3, 3, device="meta")
        return model

    model, reference = make(), make()
    tensors = random_tensors({"weight": (3, 3), "bias": (3,)})
    rig.disk.fail_at(rig.disk.num_begun, ReadError("broken"))
    with pytest.raises(ReadError):
        await load(rig, tmp_path, model, tensors)
    assert model.weight.grad is not None
    await load(rig, tmp_path, model, tensors)
    reference.load_state_dict(tensors, assign=True)
    assert model.weight.grad is None is reference.weight.grad


async def test_gradient_with_storage_is_kept_as_by_load_state_dict(rig: Rig, tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    model.weight.grad = held = torch.ones(3, 3)
    await load(rig, tmp_path, model, random_tensors({"weight": (3, 3), "bias": (3,)}))
    assert model.weight.grad is held
    assert_same(held, torch.ones(3, 3))


async def test_checkpoint_of_empty_tensors_alone(rig: Rig, tmp_path: Path, where: str) -> None:
    model = nn.Module()
    model.nothing = nn.Parameter(torch.zeros(0, 3, device=where))
    held = model.nothing
    await load(rig, tmp_path, model, {"nothing": torch.zeros(0, 3)})
    assert model.nothing is held
    assert not held.is_meta


async def test_model_is_loaded_again_in_place(rig: Rig, tmp_path: Path) -> None:
    model = small_net("meta")
    await load(rig, tmp_path / "1", model, tensors_of(model, seed=1))
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    tensors = tensors_of(model, seed=2)
    await load(rig, tmp_path / "2", model, tensors)
    assert_loaded(model, tensors)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


async def test_saved_large_tensor_brings_no_block_along(rig: Rig, tmp_path: Path) -> None:
    model = small_net("meta")
    await load(rig, tmp_path, model, tensors_of(model))
    torch.save(model.large.weight, tmp_path / "large.pt")
    assert (tmp_path / "large.pt").stat().st_size < model.large.weight.nbytes + 4096


class _WithConjugate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("c", torch.zeros(16, dtype=torch.complex64).conj())


def test_conjugate_view_is_written_through(tmp_path: Path) -> None:
    stored = torch.arange(16).to(torch.complex64) * (1 + 2j)
    save_file({"c": stored}, tmp_path / "model.safetensors")
    model = _WithConjugate()
    ws.load_sync(model, tmp_path / "model.safetensors")
    assert torch.equal(model.get_buffer("c").resolve_conj(), stored)


@pytest.mark.parametrize(
    "make", [lambda: torch.zeros(1, 4).expand(3, 4), lambda: torch.zeros(3, 4).to_sparse()], ids=["expanded", "sparse"]
)
def test_tensor_without_memory_for_every_element_is_refused_by_name(
    tmp_path: Path, make: Callable[[], torch.Tensor]
) -> None:
    save_file({"c": torch.ones(3, 4)}, tmp_path / "model.safetensors")
    model = nn.Module()
    model.register_buffer("c", make())
    with pytest.raises(ws.PlacementError, match=r"c in .*no memory of its own"):
        ws.load_sync(model, tmp_path / "model.safetensors")


def test_module_that_loads_itself_keeps_the_buffers_it_has_and_their_ties(tmp_path: Path) -> None:
    model = nn.Module()
    model.bn = nn.BatchNorm1d(4)
    model.other = nn.Module()
    model.other.register_buffer("mean", model.bn.running_mean)
    save_file(
        {name: torch.full_like(t, 7).clone() for name, t in model.state_dict().items()}, tmp_path / "m.safetensors"
    )
    model.bn.weight = nn.Parameter(torch.empty(4, device="meta"))
    model.bn.bias = nn.Parameter(torch.empty(4, device="meta"))
    mean = model.bn.running_mean
    assert mean is not None
    ws.load_sync(model, tmp_path / "m.safetensors")
    assert model.bn.running_mean is mean
    assert model.other.mean is mean
    assert [t.tolist() for t in (mean, model.bn.weight, model.bn.bias)] == [[7.0] * 4] * 3


def test_hook_of_a_module_sees_the_names_of_the_whole_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    seen: list[str] = []

    def rename(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
        seen.append(prefix)
        state["1.weight"] = state.pop("1.kernel")

    model[1].register_load_state_dict_pre_hook(rename)  # type: ignore[no-untyped-call]
    stored = {
        "0.weight": torch.ones(2, 2),
        "0.bias": torch.ones(2),
        "1.kernel": torch.ones(2, 2),
        "1.bias": torch.ones(2),
    }
    save_file(stored, tmp_path / "m.safetensors")
    ws.load_sync(model, tmp_path / "m.safetensors")
    assert seen == ["1."]
    assert all(bool((parameter == 1).all()) for parameter in model.parameters())


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("kind", ["plain", "loads itself"])
def test_gradient_hook_on_meta_is_refused_by_name(tmp_path: Path, kind: str, register: str) -> None:
    model = nn.Linear(2, 2, device="meta") if kind == "plain" else nn.BatchNorm1d(2, device="meta")
    save_file(tensors_of(model), tmp_path / "m.safetensors")
    getattr(model.get_parameter("weight"), register)(lambda grad: grad)
    with pytest.raises(ws.PlacementError, match=r"weight.*gradient hook"):
        ws.load_sync(model, tmp_path / "m.safetensors")
