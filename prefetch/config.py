"""Settings of the prefetch stage: the section `prefetch` of the YAML file."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)

from weightstream.prefetch.ring import slot_bytes_for

__all__ = ["NO_BOOL", "PrefetchConfig", "Size"]


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number, and not true or false, is wanted")  # noqa: TRY004 (pydantic wants this one)
    return value


#: For every number: pydantic takes true for 1 otherwise.
NO_BOOL = BeforeValidator(_refuse_bool)

_parse_size = TypeAdapter(ByteSize).validate_python

#: A number of bytes: an integer, or a string with a unit (`512MiB`, `1GB`).
Size = Annotated[
    int,
    BeforeValidator(_parse_size),
    NO_BOOL,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": r"^\s*\d*\.?\d+\s*([kKmMgGtT]?[iI]?[bB]?)?\s*$"},
            ]
        }
    ),
]


class PrefetchConfig(BaseModel):
    """How bytes get from storage into host memory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: Annotated[int, Field(ge=1, le=256), NO_BOOL] | Literal["auto"] = Field(
        default="auto",
        description="Reads at a time, each by a thread. `auto`: as many as there are usable cores, at least 2 and at "
        "most 8, from the page cache, and on the way to an accelerator all but 2, at most 16; from storage, with scheduler.adaptive, 8 in the beginning, or 10 where they also copy "
        "what they read, and then what measuring says, up to 32.",
    )
    chunk: Size = Field(
        default=16 * 2**20,
        ge=64 * 2**10,
        le=2**30,
        description="Bytes that one slot of the ring holds, and the most that one read fetches: 64KiB to 1GiB, a multiple "
        "of 4KiB.",
    )
    host_memory: Size = Field(
        default=2**30,
        description="Ceiling, in bytes, for the host memory that a Loader stages with: its ring of slots, what "
        "`strategy: preload` holds, and the tensors that `stream()` has not delivered yet. Weights whose own place is host memory are not counted.",
    )
    io: Literal["auto", "buffered", "direct"] = Field(
        default="auto",
        description="`auto`: what is in the page cache is read from there; for the rest the first reads measure whether "
        "`buffered` (through the page cache) or `direct` (O_DIRECT, past it) is faster here. `direct`: where a file "
        "system refuses that, buffered reads are used instead and the report says so.",
    )
    page_cache: Literal["keep", "drop"] = Field(
        default="keep",
        description="What becomes of the pages that buffered reads leave in the page cache. `keep`: they stay, and the "
        "next load is faster. `drop`: those that were not there before the load go as soon as they have been read, for "
        "hosts where the cache counts against a container's memory. Not for `strategy: map`, whose tensors are there.",
    )
    retries: Annotated[int, NO_BOOL] = Field(
        default=3,
        ge=0,
        le=100,
        description="How often the read of one chunk, or the opening of one file, is repeated after EIO, ESTALE, EAGAIN "
        "or ETIMEDOUT, with pauses that grow to 2 s, before the load fails.",
    )
    stall_s: Annotated[float, Field(gt=0, le=366 * 24 * 3600, allow_inf_nan=False), NO_BOOL] | None = Field(
        default=300.0,
        description="Seconds after which a read, or an attempt to open a file, that has not returned is given up and the "
        "load fails with LoadTimeoutError. Its slot is lost until it returns; the Loader goes on working. null: never.",
    )
    variant: Annotated[str, Field(pattern=r"^\w+$")] | None = Field(
        default=None,
        description="Which of the checkpoints in a folder: `fp16` stands for model.fp16.safetensors, "
        "model.fp16.safetensors.index.json and the like. null: the one without a variant, or the only one.",
    )
    verify: Literal["none", "sha256"] = Field(
        default="none",
        description="`sha256`: hash every shard that is loaded from while it is read, and fail unless its SHA-256 is what a "
        "manifest beside the checkpoint (SHA256SUMS or *.sha256) or the name of its blob in the Hugging Face cache says; "
        "without either, fail before anything is loaded. Shards are read in the order of their bytes.",
    )
    allow_network_map: bool = Field(
        default=False,
        description="Let `strategy: map` map files on network file systems. If a page cannot be had from the server later "
        "on, the process that touches it is killed (SIGBUS).",
    )
    allow_outside_links: bool = Field(
        default=False,
        description="Accept shards that are symbolic links to somewhere outside the checkpoint's folder. Those of a snapshot "
        "in the Hugging Face cache (models--ORG--NAME/snapshots/REVISION) need no permission where they lead right into the "
        "`blobs` beside `snapshots`, or through these into the store that the cache's repositories share.",
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.chunk % 4096:
            raise ValueError(f"chunk must be a multiple of 4KiB, found {self.chunk} bytes")
        need = 2 * slot_bytes_for(self.chunk)
        if self.host_memory < need:
            raise ValueError(
                f"host_memory must hold two slots of one chunk each ({need} bytes), found {self.host_memory}"
                " bytes: raise host_memory or lower chunk"
            )
        return self
