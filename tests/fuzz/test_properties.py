"""Whatever the input is: the properties of `oracle`, on inputs that hypothesis makes. `make soak` tries 25 times more."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.builders import random_tensors, write_shard
from tests.fuzz import oracle
from tests.fuzz.strategies import (
    configurations,
    files,
    files_with_changed_bytes,
    files_with_changed_headers,
    indexes,
    torch_files,
    torch_files_with_changed_bytes,
    torch_files_with_changed_pickles,
)


def share(examples: int) -> settings:
    """Settings for so many examples, times what the profile has for each hundred."""
    return settings(
        max_examples=examples * settings().max_examples // 100,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@given(files())
@share(200)
def test_valid_file_is_accepted_and_read_as_the_reference_reads_it(file: bytes) -> None:
    assert oracle.check_header(file) == oracle.ACCEPTED


@given(files_with_changed_bytes())
@share(500)
def test_file_with_changed_bytes_is_judged_as_the_reference_judges_it(file: bytes) -> None:
    oracle.check_header(file)


@given(files_with_changed_headers())
@share(500)
def test_file_with_changed_json_is_judged_as_the_reference_judges_it(file: bytes) -> None:
    oracle.check_header(file)


@given(torch_files())
@share(150)
def test_file_of_torch_is_accepted_and_read_as_torch_reads_it(file: bytes) -> None:
    assert oracle.check_torch(file) == oracle.ACCEPTED


@given(torch_files_with_changed_bytes())
@share(400)
def test_file_of_torch_with_changed_bytes_is_accepted_only_if_torch_reads_the_same(file: bytes) -> None:
    oracle.check_torch(file)


@given(torch_files_with_changed_pickles())
@share(400)
def test_file_of_torch_with_a_changed_pickle_is_accepted_only_if_torch_reads_the_same(file: bytes) -> None:
    oracle.check_torch(file)


@given(indexes())
@share(400)
def test_index_is_judged_as_json_judges_it_and_opens_files_of_its_folder_alone(folder: Path, raw: bytes) -> None:
    oracle.check_index(raw)
    oracle.check_opening(folder, raw)


@given(configurations())
@share(400)
def test_configuration_is_judged_as_yaml_and_pydantic_judge_it(raw: bytes) -> None:
    oracle.check_yaml(raw)


@pytest.fixture(name="folder")
def fixture_folder(tmp_path: Path) -> Path:
    """What `shard_names` may lead to: files, links inside and outside, a folder."""
    folder = tmp_path / "checkpoint"
    for name in ("x", "y", "sub/z"):
        write_shard(folder / name, random_tensors({"a": [2]}))
    (folder / "link").symlink_to("x")
    write_shard(tmp_path / "outside", random_tensors({"a": [2]}))
    (folder / "out").symlink_to(tmp_path / "outside")
    return folder
