"""Writes docs/configuration.md from the pydantic models: `python docs/reference.py > docs/configuration.md`.

Every word about a key comes from its field, so that the page, the JSON schema and the code cannot say different things.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter

from weightstream.config import LoaderConfig
from weightstream.prefetch.config import Size

__all__ = ["reference"]

Schema = dict[str, Any]

_SIZE: Schema = TypeAdapter(Size).json_schema()
_INTRODUCTION = """\
# Configuration

<!-- Written by docs/reference.py from the pydantic models: python docs/reference.py > docs/configuration.md -->

Every key of a `LoaderConfig`, of the YAML file that `LoaderConfig.from_yaml` and `weightstream warm` read, and of the
environment. What is said in several places counts in this order, field by field: keyword, environment variable, YAML
file, default. Whatever names no key is an error, wherever it stands.

```yaml
checkpoint: /models/my-model
strategy: stream
prefetch:
  host_memory: 2GiB
device:
  target: cpu
```

Sizes are whole numbers of bytes, or text with a unit: `16MiB` is 2^24 bytes, `16MB` is 16,000,000. In the environment,
`null` stands for null, and lists and mappings are written as JSON. [configs/full.yaml](../configs/full.yaml) has every
key with its default, and [config.schema.json](config.schema.json) lets editors complete and check the file; it is what
`weightstream schema` prints.
"""
_PLAIN = {
    "string": "text",
    "boolean": "`true` or `false`",
    "integer": "whole number",
    "number": "number",
    "null": "`null`",
}


def reference() -> str:
    """Return the page."""
    schema = LoaderConfig.model_json_schema()
    top = {name: field for name, field in schema["properties"].items() if "$ref" not in field}
    parts = [_INTRODUCTION, "## At the top\n", *_keys(top, (), schema)]
    for name, field in schema["properties"].items():
        if "$ref" in field:
            section = _resolved(field, schema)
            parts += [f"## {name}\n\n{section['description']}\n", *_keys(section["properties"], (name,), schema)]
    return "\n".join(parts)


def _keys(fields: Schema, above: tuple[str, ...], schema: Schema) -> Iterator[str]:
    for name, field in fields.items():
        path = (*above, name)
        unit = _unit(name, field)
        lines = [
            f"### {'.'.join(path)}\n\n{field['description']}\n",
            f"- Type: {_type(field, schema)}",
            *([f"- Unit: {unit}"] if unit else []),
            f"- Default: `{_default(field)}`",
            f"- Environment variable: `WEIGHTSTREAM_{'__'.join(path).upper()}`",
        ]
        yield "\n".join(lines) + "\n"


def _resolved(field: Schema, schema: Schema) -> Schema:
    return schema["$defs"][field["$ref"].rpartition("/")[2]] if "$ref" in field else field


def _is_size(field: Schema) -> bool:
    return bool(field.get("anyOf") == _SIZE["anyOf"])


def _unit(name: str, field: Schema) -> str:
    if _is_size(field):
        return "bytes"
    return "seconds" if name.endswith("_s") else ""


def _type(field: Schema, schema: Schema) -> str:
    """Say in words what a value may be."""
    field = _resolved(field, schema)
    if _is_size(field):
        return "size"
    if "anyOf" in field:
        return " or ".join(_type(part, schema) for part in field["anyOf"])
    values = [field["const"]] if "const" in field else field.get("enum", [])
    if values:
        return " or ".join(f"`{value}`" for value in values)
    return _single_type(field, schema)


def _single_type(field: Schema, schema: Schema) -> str:
    kind = field["type"]
    if kind == "array":
        return f"list of: {_type(field['items'], schema)}"
    if kind != "object":
        return _PLAIN[kind] + _limits(field)
    if "properties" in field:
        keys = (f"`{name}` ({_type(part, schema)})" for name, part in field["properties"].items())
        return f"mapping with {' and '.join(keys)}"
    return f"mapping from names to ({_type(field['additionalProperties'], schema)})"


def _limits(field: Schema) -> str:
    if field.get("format") == "regex":
        return " (a regular expression)"
    if field.get("format") == "path":
        return " (a path)"
    words = {"exclusiveMinimum": "more than", "minimum": "at least", "maximum": "at most"}
    limits = [f"{word} {field[key]:,}" for key, word in words.items() if key in field]
    if "pattern" in field:
        limits.append(f"that matches `{field['pattern']}`")
    return f" ({', '.join(limits)})" if limits else ""


def _default(field: Schema) -> str:
    """Write the default as in a YAML file."""
    value = field["default"]
    if _is_size(field):
        for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
            if value and value % 2**exponent == 0:
                return f"{value >> exponent}{unit}"
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    print(reference(), end="")
