"""Settings of the device stage: the section `device` of the YAML file."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

__all__ = ["DeviceConfig", "DtypeName", "Pattern", "Rename"]

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
