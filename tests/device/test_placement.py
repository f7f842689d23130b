"""What fits into what, decided before anything changes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from tests.builders import assert_same, bytes_of, random_tensors, write_in_order
from tests.fakes.rig import Rig
from weightstream.device.config import DeviceConfig
from weightstream.device.matching import match
from weightstream.errors import (
    DtypeMismatchError,
    MissingKeysError,
    PlacementError,
    ShapeMismatchError,
    UnexpectedKeysError,
    WeightstreamError,
)


async def load(rig: Rig, folder: Path, model: nn.Module, tensors: dict[str, torch.Tensor], **device: Any) -> Any:
    path = write_in_order(folder / "checkpoint", tensors)
    async with rig.loader(**device) as loader:
        return await loader.load(model, path)


async def refused(
    rig: Rig,
    folder: Path,
    model: nn.Module,
    tensors: dict[str, torch.Tensor],
    error: type[WeightstreamError],
    **device: Any,
) -> WeightstreamError:
    """Load, which must fail in the preflight: without a read, and with the model as it was."""
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = {name: None if lacks_bytes(tensor) else bytes_of(tensor) for name, tensor in before.items()}
    with pytest.raises(error) as caught:
        await load(rig, folder, model, tensors, **device)
    assert type(caught.value) is error
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is tensor for name, tensor in before.items())
    for name, tensor in before.items():
        assert held[name] is None or bytes_of(tensor) == held[name]
    assert rig.disk.num_begun == 0
    return caught.value


def lacks_bytes(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or nn.parameter.is_lazy(tensor) or type(tensor) not in (nn.Parameter, torch.Tensor)


@pytest.fixture(params=["meta", "cpu"], ids=["adopt", "in-place"])
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_other_shape_is_refused(rig: Rig, tmp_path: Path, where: str) -> None:
    model = nn.Linear(3, 2, device=where)
    error = await refused(rig, tmp_path, model, random_tensors({"weight": (3, 2), "bias": (2,)}), ShapeMismatchError)
    assert (error.tensor, error.expected, error.actual) == ("weight", "(2, 3) (model)", "(3, 2) (checkpoint)")


async def test_other_dtype_is_refused(rig: Rig, tmp_path: Path, where: str) -> None:
    model = nn.Linear(3, 2, bias=False, device=where)
    tensors = {"weight": torch.zeros(2, 3, dtype=torch.float8_e4m3fn)}
    error = await refused(rig, tmp_path, model, tensors, DtypeMismatchError)
    assert error.tensor == "weight"
    assert error.expected == "torch.float32 (model)"
    assert error.actual == "torch.float8_e4m3fn (checkpoint)"


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
async def test_missing_keys(rig: Rig, tmp_path: Path, where: str, strict: bool) -> None:  # noqa: FBT001
    model = nn.Linear(3, 2, device=where)
    bias = model.bias
    tensors = random_tensors({"weight": (2, 3)})
    if strict:
        error = await refused(rig, tmp_path, model, tensors, MissingKeysError)
        assert error.actual == "bias"
        return
    report = await load(rig, tmp_path, model, tensors, strict=False)
    assert report.missing_keys == ("bias",)
    assert model.bias is bias
    assert_same(model.weight, tensors["weight"])


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
async def test_unexpected_keys(rig: Rig, tmp_path: Path, where: str, strict: bool) -> None:  # noqa: FBT001
    model = nn.Linear(3, 2, device=where)
    tensors = random_tensors({"weight": (2, 3), "bias": (2,), "other.weight": (4,)})
    if strict:
        error = await refused(rig, tmp_path, model, tensors, UnexpectedKeysError)
        assert error.actual == "other.weight"
        return
    report = await load(rig, tmp_path, model, tensors, strict=False)
    assert report.unexpected_keys == ("other.weight",)
    assert report.num_bytes == 8 * 4  # what nobody wants is not read
    assert_same(model.bias, tensors["bias"])


async def test_lazy_module_is_refused(rig: Rig, tmp_path: Path, where: str) -> None:
    model = nn.Sequential(nn.LazyLinear(2, device=where))
    error = await refused(rig, tmp_path, model, random_tensors({"0.weight": (2, 3), "0.bias": (2,)}), PlacementError)
    assert error.tensor == "0.weight"
    assert "lazy" in str(error)


class Wrapped(torch.Tensor):
    """A tensor subclass as quantisation libraries make them: what it looks like is not what it stores."""

    inside: torch.Tensor

    @classmethod
    def around(cls, inside: torch.Tensor) -> Wrapped:
        made: Wrapped = torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype, device=inside.device)
        made.inside = inside
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # torch's stub has an instance method
        if func is torch.ops.aten.detach.default:
            return cls.around(args[0].inside)
        raise NotImplementedError(func)


async def test_tensor_subclass_is_refused_by_name(rig: Rig, tmp_path: Path, where: str) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(Wrapped.around(torch.zeros(2, 3, device=where)), requires_grad=False)
    error = await refused(rig, tmp_path, model, random_tensors({"weight": (2, 3)}), PlacementError)
    assert error.tensor == "weight"
    assert f"{__name__}.Wrapped" in str(error)


async def test_buffer_on_meta_that_no_checkpoint_holds_is_refused(rig: Rig, tmp_path: Path) -> None:
    model = nn.Linear(3, 2, device="meta")
    model.register_buffer("table", torch.zeros(4, device="meta"), persistent=False)
    error = await refused(rig, tmp_path, model, random_tensors({"weight": (2, 3), "bias": (2,)}), PlacementError)
    assert error.tensor == "table"
    assert "not persistent" in str(error)


async def test_own_buffer_with_storage_is_left_alone(rig: Rig, tmp_path: Path) -> None:
    model = nn.Linear(3, 2, device="meta")
    table = torch.arange(4.0)
    model.register_buffer("table", table, persistent=False)
    await load(rig, tmp_path, model, random_tensors({"weight": (2, 3), "bias": (2,)}))
    assert model.table is table
    assert table.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
async def test_own_buffer_that_a_checkpoint_holds_is_named_as_in_torch_and_is_no_error(
    rig: Rig,
    tmp_path: Path,
    strict: bool,  # noqa: FBT001
) -> None:
    model = nn.Linear(3, 2, device="meta")
    model.register_buffer("table", torch.arange(4.0), persistent=False)
    tensors = random_tensors({"weight": (2, 3), "bias": (2,), "table": (4,)})
    report = await load(rig, tmp_path, model, tensors, strict=strict)
    expected = model.load_state_dict(tensors, strict=False)
    assert report.unexpected_keys == ("table",) == tuple(expected.unexpected_keys)
    assert "unexpected, but no error, because the model computes it itself: table" in report.fallbacks
    assert cast("torch.Tensor", model.table).tolist() == [0, 1, 2, 3]
    assert report.num_tensors == 2
    report = await load(rig, tmp_path / "again", model, tensors, strict=strict, ignore_unexpected=["^table$"])
    assert report.unexpected_keys == ()


def pretending(model: nn.Module, **devices: str) -> nn.Module:
    """A model that says its parameters lie on devices that this machine does not have."""
    real = dict(model.named_parameters())
    for name, device in devices.items():
        owner, _, key = name.rpartition(".")
        fake = SimpleNamespace(device=torch.device(device), is_meta=False, dtype=real[name].dtype)
        fake.shape = real[name].shape
        model.get_submodule(owner)._parameters[key] = fake  # type: ignore[assignment]  # that is the trick
    return model


def test_several_devices_are_refused() -> None:
    model = pretending(nn.Linear(3, 2), weight="cuda:0")
    with pytest.raises(PlacementError, match="another device than the rest"):
        match(model, {}, DeviceConfig(), torch.device("cpu"))


def test_target_that_disagrees_is_refused() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(PlacementError, match="another device than the rest") as caught:
        match(model, {}, DeviceConfig(target="cuda:1"), torch.device("cuda:1"))
    assert (caught.value.tensor, caught.value.expected, caught.value.actual) == ("weight", "cuda:1", "cpu")


def test_device_of_a_model_with_storage_wins_over_the_default() -> None:
    model = nn.Sequential(nn.Linear(3, 2, device="meta"), nn.Linear(2, 2))
    placement = match(model, {}, DeviceConfig(strict=False), torch.device("cuda:0"))
    assert placement.devices == (torch.device("cpu"),)


def test_model_on_meta_goes_to_the_default() -> None:
    placement = match(nn.Linear(3, 2, device="meta"), {}, DeviceConfig(strict=False), torch.device("cuda:0"))
    assert placement.devices == (torch.device("cuda:0"),)


async def test_partly_materialised_model_is_filled_and_adopted(rig: Rig, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2, device="meta"), nn.Linear(2, 2))
    kept = model[1].weight
    shapes = {"0.weight": (2, 3), "0.bias": (2,), "1.weight": (2, 2), "1.bias": (2,)}
    tensors = random_tensors(shapes)
    await load(rig, tmp_path, model, tensors)
    assert model[1].weight is kept
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])
