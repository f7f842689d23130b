"""`weightstream verify`: hash the files of a checkpoint, compare the digests, write a manifest. Imports no torch."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import anyio
from rich.console import Console

from weightstream.config import LoaderConfig
from weightstream.display import Display, format_bytes, format_rate
from weightstream.errors import shown
from weightstream.hashing import Hashing, Work
from weightstream.outputs import Verification, VerifiedShard
from weightstream.prefetch.digests import MANIFEST_NAME, Digest, unfinished_manifest, write_manifest
from weightstream.summary import print_facts, print_table, print_title
from weightstream.warm import in_thread

__all__ = ["ManifestExistsError", "ShardFinding", "Verdict", "print_verdict", "verify"]


class ManifestExistsError(Exception):
    """Raised when a manifest is to be written where one is."""


@dataclass(frozen=True, slots=True)
class ShardFinding:
    """What was found out about one file. `expected`: None if nobody says what it should be."""

    name: str
    num_bytes: int
    sha256: str
    expected: Digest | None

    @property
    def status(self) -> Literal["ok", "wrong", "unknown"]:
        if self.expected is None:
            return "unknown"
        return "ok" if self.expected.sha256 == self.sha256 else "wrong"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found out about a checkpoint. `manifest`: what was written."""

    checkpoint: str
    shards: tuple[ShardFinding, ...]
    wall_s: float
    num_retries: int
    manifest: Path | None

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def is_good(self) -> bool:
        """Whether every file is what it should be; one of which nobody knows that only if a manifest was written."""
        return all(shard.status == "ok" or (shard.status == "unknown" and self.manifest) for shard in self.shards)

    def printed(self) -> Verification:
        """Return it as `--json` prints it."""
        return Verification(
            checkpoint=self.checkpoint,
            ok=self.is_good,
            num_shards=len(self.shards),
            num_bytes=self.num_bytes,
            wall_s=self.wall_s,
            num_retries=self.num_retries,
            manifest=None if self.manifest is None else str(self.manifest),
            shards=tuple(
                VerifiedShard(
                    shard.name, shard.num_bytes, shard.status, shard.sha256, *(shard.expected or (None, None))
                )
                for shard in self.shards
            ),
        )


def print_verdict(console: Console, found: Verdict) -> None:
    """Print what was found out, for people."""
    rate = format_rate(found.num_bytes / found.wall_s)
    num_good = sum(shard.status == "ok" for shard in found.shards)
    num_new = 0 if found.manifest is None else sum(shard.status == "unknown" for shard in found.shards)
    print_title(
        console,
        f"{format_bytes(found.num_bytes)} hashed in {found.wall_s:.2f} s, {rate}: "
        f"{num_good} of {len(found.shards)} files are what they should be"
        + (f", and {num_new} are in the manifest from now on" if num_new else ""),
    )
    facts = [("checkpoint", found.checkpoint)]
    if found.num_retries:
        facts.append(("retries", str(found.num_retries)))
    if found.manifest is not None:
        facts.append(("written", str(found.manifest)))
    print_facts(console, facts)
    rows = [
        (shown(shard.name), format_bytes(shard.num_bytes), _says(shard.expected), shard.status.upper())
        for shard in found.shards
    ]
    print_table(console, "Files", rows)
    for shard in found.shards:
        if shard.status == "wrong" and shard.expected is not None:
            print_table(console, shown(shard.name), [("expected", shard.expected.sha256), ("found", shard.sha256)])
    if found.manifest is None and any(shard.status == "unknown" for shard in found.shards):
        print_facts(console, [("unknown", "nobody says what it should be; --write-manifest says so from now on")])


def _says(expected: Digest | None) -> str:
    return "" if expected is None else f"says the {expected.source}"


#: How long the removal of an unfinished manifest is waited for, in seconds: a file system that hangs holds nobody up.
_REMOVAL_S = 0.1


async def verify(
    config: LoaderConfig,
    display: Display,
    *,
    writes_manifest: bool,
    overwrites: bool,
    cleanups: list[Callable[[], None]],
) -> Verdict:
    """Hash every file of the checkpoint that the configuration names, several at a time.

    Args:
        config: names it; `scheduler.timeout_s`, and `stall_s`, `retries`, `variant` and `allow_outside_links` of
            `prefetch`, are used.
        display: shows progress.
        writes_manifest: write what was found beside the checkpoint, unless a file is not what it should be.
        overwrites: whether a manifest that is there is replaced, and not believed.
        cleanups: called if the process ends before this returns; see `Shutdown`.

    Raises:
        ManifestExistsError: there is a manifest already; nothing has been read.
        WeightstreamError: the checkpoint is not one, or cannot be read, or changed meanwhile, or took too long.
        OSError: the manifest cannot be written.
    """
    work = Work(config)
    try:
        return await _verify(work, display, writes_manifest=writes_manifest, overwrites=overwrites, cleanups=cleanups)
    finally:
        with anyio.CancelScope(shield=True):
            await in_thread(work.close)


async def _verify(
    work: Work, display: Display, *, writes_manifest: bool, overwrites: bool, cleanups: list[Callable[[], None]]
) -> Verdict:
    with display.step("checking the checkpoint"):
        checkpoint = await in_thread(work.open)
    manifest = checkpoint.folder / MANIFEST_NAME
    if writes_manifest and not overwrites and await in_thread(work.call, manifest.exists):
        raise ManifestExistsError(f"{manifest} exists")
    expected = await in_thread(work.digests, checkpoint, MANIFEST_NAME if writes_manifest else None)
    with display.meters(("hashed",)) as update:
        await Hashing(checkpoint, work).run(update)
    await in_thread(work.call, checkpoint.check_unchanged)
    shards = tuple(
        ShardFinding(str(shard.path.relative_to(checkpoint.folder)), shard.num_bytes, begun.hexdigest(), digest)
        for shard, begun, digest in zip(checkpoint.shards, checkpoint.hashes, expected, strict=True)
    )
    written: Path | None = None
    if writes_manifest and all(shard.status != "wrong" for shard in shards):
        lines = [(shard.name, shard.sha256) for shard in shards]
        temporary = unfinished_manifest(checkpoint.folder)
        cleanups.append(functools.partial(_remove, temporary))
        write = functools.partial(write_manifest, checkpoint.folder, lines, overwrite=overwrites, temporary=temporary)
        written = await in_thread(lambda: work.call(write))
    return Verdict(str(checkpoint.path), shards, time.monotonic() - work.began_s, work.num_retries, written)


def _remove(file: Path) -> None:
    """Remove a file, if it is there and its file system answers."""
    removal = threading.Thread(target=file.unlink, kwargs={"missing_ok": True}, daemon=True)
    removal.start()
    removal.join(_REMOVAL_S)
