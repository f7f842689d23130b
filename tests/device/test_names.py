"""Rules on names: what is renamed, what is selected, and what may be missing on one side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import weightstream as ws
from tests.builders import assert_same, random_tensors, write_in_order
from tests.fakes.rig import Rig
from weightstream.device.config import DeviceConfig
from weightstream.device.names import NameRules
from weightstream.scheduler.report import LoadReport


def stored(*names: str) -> dict[str, Any]:
    return {name: SimpleNamespace(name=name) for name in names}


def applied(names: list[str], **config: Any) -> dict[str, str]:
    """What the rules make of the names: new name -> old name."""
    found = NameRules(DeviceConfig(**config)).apply(stored(*names))
    return {name: spec.name for name, spec in found.items()}


def rule(pattern: str, to: str) -> dict[str, str]:
    return {"pattern": pattern, "to": to}


@pytest.fixture(params=["meta", "cpu"], ids=["adopt", "in-place"])
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def two(where: str) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2, device=where), nn.Linear(2, 4, device=where))


SHAPES = {"0.weight": (2, 3), "0.bias": (2,), "1.weight": (4, 2), "1.bias": (4,)}


async def load(rig: Rig, folder: Path, model: nn.Module, tensors: dict[str, torch.Tensor], **device: Any) -> LoadReport:
    path = write_in_order(folder / "checkpoint", tensors)
    async with rig.loader(**device) as loader:
        return await loader.load(model, path)


class TestRename:
    @pytest.mark.parametrize(
        ("rules", "expected"),
        [
            ([rule(r"^model\.", "")], ["a.gamma", "b"]),
            ([rule("^", "net.")], ["net.model.a.gamma", "net.model.b"]),
            ([rule(r"gamma$", "weight")], ["model.a.weight", "model.b"]),
            ([rule(r"^model\.(\w)", r"\1.\g<1>")], ["a.a.gamma", "b.b"]),
            ([rule(r"^(?P<all>.*)$", r"x.\g<all>")], ["x.model.a.gamma", "x.model.b"]),
            ([rule("model", "m"), rule(r"^m\.a", "z")], ["z.gamma", "m.b"]),
            ([rule(r"^m\.a", "z"), rule("model", "m")], ["m.a.gamma", "m.b"]),
            ([rule("never", "x")], ["model.a.gamma", "model.b"]),
        ],
        ids=["drop", "add", "suffix", "groups", "named", "in-order", "other-order", "no-match"],
    )
    def test_rules_are_applied_one_after_the_other(self, rules: list[dict[str, str]], expected: list[str]) -> None:
        names = ["model.a.gamma", "model.b"]
        assert applied(names, rename=rules) == dict(zip(expected, names, strict=True))

    def test_nothing_is_done_without_a_rule(self) -> None:
        given = stored("a", "b")
        assert NameRules(DeviceConfig()).apply(given) is given

    def test_collision_names_both(self) -> None:
        with pytest.raises(ws.PlacementError, match="same name") as caught:
            applied(["a.gamma", "a.weight"], rename=[rule("gamma", "weight")])
        assert (caught.value.tensor, caught.value.actual) == ("a.weight", "a.gamma and a.weight")

    def test_names_may_be_exchanged(self) -> None:
        rules = [rule("^a$", "tmp"), rule("^b$", "a"), rule("^tmp$", "b")]
        assert applied(["a", "b"], rename=rules) == {"b": "a", "a": "b"}

    def test_collision_of_what_is_left_out_is_none(self) -> None:
        assert applied(["a", "b", "c"], rename=[rule("[ab]", "x")], exclude=["x"]) == {"c": "c"}

    async def test_tensors_arrive_under_their_new_names(self, rig: Rig, tmp_path: Path, where: str) -> None:
        model = two(where)
        tensors = random_tensors({f"net.{name}": shape for name, shape in SHAPES.items()})
        report = await load(rig, tmp_path, model, tensors, rename=[rule(r"^net\.", "")])
        for name, tensor in model.state_dict().items():
            assert_same(tensor, tensors[f"net.{name}"])
        assert report.decisions[0] == "rename: 4 of 4 names were changed, the first from net.0.weight to 0.weight"

    async def test_stream_hands_out_new_names(self, rig: Rig, tmp_path: Path) -> None:
        tensors = random_tensors(SHAPES)
        path = write_in_order(tmp_path / "c", tensors, num_shards=2)
        async with rig.loader(rename=[rule("^0", "first")], exclude=[r"^1\.b"]) as loader:
            found = {name: tensor async for name, tensor in loader.stream(path)}
        assert list(found) == ["first.weight", "first.bias", "1.weight"]
        for name, tensor in found.items():
            assert_same(tensor, tensors[name.replace("first", "0")])

    async def test_collision_is_found_before_a_read(self, rig: Rig, tmp_path: Path, where: str) -> None:
        with pytest.raises(ws.PlacementError, match=r"0\.weight and 1\.weight") as caught:
            await load(rig, tmp_path, two(where), random_tensors(SHAPES), rename=[rule(r"^\d", "0")])
        assert caught.value.file is not None
        assert rig.disk.num_begun == 0

    async def test_error_shows_both_names(self, rig: Rig, tmp_path: Path, where: str) -> None:
        tensors = random_tensors({"net.weight": (5, 5), "net.bias": (2,)})
        with pytest.raises(ws.ShapeMismatchError) as caught:
            await load(rig, tmp_path, nn.Linear(3, 2, device=where), tensors, rename=[rule(r"^net\.", "")])
        assert (caught.value.tensor, caught.value.stored_as) == ("weight", "net.weight")
        assert "weight in " in str(caught.value)
        assert "where it is net.weight: " in str(caught.value)

    async def test_error_of_unexpected_names_shows_both(self, rig: Rig, tmp_path: Path, where: str) -> None:
        tensors = random_tensors({"net.weight": (2, 3), "net.bias": (2,), "net.x": (1,)})
        with pytest.raises(ws.UnexpectedKeysError) as caught:
            await load(rig, tmp_path, nn.Linear(3, 2, device=where), tensors, rename=[rule(r"^net\.", "")])
        assert caught.value.actual == "x (stored as net.x)"

    async def test_report_lists_the_new_name_as_unexpected(self, rig: Rig, tmp_path: Path, where: str) -> None:
        tensors = random_tensors({"net.weight": (2, 3), "net.bias": (2,), "net.x": (1,)})
        rules = [rule(r"^net\.", "")]
        report = await load(rig, tmp_path, nn.Linear(3, 2, device=where), tensors, rename=rules, strict=False)
        assert report.unexpected_keys == ("x",)

    async def test_error_about_ties_shows_both_names(self, rig: Rig, tmp_path: Path, where: str) -> None:
        model = two(where)
        model[1] = model[0]
        tensors = random_tensors({"n.0.weight": (2, 3), "n.0.bias": (2,), "n.1.weight": (2, 3)})
        with pytest.raises(ws.PlacementError, match="ties this tensor") as caught:
            await load(rig, tmp_path, model, tensors, rename=[rule("^n.", "")])
        assert (caught.value.tensor, caught.value.stored_as) == ("1.weight", "n.1.weight")

    async def test_module_that_loads_itself_sees_the_new_names(self, rig: Rig, tmp_path: Path, where: str) -> None:
        model = nn.Sequential(nn.BatchNorm1d(4, device=where))
        tensors = random_tensors({f"bn.{name}": (4,) for name in ("gamma", "beta", "running_mean", "running_var")})
        tensors["bn.num_batches_tracked"] = torch.tensor(3)
        rules = [rule(r"^bn\.", "0."), rule("gamma$", "weight"), rule("beta$", "bias")]
        await load(rig, tmp_path, model, tensors, rename=rules)
        assert_same(model.get_parameter("0.weight"), tensors["bn.gamma"])
        assert_same(model.get_buffer("0.num_batches_tracked"), tensors["bn.num_batches_tracked"])


class TestSelection:
    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"include": ["^0"]}, ["0.weight", "0.bias"]),
            ({"exclude": ["bias$"]}, ["0.weight", "1.weight"]),
            ({"include": ["^0", r"^1\.w"]}, ["0.weight", "0.bias", "1.weight"]),
            ({"include": ["^0"], "exclude": ["bias"]}, ["0.weight"]),
            ({"include": ["weight"], "rename": [rule("^0.weight", "x"), rule("bias", "weight")]}, ["0.bias", "1.bias"]),
        ],
        ids=["include", "exclude", "two", "both", "after-rename"],
    )
    def test_patterns_are_searched_for_in_new_names(self, config: dict[str, Any], expected: list[str]) -> None:
        names = ["0.weight", "0.bias", "1.bias"] if "rename" in config else list(SHAPES)
        assert list(applied(names, **config).values()) == expected

    async def test_only_bytes_of_what_is_wanted_are_read(self, rig: Rig, tmp_path: Path, where: str) -> None:
        model = two(where)
        held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        tensors = random_tensors(SHAPES)
        report = await load(rig, tmp_path, model, tensors, include=[r"^1\."])
        wanted = tensors["1.weight"].nbytes + tensors["1.bias"].nbytes
        assert report.num_bytes == wanted
        if rig.io == "buffered":  # direct reads are of whole pages
            assert rig.disk.num_bytes_begun == wanted
        assert (report.missing_keys, report.unexpected_keys, report.num_tensors) == ((), (), 2)
        assert report.decisions[0] == "include and exclude: 2 of 4 tensors were left out"
        for name, tensor in model.state_dict().items():
            if name.startswith("1"):
                assert_same(tensor, tensors[name])
            elif where == "meta":
                assert tensor.is_meta
            else:
                assert_same(tensor, held[name])

    async def test_two_parts_make_a_whole(self, rig: Rig, tmp_path: Path) -> None:
        model = two("meta")
        tensors = random_tensors(SHAPES)
        path = write_in_order(tmp_path / "c", tensors)
        parts: list[dict[str, Any]] = [{"include": ["^0"]}, {"exclude": ["^0"]}]
        for part in parts:
            async with rig.loader(**part) as loader:
                await loader.load(model, path)
        for name, tensor in model.state_dict().items():
            assert_same(tensor, tensors[name])

    async def test_wanted_name_that_is_not_there_is_missing(self, rig: Rig, tmp_path: Path, where: str) -> None:
        with pytest.raises(ws.MissingKeysError) as caught:
            await load(rig, tmp_path, two(where), random_tensors({"1.bias": (4,)}), include=[r"^1\."])
        assert caught.value.actual == "1.weight"

    async def test_warming_reads_the_part_alone(self, rig: Rig, tmp_path: Path) -> None:
        path = write_in_order(tmp_path / "c", random_tensors(SHAPES))
        async with rig.loader(include=["^0.bias"]) as loader:
            report = await loader.warm(path)
        assert report.num_bytes == 8

    async def test_own_buffer_on_meta_of_another_part_does_not_matter(self, rig: Rig, tmp_path: Path) -> None:
        model = two("meta")
        model[0].register_buffer("table", torch.zeros(3, device="meta"), persistent=False)
        await load(rig, tmp_path, model, random_tensors(SHAPES), include=[r"^1\."])
        with pytest.raises(ws.PlacementError, match="not persistent"):
            await load(rig, tmp_path, model, random_tensors(SHAPES), include=[r"^0\."])

    @pytest.mark.parametrize("name", ["other", "own"])
    async def test_module_that_loads_itself_is_asked_only_for_its_part(
        self, rig: Rig, tmp_path: Path, where: str, name: str
    ) -> None:
        model = nn.ModuleDict({"own": nn.BatchNorm1d(2, device=where), "other": nn.Linear(2, 2, device=where)})
        shapes = {"weight": (2,), "bias": (2,), "running_mean": (2,), "running_var": (2,)}
        tensors = random_tensors({f"own.{key}": shape for key, shape in shapes.items()})
        tensors["own.num_batches_tracked"] = torch.tensor(5)
        tensors |= random_tensors({"other.weight": (2, 2), "other.bias": (2,)})
        report = await load(rig, tmp_path, model, tensors, include=[f"^{name}.(weight|bias)"])
        assert report.missing_keys == ()
        assert bool(report.fallbacks) == (name == "own")
        for key in ("weight", "bias"):
            assert_same(model.get_parameter(f"{name}.{key}"), tensors[f"{name}.{key}"])
        assert model.get_buffer("own.running_mean").is_meta == (where == "meta")


class TestIgnoring:
    async def test_ignored_names_are_no_error_and_in_no_list(self, rig: Rig, tmp_path: Path, where: str) -> None:
        tensors = random_tensors({"0.weight": (2, 3), "0.bias": (2,), "1.weight": (4, 2), "old.weight": (7, 7)})
        ignoring = {"ignore_missing": ["bias$"], "ignore_unexpected": ["^old", "^older"]}
        report = await load(rig, tmp_path, two(where), tensors, **ignoring)
        assert (report.missing_keys, report.unexpected_keys) == ((), ())
        assert report.fallbacks == ("on one side alone, and ignored as the settings say: 1.bias, old.weight",)
        assert report.num_tensors == 3

    @pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
    async def test_others_count(self, rig: Rig, tmp_path: Path, where: str, strict: bool) -> None:  # noqa: FBT001
        tensors = random_tensors({"0.weight": (2, 3), "1.weight": (4, 2)})
        config = {"strict": strict, "ignore_missing": [r"^0\.b"]}
        if strict:
            with pytest.raises(ws.MissingKeysError) as caught:
                await load(rig, tmp_path, two(where), tensors, **config)
            assert caught.value.actual == "1.bias"
            return
        report = await load(rig, tmp_path, two(where), tensors, **config)
        assert report.missing_keys == ("1.bias",)

    async def test_module_that_loads_itself_may_miss_them_too(self, rig: Rig, tmp_path: Path, where: str) -> None:
        model = nn.BatchNorm1d(2, device=where)
        tensors = random_tensors({"weight": (2,), "bias": (2,), "running_mean": (2,)})
        with pytest.raises(ws.MissingKeysError, match=r"running_var.*BatchNorm1d|BatchNorm1d.*running_var"):
            await load(rig, tmp_path, model, tensors)
        ignored = ["running_var", "num_batches_tracked"]
        report = await load(rig, tmp_path, model, tensors, ignore_missing=ignored)
        assert report.missing_keys == ()
        assert_same(model.weight, tensors["weight"])


class TestValidation:
    @pytest.mark.parametrize("field", ["ignore_missing", "ignore_unexpected", "include", "exclude"])
    def test_bad_pattern_is_named(self, field: str) -> None:
        with pytest.raises(ValidationError, match=r"'\(a' is not a regular expression: missing \), unterminated"):
            DeviceConfig(**{field: ["fine", "(a"]})  # type: ignore[arg-type]  # pydantic looks at it

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (rule("(a", "b"), r"rename.0.pattern\n.*'\(a' is not a regular expression"),
            (rule("a", r"\1"), r"'\\\\1' does not fit the pattern 'a': invalid group reference 1"),
            (rule("a", r"\g<x>"), "does not fit the pattern 'a': unknown group name"),
            (rule("", "b"), "at least 1 character"),
            ({"pattern": "a"}, r"rename.0.to\n.*required"),
            ({"pattern": "a", "to": "b", "from": "c"}, "not permitted"),
        ],
        ids=["pattern", "number", "name", "empty", "half", "unknown-key"],
    )
    def test_bad_rule_is_named(self, wrong: dict[str, str], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            DeviceConfig(rename=[wrong])  # type: ignore[arg-type]  # likewise

    def test_rules_come_from_yaml_and_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "config.yaml"
        file.write_text("device:\n  include: ['^a']\n  rename:\n    - {pattern: '^model\\.', to: ''}\n")
        config = ws.LoaderConfig.from_yaml(file).device
        assert [(one.pattern, one.to) for one in config.rename] == [(r"^model\.", "")]
        monkeypatch.setenv("WEIGHTSTREAM_DEVICE__RENAME", '[{"pattern": "a", "to": "b"}]')
        config = ws.LoaderConfig.from_yaml(file).device
        assert [(one.pattern, one.to) for one in config.rename] == [("a", "b")]
        assert config.include == ("^a",)


def test_many_patterns_are_alternatives() -> None:
    rules = NameRules(DeviceConfig(include=("a", "b")))
    selects: Callable[[str], bool] = rules.selects
    assert [name for name in ("xa", "bx", "c") if selects(name)] == ["xa", "bx"]
