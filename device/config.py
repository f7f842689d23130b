"""Settings of the device stage: the section `device` of the YAML file."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["DeviceConfig", "DtypeName"]

#: Dtypes that a load may be asked to cast to; casts exist among these four alone.
DtypeName = Literal["float16", "bfloat16", "float32", "float64"]


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
    strict: bool = Field(
        default=True,
        description="Fail when the checkpoint lacks a tensor of the model, or has one that the model lacks. "
        "false: such names are listed in the report, as torch names them.",
    )
