"""The plugin for vLLM, as far as it can be seen without vLLM."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path


def test_entry_point_names_the_function() -> None:
    """In pyproject.toml: what is installed in a checkout may be older."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["weightstream"].partition(":")
    assert callable(getattr(import_module(module), function))


def test_importing_the_plugin_imports_nothing_heavy() -> None:
    program = """
import sys
import weightstream.integrations.vllm
print(sorted({"torch", "vllm", "pydantic", "weightstream.api", "weightstream.config"} & sys.modules.keys()))
"""
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
