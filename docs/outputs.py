"""Writes docs/json.md from what the commands print: `python docs/outputs.py > docs/json.md`.

Every word about a key comes from its attribute, so that the page, the JSON schemas and the code cannot say different
things.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from weightstream.outputs import schema_of

__all__ = ["outputs"]

Schema = dict[str, Any]

_INTRODUCTION = """\
# JSON for scripts

<!-- Written by docs/outputs.py from the classes: python docs/outputs.py > docs/json.md -->

`warm`, `inspect`, `verify` and `bench` take `--json`: they print one JSON object on standard output, and nothing else;
progress and errors go to standard error, and `--quiet` leaves the progress out (`inspect` has none). If a command fails, it prints no object,
and its exit code says so: 1 if the load failed, 2 for usage or configuration. (`verify` prints what it found also where
its exit code is 1.)

Every key is there each time, `null` where there is nothing to say. No key is renamed, removed or given another meaning
without a new major version; new keys may come. Sizes are in bytes, times in seconds, rates in bytes per second, as the
names say. Sentences are for people: do not parse them.

```console
$ weightstream warm config.yaml --json --quiet
$ weightstream inspect /models/my-model --json
$ weightstream verify /models/next-model --json --quiet
$ weightstream schema verify
```

`weightstream schema NAME` prints the JSON schemas below; tests compare what the commands print with them.
"""
_COMMANDS = {"report": "warm", "inspect": "inspect", "verify": "verify", "bench": "bench"}
_PLAIN = {
    "string": "text",
    "boolean": "`true` or `false`",
    "integer": "whole number",
    "number": "number",
    "null": "`null`",
}


def outputs() -> str:
    """Return the page."""
    parts = [_INTRODUCTION]
    for name, command in _COMMANDS.items():
        schema = schema_of(name)
        parts.append(f"## {command}\n\n[{name}.schema.json]({name}.schema.json), `weightstream schema {name}`\n")
        parts += _table(schema)
        for title, part in schema.get("$defs", {}).items():
            if title == "LoadReport":
                continue  # it is a section of its own
            parts.append(f"### {_heading(title)}\n\n{part['description']}\n")
            parts += _table(part)
    return "\n".join(parts)


def _heading(title: str) -> str:
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in title).strip().capitalize()


def _table(schema: Schema) -> Iterator[str]:
    rows = [
        f"| `{key}` | {_type(field)} | {' '.join(field['description'].split())} |"
        for key, field in schema["properties"].items()
    ]
    yield "\n".join(["| key | type | meaning |", "|---|---|---|", *rows, ""])


def _type(field: Schema) -> str:
    """Say in words what a value may be."""
    if "anyOf" in field:
        return " or ".join(_type(part) for part in field["anyOf"])
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return "[report](#warm)" if name == "LoadReport" else f"[{_heading(name).lower()}](#{_anchor(name)})"
    if field["type"] == "array":
        return f"list of: {_type(field['items'])}"
    if field["type"] == "object":
        return f"mapping to: {_type(field['additionalProperties'])}"
    return _PLAIN[field["type"]]


def _anchor(name: str) -> str:
    return _heading(name).lower().replace(" ", "-")


if __name__ == "__main__":
    print(outputs(), end="")
