"""`LoaderConfig`: all settings of a load, from keywords, the environment, a YAML file, and defaults.

Owns the order of the four, field by field, and the refusal of whatever names nothing: an option with a typing mistake
is an error wherever it comes from. The sections belong to the stages (`prefetch.config`, `scheduler.config`,
`device.config`). Reads no checkpoint and imports no torch.
"""

from __future__ import annotations

import difflib
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Self, cast

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from yaml.composer import ComposerError

from weightstream.device.config import DeviceConfig
from weightstream.prefetch.config import PrefetchConfig
from weightstream.prefetch.finding import is_repository
from weightstream.scheduler.config import SchedulerConfig, Strategy

__all__ = ["LoaderConfig"]

_PREFIX = "WEIGHTSTREAM_"
_PACKAGE = "pkg://"
#: The keyword by which `from_yaml` hands its file to the sources. No field can have this name.
_YAML_FILE = "yaml file"
#: Limits on a YAML file, which few hand-written ones come near. The nodes are those of the whole document, with what an
#: alias stands for counted each time: nine lines of nine aliases each would otherwise fill any memory.
_MAX_YAML_BYTES = 64 * 1024
_MAX_YAML_NODES = 1000
_MAX_YAML_DEPTH = 10
_NAME = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"


def _in_package(value: object) -> object:
    """Turn `pkg://PACKAGE/folder` into the path of that folder; the package is found, not imported."""
    if value == "":
        raise ValueError("checkpoint is empty: name a folder or a file, or leave it out")
    if not isinstance(value, str) or not value.startswith(_PACKAGE):
        return value
    name, _, inside = value.removeprefix(_PACKAGE).partition("/")
    if not value.isprintable():
        raise ValueError(f"{value!r} has characters that cannot be printed")
    if not name.isidentifier() or ".." in Path(inside).parts or inside.startswith("/"):
        raise ValueError(f"{value} must be {_PACKAGE}PACKAGE/folder, with the name of a top-level package")
    spec = find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(f"{value}: no package {name!r} is installed for this Python; install it or correct the name")
    places = [Path(place) / inside for place in spec.submodule_search_locations]
    for place in places:
        if os.path.exists(place):  # noqa: PTH110 - the method raises an OSError for names that are too long
            return place
    raise ValueError(f"{value}: package {name!r} is installed, but there is no {' or '.join(map(str, places))}")


class LoaderConfig(BaseSettings):
    """All settings of a load. Frozen; keyword > environment `WEIGHTSTREAM_SECTION__FIELD` > YAML > default.

    The order holds field by field, also inside sections: a section given by keyword, as a mapping or as a model,
    decides the fields that it sets and leaves the others to the environment and the file. In the environment `null`
    means null.

    Raises:
        pydantic.ValidationError: a value is wrong, or a keyword or a `WEIGHTSTREAM_...` variable names no field.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=_PREFIX,
        env_nested_delimiter="__",
        env_parse_none_str="null",
        json_schema_extra={"title": "weightstream", "description": "Settings of a load by weightstream."},
    )

    checkpoint: Annotated[Path | None, BeforeValidator(_in_package)] = Field(
        default=None,
        description="What to load: a folder, an index such as `model.safetensors.index.json`, or one `.safetensors`, "
        "`.bin`, `.pt` or `.pth` file. A relative path in a YAML file starts at that file's folder, elsewhere at the "
        "working directory. `org/name` and `org/name@revision`, where no such path exists, are looked for in the local "
        "Hugging Face cache. `pkg://PACKAGE/folder` is a folder inside an installed Python package. null (the default): "
        "named in the call.",
    )
    model: str | None = Field(
        default=None,
        pattern=rf"^(transformers|{_NAME}:{_NAME})$",
        description="What the command line builds the model with: `package.module:callable`, which returns the "
        "nn.Module, or `transformers`, which follows the checkpoint's config.json. null (the default): the calling "
        "program has a model.",
    )
    strategy: Strategy = Field(
        default="auto",
        description="How the checkpoint gets into the model. `auto` (the default): the loader decides and says why in "
        "its report. `stream`: the bounded pipeline of reading and copying. `preload`: the whole checkpoint into host memory first, "
        "within prefetch.host_memory, and nothing in the model changes before the last byte is there. `direct`: through "
        "host memory of the size of the largest tensor. `map`: tensors on the CPU are views of the "
        "mapped files, brought in by the kernel as they are needed; truncating such a file kills the process.",
    )
    prefetch: PrefetchConfig = Field(
        default=PrefetchConfig(), description="How bytes get from storage into host memory."
    )
    scheduler: SchedulerConfig = Field(
        default=SchedulerConfig(), description="What is read when, and how long a load may take."
    )
    device: DeviceConfig = Field(default=DeviceConfig(), description="Where tensors go, and what must be true of them.")

    @model_validator(mode="after")
    def _check_strategy(self) -> Self:
        if self.strategy == "map" and self.prefetch.page_cache == "drop":
            raise ValueError(
                "strategy: map keeps tensors in the page cache, which prefetch.page_cache: drop empties: leave one out"
            )
        return self

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **overrides: Any) -> Self:  # noqa: ANN401 - validated by pydantic
        """Read a YAML file; the environment goes before it, and `overrides` (as for the class) before both.

        Raises:
            pydantic.ValidationError: as for the class; also when the file cannot be read, is not YAML, is not a
                mapping at its top level, or has a key twice or a key that names no field. The message names the file.
        """
        values: dict[str, Any] = {_YAML_FILE: Path(path), **overrides}
        try:
            return cls(**values)
        except ValidationError as error:
            known = {".".join(field[:depth]) for field in _fields(cls.model_fields) for depth in (1, 2)}
            details = [_named(found, known) for found in error.errors(include_url=False, include_context=False)]
            title = ", ".join([f"LoaderConfig from {path}", *sorted(_environment())])
            raise ValidationError.from_exception_data(title, details) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put keywords before the environment before the YAML file; pydantic-settings merges them, field by field."""
        keywords = {name: _explicit(value) for name, value in init_settings().items()}
        values = {}
        if isinstance(file := keywords.get(_YAML_FILE), Path):
            del keywords[_YAML_FILE]
            values = _read_yaml(file)
        return (
            InitSettingsSource(settings_cls, keywords),
            _Environment(settings_cls),
            InitSettingsSource(settings_cls, _in_one_piece(values)),
        )


def _explicit(value: object) -> object:
    """Reduce a model to the fields that were set, so that it can be merged with what other sources say."""
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value


class _Environment(EnvSettingsSource):
    """pydantic-settings' reader of the environment, which passes over variables that name no field."""

    def __call__(self) -> dict[str, Any]:
        known = {"__".join(path).upper() for path in _fields(self.settings_cls.model_fields)}
        unknown = sorted({name.removeprefix(_PREFIX) for name in _environment()} - known)
        if unknown:
            raise _failure(
                *(
                    _detail(f"this variable names no field{_hint(name, known, prefix=_PREFIX)}", loc=(_PREFIX + name,))
                    for name in unknown
                )
            )
        return _in_one_piece(super().__call__())


def _in_one_piece(values: dict[str, Any]) -> dict[str, Any]:
    """Make a device map something that pydantic-settings replaces as a whole; it merges dicts, entry by entry."""
    device: dict[str, Any] | None = values.get("device")
    if not isinstance(device, dict) or not isinstance(device.get("device_map"), dict):
        return values
    return {**values, "device": {**device, "device_map": MappingProxyType(device["device_map"])}}


def _environment() -> set[str]:
    """Return the names of all variables that are meant for us, in capitals."""
    return {name.upper() for name in os.environ if name.upper().startswith(_PREFIX)}


def _fields(fields: Mapping[str, FieldInfo]) -> Iterator[tuple[str, ...]]:
    """Yield the path of every field that has a value of its own: `("checkpoint",)`, `("prefetch", "chunk")`, ..."""
    for name, field in fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from ((name, *path) for path in _fields(field.annotation.model_fields))
        else:
            yield (name,)


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, which by itself keeps the last of doubled keys, says nothing, and knows no limits."""

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self._sizes: dict[yaml.Node, int] = {}
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:  # noqa: ANN401 - likewise
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > _MAX_YAML_DEPTH:
            raise ComposerError(None, None, f"more than {_MAX_YAML_DEPTH} levels", self.get_mark())
        node = super().compose_node(parent, index)
        self._depth -= 1
        assert node is not None  # the stubs allow for a document without any
        if not is_alias:
            self._sizes[node] = 1 + sum(self._sizes[part] for part in _parts(node))
        if node not in self._sizes:
            raise ComposerError(None, None, "this contains itself", node.start_mark)
        if self._sizes[node] > _MAX_YAML_NODES:
            raise ComposerError(None, None, f"more than {_MAX_YAML_NODES} keys and values", node.start_mark)
        if isinstance(node, yaml.ScalarNode) and any("\ud800" <= c <= "\udfff" for c in node.value):
            raise ComposerError(None, None, "half a surrogate pair is not a character", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401 - the stubs have a wrong type
        # Not in construct_mapping: there, keys that `<<` has merged in already stand beside those that replace them.
        node = super().compose_mapping_node(anchor)
        marks: dict[str, yaml.Mark] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in marks:
                first = f"key {key.value!r} stands here", marks[key.value]
                raise ComposerError(*first, "and again here", key.start_mark)
            marks[key.value] = key.start_mark
        return node


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _read_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping in `file`, with `checkpoint` made relative to the file's folder. An empty file is empty."""
    try:
        raw = _read_regular(file, _MAX_YAML_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise _failure(_detail(f"cannot read {file}: {getattr(error, 'strerror', error)}")) from error
    if len(raw) > _MAX_YAML_BYTES:
        raise _failure(_detail(f"{file} is longer than {_MAX_YAML_BYTES} bytes"))
    try:
        content: object = yaml.load(raw, Loader=_StrictLoader)  # noqa: S506 - it is a safe loader
    except Exception as error:  # an ill-fitting tag (`!!int ""`) lets through whatever the conversion stumbles over
        what = str(error) if isinstance(error, yaml.YAMLError) else f"{type(error).__name__}: {error}"
        raise _failure(_detail(f"{file} cannot be parsed: {what}")) from error
    values = cast("dict[object, object]", content) if isinstance(content, dict) else None
    if content is None:
        return {}
    if values is None or not all(isinstance(key, str) for key in values):
        raise _failure(_detail(f"{file} must have names of fields, each followed by a colon, at its top level"))
    path = values.get("checkpoint")
    if isinstance(path, str) and path and not path.startswith(_PACKAGE):
        there = file.parent / path
        if not is_repository(path) or os.path.exists(there):  # noqa: PTH110 (false, and no error, for a path with a NUL)
            values["checkpoint"] = str(there)
    return cast("dict[str, Any]", values)


def _read_regular(file: Path, most_bytes: int) -> bytes:
    """Read the beginning of a file, and nothing of what is no regular one: from a FIFO, that might never come."""
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        with os.fdopen(fd, "rb", closefd=False) as stream:
            return stream.read(most_bytes)
    finally:
        os.close(fd)


def _named(found: ErrorDetails, known: Iterable[str]) -> InitErrorDetails:
    message = found["msg"]
    if found["type"] == "extra_forbidden":
        message = f"no such key{_hint('.'.join(map(str, found['loc'])), known)}"
    return _detail(message, kind=found["type"], loc=found["loc"], value=found["input"])


def _hint(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _detail(
    message: str, *, kind: str = "config", loc: tuple[int | str, ...] = (), value: object = None
) -> InitErrorDetails:
    message = message.encode(errors="backslashreplace").decode()  # names in the environment may be any bytes
    error = PydanticCustomError(kind, "{message}", {"message": message})  # pyright: ignore[reportArgumentType] - LiteralString
    return InitErrorDetails(type=error, loc=loc, input=value)


def _failure(*details: InitErrorDetails) -> ValidationError:
    return ValidationError.from_exception_data("LoaderConfig", list(details))
