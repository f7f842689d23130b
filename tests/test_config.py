"""`LoaderConfig`: where values come from, what is refused, and that the files in configs/ say what is true."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pydantic import ByteSize, ValidationError

from weightstream.config import LoaderConfig
from weightstream.device.config import DeviceConfig
from weightstream.prefetch.config import PrefetchConfig
from weightstream.scheduler.config import SchedulerConfig, Settings

ROOT = Path(__file__).parents[1]
MIB = 2**20

Write = Callable[[str], Path]


@pytest.fixture(name="write")
def fixture_write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def schema_keys(schema: dict[str, object], root: dict[str, object] | None = None) -> dict[str, object]:
    """The tree of keys that a JSON schema has: leaves are None."""
    root = root or schema
    reference = schema.get("$ref")
    if isinstance(reference, str):
        definitions = root["$defs"]
        assert isinstance(definitions, dict)
        schema = definitions[reference.removeprefix("#/$defs/")]
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return {}
    return {name: schema_keys(below, root) or None for name, below in properties.items()}


def document_keys(document: dict[str, object]) -> dict[str, object]:
    return {name: document_keys(value) if isinstance(value, dict) else None for name, value in document.items()}


def test_config_has_what_the_loader_needs() -> None:
    settings: Settings = LoaderConfig()
    assert settings.checkpoint is None
    assert settings.strategy == "auto"
    assert settings.prefetch == PrefetchConfig()
    assert settings.scheduler == SchedulerConfig()
    assert settings.device == DeviceConfig()


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        LoaderConfig().strategy = "stream"


def test_config_survives_pickling() -> None:
    config = LoaderConfig(checkpoint=Path("a"), device=DeviceConfig(target="cpu"))
    assert pickle.loads(pickle.dumps(config)) == config


def test_importing_the_configuration_does_not_import_torch() -> None:
    program = "import sys, weightstream.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# Where values come from


def test_yaml_gives_values(write: Write) -> None:
    path = write(
        "model: a.b:c\nprefetch: {chunk: 1MiB, workers: 3}\ndevice: {strict: false}\nscheduler: {timeout_s: 1.5}"
    )
    config = LoaderConfig.from_yaml(path)
    assert config.model == "a.b:c"
    assert config.prefetch == PrefetchConfig(chunk=ByteSize(MIB), workers=3)
    assert config.device == DeviceConfig(strict=False)
    assert config.scheduler == SchedulerConfig(timeout_s=1.5)


@pytest.mark.parametrize("text", ["", "# nothing is set here\n"], ids=["empty", "comment"])
def test_yaml_without_a_key_gives_the_defaults(write: Write, text: str) -> None:
    assert LoaderConfig.from_yaml(write(text)) == LoaderConfig()


def test_environment_gives_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSTREAM_STRATEGY", "stream")
    monkeypatch.setenv("WEIGHTSTREAM_PREFETCH__CHUNK", "2MiB")
    monkeypatch.setenv("WEIGHTSTREAM_PREFETCH__WORKERS", "3")
    monkeypatch.setenv("WEIGHTSTREAM_DEVICE__STRICT", "false")
    config = LoaderConfig()
    assert config.strategy == "stream"
    assert config.prefetch == PrefetchConfig(chunk=ByteSize(2 * MIB), workers=3)
    assert config.device == DeviceConfig(strict=False)


def test_null_in_the_environment_undoes_the_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSTREAM_MODEL", "null")
    monkeypatch.setenv("WEIGHTSTREAM_SCHEDULER__TIMEOUT_S", "null")
    config = LoaderConfig.from_yaml(write("model: transformers\nscheduler: {timeout_s: 5}"))
    assert (config.model, config.scheduler.timeout_s) == (None, None)


@pytest.mark.parametrize(
    "keyword",
    [
        pytest.param({"retries": 1}, id="mapping"),
        pytest.param(PrefetchConfig(retries=1), id="model"),
        pytest.param(PrefetchConfig(retries=1, host_memory=ByteSize(2**30)), id="model with a default set explicitly"),
    ],
)
def test_precedence_holds_field_by_field_inside_sections(
    write: Write, monkeypatch: pytest.MonkeyPatch, keyword: PrefetchConfig | dict[str, int]
) -> None:
    path = write("prefetch: {retries: 7, workers: 7, chunk: 7MiB, host_memory: 7GiB}")
    monkeypatch.setenv("WEIGHTSTREAM_PREFETCH__RETRIES", "5")
    monkeypatch.setenv("WEIGHTSTREAM_PREFETCH__WORKERS", "5")
    prefetch = LoaderConfig.from_yaml(path, prefetch=keyword).prefetch
    assert (prefetch.retries, prefetch.workers, prefetch.chunk, prefetch.io) == (1, 5, 7 * MIB, "auto")
    explicit = isinstance(keyword, PrefetchConfig) and "host_memory" in keyword.model_fields_set
    assert prefetch.host_memory == (1 if explicit else 7) * 2**30


def test_keyword_goes_before_the_environment_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSTREAM_DEVICE__TARGET", "cuda")
    monkeypatch.setenv("WEIGHTSTREAM_DEVICE__DTYPE", "float16")
    assert LoaderConfig(device=DeviceConfig(target="cpu")).device == DeviceConfig(target="cpu", dtype="float16")


def test_merge_key_may_be_overridden(write: Write) -> None:
    path = write("prefetch: &base {retries: 1}\nscheduler: {order: file}\ndevice: {}\n")
    assert LoaderConfig.from_yaml(path).prefetch.retries == 1
    path = write("prefetch: {<<: {retries: 1, workers: 2}, retries: 5}")
    assert LoaderConfig.from_yaml(path).prefetch == PrefetchConfig(retries=5, workers=2)


# The checkpoint's path


def test_relative_checkpoint_in_a_file_starts_at_its_folder(write: Write) -> None:
    path = write("checkpoint: models/a")
    (path.parent / "models" / "a").mkdir(parents=True)
    assert LoaderConfig.from_yaml(path).checkpoint == path.parent / "models" / "a"
    assert LoaderConfig.from_yaml(write("checkpoint: ./missing/a")).checkpoint == path.parent / "missing" / "a"


def test_repository_in_a_file_stays_what_it_is(write: Write) -> None:
    assert LoaderConfig.from_yaml(write("checkpoint: org/name@v1")).checkpoint == Path("org/name@v1")


def test_absolute_checkpoint_in_a_file_is_kept(write: Write) -> None:
    assert LoaderConfig.from_yaml(write("checkpoint: /models/a")).checkpoint == Path("/models/a")


def test_relative_checkpoint_from_elsewhere_starts_at_the_working_directory(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("checkpoint: models/a")
    monkeypatch.setenv("WEIGHTSTREAM_CHECKPOINT", "models/b")
    assert LoaderConfig.from_yaml(path).checkpoint == Path("models/b")
    assert LoaderConfig.from_yaml(path, checkpoint="models/c").checkpoint == Path("models/c")


@pytest.fixture(name="package")
def fixture_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that cannot be imported, with a checkpoint in it."""
    package = tmp_path / "site" / "package_with_weights"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(package.parent)
    return package


@pytest.mark.parametrize("source", ["keyword", "environment", "file"])
def test_checkpoint_in_a_package_is_found_without_importing_it(
    package: Path, write: Write, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    uri = "pkg://package_with_weights/model"
    if source == "keyword":
        config = LoaderConfig.model_validate({"checkpoint": uri})
    elif source == "environment":
        monkeypatch.setenv("WEIGHTSTREAM_CHECKPOINT", uri)
        config = LoaderConfig()
    else:
        config = LoaderConfig.from_yaml(write(f"checkpoint: {uri}"))
    assert config.checkpoint == package / "model"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        pytest.param("pkg://no_such_package/model", "no package 'no_such_package' is installed", id="package"),
        pytest.param("pkg://json.decoder/model", "top-level package", id="sub-package"),
        pytest.param("pkg:///model", "top-level package", id="no name"),
        pytest.param("pkg://shlex/model", "no package 'shlex'", id="module without a folder"),
        pytest.param("pkg://package_with_weights/none", "is installed, but there is no .*/none", id="folder"),
        pytest.param("pkg://package_with_weights/../x", "top-level package", id="way out"),
        pytest.param("pkg://package_with_weights//etc", "top-level package", id="absolute"),
        pytest.param("pkg://package_with_weights/" + "x" * 300, "is installed, but there is no", id="long"),
        pytest.param("pkg://package_with_weights/\u200b", "cannot be printed", id="not printable"),
        pytest.param("", "checkpoint is empty", id="empty"),
    ],
)
def test_checkpoint_that_leads_nowhere_is_refused(package: Path, write: Write, uri: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LoaderConfig.from_yaml(write(f"checkpoint: '{uri}'"))


# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("strateggy: auto", r"strateggy\s+no such key; did you mean strategy\?", id="unknown key"),
        pytest.param("prefetch: {chunks: 1MiB}", r"did you mean prefetch\.chunk\?", id="unknown key in a section"),
        pytest.param("strategy: auto\nstrategy: stream", r"key 'strategy' stands here[^\0]*line 2", id="doubled key"),
        pytest.param(
            "device: {strict: true, strict: false}", "key 'strict' stands here", id="doubled key in a section"
        ),
        pytest.param("prefetch: [", "cannot be parsed", id="syntax"),
        pytest.param("checkpoint: 2024-99-99", "cannot be parsed", id="impossible date"),
        pytest.param("a\n---\nb", "cannot be parsed", id="two documents"),
        pytest.param("\x00", "cannot be parsed", id="binary"),
        pytest.param("- strategy: auto", "at its top level", id="list at the top"),
        pytest.param("strategy", "at its top level", id="word at the top"),
        pytest.param("1: auto", "at its top level", id="number as a key"),
        pytest.param("prefetch: auto", "prefetch", id="value for a section"),
        pytest.param("prefetch: {chunk: 16MiBs}", r"prefetch\.chunk", id="wrong unit"),
        pytest.param("a: " + "[" * 5000, "more than 10 levels", id="deep"),
        pytest.param("{a: " * 5000, "more than 10 levels", id="deep mappings"),
        pytest.param("prefetch: &a {chunk: *a}", "this contains itself", id="contains itself"),
        pytest.param(f"a: [{'x,' * 1000}]", "more than 1000 keys and values", id="many values"),
        pytest.param("checkpoint: " + "x" * 2**16, "longer than 65536 bytes", id="long"),
        pytest.param('model: !!int ""', "cannot be parsed: IndexError", id="tag that does not fit"),
        pytest.param("model: !!bool x", "cannot be parsed: KeyError", id="tag with a word that it does not know"),
        pytest.param("model: !!timestamp x", "cannot be parsed: AttributeError", id="tag with no time"),
        pytest.param("model: !!python/name:os.system", "could not determine a constructor", id="tag that names code"),
        pytest.param('checkpoint: "\\ud800"', "surrogate", id="half a surrogate pair"),
        pytest.param("prefetch: {chunk: .inf}", r"prefetch\.chunk", id="infinite"),
        pytest.param(f"prefetch: {{retries: {'9' * 5000}}}", "cannot be parsed", id="5,000 digits"),
        pytest.param("model: nonsense", "should match pattern", id="model without a colon"),
        pytest.param("model: 'transformers:'", "should match pattern", id="model without a callable"),
    ],
)
def test_bad_file_is_refused_by_name(write: Write, text: str, message: str) -> None:
    path = write(text)
    with pytest.raises(ValidationError, match=message) as caught:
        LoaderConfig.from_yaml(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("item", ["[{}]", "{{<<: [{}]}}"], ids=["lists", "merge keys"])
def test_aliases_of_aliases_are_counted_as_what_they_stand_for(write: Write, item: str) -> None:
    """Else twenty such lines, which stand for a number of 20 digits of values, fill any memory."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} " + item.format(",".join([f"*a{i - 1}"] * 9)) for i in range(1, 20)]
    with pytest.raises(ValidationError, match="more than 1000 keys and values"):
        LoaderConfig.from_yaml(write("\n".join(lines)))


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"cannot read .*none\.yaml: No such file"):
        LoaderConfig.from_yaml(tmp_path / "none.yaml")


def test_file_whose_name_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"cannot read .*null"):
        LoaderConfig.from_yaml("a\0.yaml")


def test_folder_in_place_of_a_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=rf"cannot read {re.escape(str(tmp_path))}: not a regular file"):
        LoaderConfig.from_yaml(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_is_refused_by_name(write: Write) -> None:
    path = write("strategy: auto")
    path.chmod(0)
    with pytest.raises(ValidationError, match=rf"cannot read {re.escape(str(path))}: Permission denied"):
        LoaderConfig.from_yaml(path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        pytest.param("WEIGHTSTREAM_STRATEGGY", "did you mean WEIGHTSTREAM_STRATEGY", id="field"),
        pytest.param("WEIGHTSTREAM_PREFETCH__CHUNKS", "did you mean WEIGHTSTREAM_PREFETCH__CHUNK", id="nested"),
        pytest.param("weightstream_prefetch__chunks", "did you mean WEIGHTSTREAM_PREFETCH__CHUNK", id="small letters"),
        pytest.param("WEIGHTSTREAM_PREFETCH_CHUNK", "did you mean WEIGHTSTREAM_PREFETCH__CHUNK", id="one underscore"),
        pytest.param("WEIGHTSTREAM_PREFETCH__CHUNK__X", "WEIGHTSTREAM_PREFETCH__CHUNK", id="too deep"),
        pytest.param("WEIGHTSTREAM_PREFETCH", "names no field", id="whole section"),
        pytest.param("WEIGHTSTREAM_QQQ", "names no field", id="nothing like it"),
    ],
)
@pytest.mark.parametrize("with_file", [False, True], ids=["alone", "with a file"])
def test_variable_that_names_no_field_is_refused(
    write: Write, monkeypatch: pytest.MonkeyPatch, name: str, hint: str, *, with_file: bool
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValidationError, match=hint) as caught:
        LoaderConfig.from_yaml(write("")) if with_file else LoaderConfig()
    assert name.upper() in str(caught.value)


def test_variable_whose_name_is_no_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "WEIGHTSTREAM_\udcff", "1")
    with pytest.raises(ValidationError, match="names no field"):
        LoaderConfig()


def test_bad_value_in_a_variable_is_refused_by_name(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSTREAM_PREFETCH__CHUNK", "16MiBs")
    with pytest.raises(ValidationError, match=r"WEIGHTSTREAM_PREFETCH__CHUNK\nprefetch\.chunk"):
        LoaderConfig.from_yaml(write("strategy: auto"))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        pytest.param({"nope": 1}, "nope", id="at the top"),
        pytest.param({"prefetch": {"nope": 1}}, r"prefetch\.nope", id="in a section"),
        pytest.param({"prefetch": SchedulerConfig(order="file")}, r"prefetch\.order", id="section of another name"),
    ],
)
def test_keyword_that_names_no_field_is_refused(keywords: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LoaderConfig.model_validate(keywords)


# The files


def test_minimal_file_sets_what_a_load_needs() -> None:
    config = LoaderConfig.from_yaml(ROOT / "configs" / "minimal.yaml")
    assert config.model_fields_set == {"checkpoint", "model"}


def test_full_file_has_every_key_with_its_default() -> None:
    path = ROOT / "configs" / "full.yaml"
    assert document_keys(yaml.safe_load(path.read_text())) == schema_keys(LoaderConfig.model_json_schema())
    assert LoaderConfig.from_yaml(path) == LoaderConfig()


def test_minilm_file_finds_the_checkpoint_in_its_package() -> None:
    config = LoaderConfig.from_yaml(ROOT / "configs" / "minilm.yaml")
    assert config.checkpoint is not None
    assert (config.checkpoint / "model.safetensors").is_file()
    assert config.model == "transformers"


def test_every_file_is_tested_and_names_the_schema() -> None:
    files = sorted((ROOT / "configs").glob("*.yaml"))
    assert [file.name for file in files] == ["full.yaml", "minilm.yaml", "minimal.yaml"]
    for file in files:
        assert file.read_text().startswith("# yaml-language-server: $schema=../docs/config.schema.json\n")


def test_committed_schema_is_current() -> None:
    committed = json.loads((ROOT / "docs" / "config.schema.json").read_text())
    assert committed == LoaderConfig.model_json_schema(), "run: weightstream schema > docs/config.schema.json"


def test_schema_describes_every_key() -> None:
    schema = LoaderConfig.model_json_schema()
    sections = schema["$defs"]
    for owner in (schema, *sections.values()):
        for name, field in owner["properties"].items():
            described = field if "$ref" not in field else sections[field["$ref"].removeprefix("#/$defs/")]
            assert described.get("description"), name


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), 1e12])
def test_timeout_that_no_clock_could_keep_is_refused(seconds: float) -> None:
    with pytest.raises(ValidationError, match="timeout_s"):
        LoaderConfig(scheduler={"timeout_s": seconds})  # type: ignore[arg-type]  # pydantic makes it


def test_every_number_refuses_true() -> None:
    config = LoaderConfig()
    taken = [
        f"{section}.{field}"
        for section in ("prefetch", "scheduler", "device")
        for field, old in getattr(config, section)
        if not isinstance(old, bool)
        if _accepts(section, field, True)
    ]
    assert taken == []
    with pytest.raises(ValidationError, match=r"prefetch\.retries\n.*a number, and not true or false, is wanted"):
        LoaderConfig.model_validate({"prefetch": {"retries": False}})


def _accepts(section: str, field: str, value: bool) -> bool:  # noqa: FBT001
    try:
        LoaderConfig.model_validate({section: {field: value}})
    except ValidationError:
        return False
    return True
