"""Settings of the device stage: the section `device` of the YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = ["DeviceConfig", "DtypeName", "Pattern", "Rename", "UserMap"]

#: Dtypes that a load may be asked to cast to; casts exist among these four alone.
DtypeName = Literal["float16", "bfloat16", "float32", "float64"]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as exc:
        raise ValueError(f"{pattern!r} is not a regular expression: {exc}") from exc
    return pattern


#: A regular expression of Python's `re`, which is searched for anywhere in a name; `^` and `$` tie it to the ends.
Pattern = Annotated[str, Field(min_length=1, json_schema_extra={"format": "regex"}), AfterValidator(_compiles)]


class Rename(BaseModel):
    """One rule that makes names of the model out of names of the checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: Pattern = Field(description="Regular expression: what is looked for in the checkpoint's name.")
    to: str = Field(
        description='What every match becomes: text, with `\\1` or `\\g<name>` for the groups of the pattern. "" drops it.'
    )

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        try:
            re.compile(self.pattern).sub(self.to, "")
        except (re.error, IndexError) as exc:  # IndexError: a group by a name that there is not
            raise ValueError(f"{self.to!r} does not fit the pattern {self.pattern!r}: {exc}") from exc
        return self


def _plain_device(value: object) -> object:
    """Take a `torch.device` as its name. This module does not import torch."""
    return str(value) if type(value).__name__ == "device" else value


def _is_no_disk(value: int | str) -> int | str:
    if value == "disk":
        raise ValueError(
            "nothing is offloaded to disk here: give these modules a device, or cpu, or meta to leave them unloaded"
        )
    return value


#: A device in a device map: the number of an accelerator, or a name as torch writes it.
MapDevice = Annotated[
    Annotated[int, Field(strict=True, ge=0)] | Annotated[str, Field(pattern=r"^[a-z]+(:\d+)?$")],
    BeforeValidator(_plain_device),
    AfterValidator(_is_no_disk),
]


#: A device map as users write it: values are numbers, names, or `torch.device` objects.
UserMap = Mapping[str, object]


class DeviceConfig(BaseModel):
    """Where tensors go, and what must be true of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str = Field(
        default="auto",
        pattern=r"^(auto|[a-z]+(:\d+)?)$",
        description="Device for parameters that are on meta: `auto` (the machine's accelerator, else the CPU), `cpu`, "
        "`cuda`, `cuda:1`, ... A parameter that already has storage stays where it is; a target that disagrees with "
        "it is an error.",
    )
    device_map: dict[str, MapDevice] | None = Field(
        default=None,
        description="Devices by name of module or tensor, instead of `target`, as accelerate's `infer_auto_device_map` makes "
        'it: the longest name that a tensor\'s begins with decides, and `""` is the whole model. Numbers count '
        "accelerators; `meta` leaves a module unloaded and unread. A tensor without a device is an error. null (the "
        "default): everything goes to `target`.",
    )
    dtype: Literal["model", "checkpoint"] | DtypeName = Field(
        default="model",
        description="`model`: what the model declares. `checkpoint`: what is in the file. Or one of float16, "
        "bfloat16, float32, float64 for all floating-point tensors that are on meta. Casts among these four happen "
        "on the device; any other difference is a DtypeMismatchError.",
    )
    commit: Literal["progressive", "atomic"] = Field(
        default="progressive",
        description="`progressive`: a parameter takes its tensor as soon as that is there. `atomic`: no parameter changes "
        "before everything is on the device (and verified, with prefetch.verify); then all do, in one go. Parameters "
        "that have storage are loaded beside it, which takes as much memory again, on their device.",
    )
    strict: bool = Field(
        default=True,
        description="Fail when the checkpoint lacks a tensor of the model, or has one that the model lacks. "
        "false: such names are listed in the report, as torch names them.",
    )
    ignore_missing: tuple[Pattern, ...] = Field(
        default=(),
        description="Regular expressions, searched for in names of the model: a tensor with such a name may be missing in "
        "the checkpoint, also with `strict`. What is on meta stays there.",
    )
    ignore_unexpected: tuple[Pattern, ...] = Field(
        default=(),
        description="Regular expressions, searched for in names of the checkpoint (as `rename` makes them): a tensor with "
        "such a name may be missing in the model, also with `strict`. It is not read.",
    )
    include: tuple[Pattern, ...] = Field(
        default=(),
        description="Regular expressions, searched for in names (as `rename` makes them): only tensors with such a name "
        "are loaded and read, and only they can be missing. Empty (the default): all.",
    )
    exclude: tuple[Pattern, ...] = Field(
        default=(),
        description="Regular expressions, likewise: tensors with such a name are left alone, whatever `include` says.",
    )
    rename: tuple[Rename, ...] = Field(
        default=(),
        description="Rules that make the model's names out of the checkpoint's. Each replaces all matches of its pattern "
        "in what the rules before it have made. Two tensors that get one name are an error.",
    )

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.device_map is not None and self.target != "auto":
            raise ValueError(f"device_map and target ({self.target}) cannot both be set: the map says it all")
        return self

    def with_device_map(self, entries: UserMap) -> DeviceConfig:
        """Return the same settings with a device map instead of a target.

        Raises:
            pydantic.ValidationError: a value is no device that can be loaded to.
        """
        return DeviceConfig.model_validate({**self.model_dump(), "target": "auto", "device_map": dict(entries)})
