"""What stands in the documents is true: code runs, configurations are accepted, commands do what they should."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from docs.reference import reference
from tests.builders import write_checkpoint, write_sums
from tests.documents import DOCUMENTS, ROOT, Block, blocks, commands_in
from tests.models import SmallNet, tensors_of
from weightstream import commands
from weightstream.config import LoaderConfig

#: What is tried here: everything that is not a drawing, or says which other test tries it.
LANGUAGES = {"console", "plaintext", "python", "yaml"}
#: Commands that take long, or do not end, are only parsed.
LONG = {"demo", "bench", "--hold"}


def with_blocks(language: str) -> list[str]:
    """The documents that have blocks of a language which are to be tried."""
    return [name for name in DOCUMENTS if any(block.tried_by is None for block in blocks(name, language))]


@pytest.fixture(name="readers_folder")
def fixture_readers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder of somebody who reads the documents, with what they say is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_server").mkdir()
    (tmp_path / "my_server" / "models.py").write_text(
        "import torch\nfrom tests.models import SmallNet\n\n"
        "def build():\n    with torch.device('meta'):\n        return SmallNet()\n"
    )
    for folder in ("path/to/checkpoint", "models/my-model", "models/next-model"):
        write_checkpoint(tmp_path / folder, tensors_of(SmallNet()), num_shards=2)
    write_sums(tmp_path / "models/next-model")
    (tmp_path / "config.yaml").write_text("checkpoint: models/my-model\nmodel: my_server.models:build\n")
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_server"]:
        del sys.modules[name]


def settled(text: str, folder: Path) -> str:
    """Text of a document, with the models of the reader where a test may put them."""
    return text.replace("/models/", f"{folder}/models/")


def test_every_block_is_tried() -> None:
    unknown = [block for name in DOCUMENTS for block in blocks(name) if not is_tried(block)]
    assert [f"{block}: {block.language}" for block in unknown] == []


def is_tried(block: Block) -> bool:
    """Here, by its language; or by a test that exists and reads blocks of this language in this document."""
    if block.tried_by is None:
        return block.language in LANGUAGES
    test = ROOT / block.tried_by
    return test.is_file() and f'blocks("{block.document}", "{block.language}")' in test.read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_code_is_as_wide_as_the_page(document: str) -> None:
    """87 characters are what the site shows beside its menus on a screen of 1280 pixels. Messages are wrapped there."""
    lines = [
        (str(block), line) for block in blocks(document) if block.language != "text" for line in block.text.splitlines()
    ]
    assert [(block, line) for block, line in lines if len(line) > 87] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_fence_belongs_to_a_block(document: str) -> None:
    """Such as one that is longer, of other characters, or never closed, which would be passed over."""
    fences = re.findall(r"^\s*(?:`{3}|~{3})", (ROOT / document).read_text(), re.MULTILINE)
    assert len(fences) == 2 * len(blocks(document))


# Python


@pytest.mark.filterwarnings("default::DeprecationWarning")
@pytest.mark.parametrize("document", with_blocks("python"))
def test_python_runs(document: str, readers_folder: Path) -> None:
    """One block after the other, in one namespace, as somebody would type them who reads the page."""
    with torch.device("meta"):
        names: dict[str, object] = {"model": SmallNet(), "MyModel": SmallNet, "nn": nn}
    for block in blocks(document, "python"):
        if block.tried_by is None:
            source = settled(block.text, readers_folder)
            code = compile(source, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
            waiting = eval(code, names)
            if inspect.iscoroutine(waiting):
                asyncio.run(waiting)


# Configuration


@pytest.mark.parametrize(
    "block", [b for name in DOCUMENTS for b in blocks(name, "yaml") if b.tried_by is None], ids=str
)
def test_yaml_is_a_configuration(block: Block, readers_folder: Path) -> None:
    file = readers_folder / "block.yaml"
    file.write_text(settled(block.text, readers_folder))
    set_fields = LoaderConfig.from_yaml(file).model_fields_set
    assert set_fields == set(yaml.safe_load(block.text))


def test_reference_of_the_configuration_is_what_the_models_say() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference(), "run: python docs/reference.py > docs/configuration.md"


# Commands


@pytest.mark.parametrize("document", with_blocks("console"))
def test_commands_work(document: str, readers_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in blocks(document, "console"):
        found = [] if block.tried_by else list(commands_in(block))
        assert found or block.tried_by, f"{block}: no line begins with $"
        for words in found:
            while "=" in words[0]:
                monkeypatch.setenv(*words.pop(0).split("=", 1))
            assert words[0] in TRIED, f"{block}: {' '.join(words)} is not tried"
            TRIED[words[0]]([settled(word, readers_folder) for word in words[1:]])


def try_weightstream(words: Sequence[str]) -> None:
    if not LONG.isdisjoint(words):
        group = commands._weightstream.make_context("weightstream", list(words), obj=commands._Session())
        commands._weightstream.commands[words[0]].make_context(words[0], list(words[1:]), parent=group)
    else:
        assert commands.run(words) == 0, words


def try_make(words: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert re.search(rf"^{name} [:?]=|^#   {name} " if is_variable else rf"^{name}:", makefile, re.MULTILINE), word


def try_pip(words: Sequence[str]) -> None:
    assert words[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words[1:]:
        if named := re.fullmatch(r"(?:\.|weightstream)\[([\w,-]+)\]", word):
            assert set(named[1].split(",")) <= set(extras), word
        else:
            assert word == ".", word


TRIED: dict[str, Callable[[Sequence[str]], None]] = {
    "weightstream": try_weightstream,
    "make": try_make,
    "pip": try_pip,
}
