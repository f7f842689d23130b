"""The commands of `weightstream`: their options, and what becomes of their errors.

Importing this imports click and nothing heavy; each command imports what it needs when it runs.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from weightstream.complaints import DONE, EXIT_CODES, FAILED, explain, logging_to_stderr
from weightstream.shutdown import Shutdown

if TYPE_CHECKING:
    from weightstream.config import LoaderConfig
    from weightstream.scheduler.report import LoadReport
    from weightstream.warm import Destination

__all__ = ["run"]

F = TypeVar("F", bound=Callable[..., object])


@dataclass
class _Session:
    """What all commands share. `config_file`: what a configuration mistake is blamed on."""

    shutdown: Shutdown = field(default_factory=Shutdown)
    verbose: bool = False
    config_file: str | None = None


def run(args: Sequence[str], shutdown: Shutdown | None = None) -> int:
    """Run a command and return the exit code. Errors are told on standard error."""
    session = _Session(shutdown or Shutdown())
    try:
        result: object = _weightstream.main(list(args), prog_name="weightstream", standalone_mode=False, obj=session)
    except SystemExit:  # click's way to say that whoever reads our output has had enough
        return DONE
    except Exception as error:  # noqa: BLE001 - the outermost border: users get a sentence, and with -v the traceback
        return explain(error, file=session.config_file, verbose=session.verbose)
    return result if isinstance(result, int) else DONE  # click returns the code of --help and --version


def _emit(text: str) -> None:
    """Write to standard output; a reader that went away has had enough."""
    try:
        click.echo(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _verbose(command: F) -> F:
    """Add -v to a command."""

    def note(context: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's order
        context.ensure_object(_Session).verbose = value

    return click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=note,
        help="Log more to standard error, and show where an error comes from.",
    )(command)


def _timeline(command: F) -> F:
    """Add --timeline to a command, and check before anything else that such a file can be written."""

    def check(_context: click.Context, _parameter: click.Parameter, value: str | None) -> Path | None:
        if value is None:
            return None
        from weightstream.drawing import check_can_save  # noqa: PLC0415

        try:
            check_can_save(value)
        except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
            raise click.BadParameter(str(error)) from error
        return Path(value)

    return click.option(
        "--timeline",
        metavar="FILE",
        callback=check,
        help="Write what each chunk did when: .html (a page that zooms), .png, or .json (for Perfetto).",
    )(command)


#: The lines stay as they are (click's \b).
_EPILOG = "\b\nExit codes:\n" + "\n".join(
    textwrap.fill(f"{code:<4} {meaning}", 78, initial_indent="  ", subsequent_indent=" " * 7)
    for code, meaning in EXIT_CODES.items()
)


class _Commands(click.Group):
    """Lists the commands in the order in which a new user needs them, not by alphabet; all tell the exit codes."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        cmd.epilog = _EPILOG
        super().add_command(cmd, name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="weightstream", message="%(prog)s %(version)s")
def _weightstream() -> None:
    """Fill PyTorch models from checkpoints as fast as disk and bus allow."""


@_weightstream.command()
@click.option("--fresh", is_flag=True, help="Write the checkpoint anew, even if it is there from an earlier time.")
@_verbose
@click.pass_obj
def demo(session: _Session, *, fresh: bool) -> None:
    """Write a checkpoint, load it, check every byte.

    The checkpoint (0.5 GB) goes into your cache folder and stays there for the next time. It is loaded onto the
    machine's accelerator, or the CPU. Settings can be tried through the environment, for example
    WEIGHTSTREAM_DEVICE__TARGET=cpu or WEIGHTSTREAM_PREFETCH__IO=direct.
    """
    from weightstream.demo import show  # noqa: PLC0415
    from weightstream.display import make_display  # noqa: PLC0415

    display = make_display(session.shutdown, quiet=False)
    with logging_to_stderr("ERROR", verbose=session.verbose):  # the summary has what would be a warning
        session.shutdown.run(functools.partial(show, display, session.shutdown, fresh=fresh))


@_weightstream.command()
@click.argument("config", type=click.Path())
@click.option("--checkpoint", metavar="PATH", help="Load this one instead of what the file names.")
@click.option(
    "--to",
    type=click.Choice(["page-cache", "host", "device"]),
    default="device",
    show_default=True,
    help="How far: only read the files (needs no model), load onto the CPU, or onto device.target.",
)
@click.option("--hold", is_flag=True, help="Keep the process and its weights until SIGINT or SIGTERM.")
@_timeline
@click.option("--json", "as_json", is_flag=True, help="Print the report alone, as JSON, on standard output.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@_verbose
@click.pass_obj
def warm(
    session: _Session,
    config: str,
    *,
    checkpoint: str | None,
    to: Destination,
    hold: bool,
    timeline: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Load the checkpoint that CONFIG describes, a YAML file.

    It names what to load, and what builds the model: package.module:callable (the working folder is importable), or
    transformers. `weightstream schema` describes all its keys.
    """
    if hold and to == "page-cache":
        raise click.UsageError("--hold keeps weights in this process, but --to page-cache loads none.")
    settings = _read_config(session, config, checkpoint, to)
    from weightstream.display import make_display  # noqa: PLC0415
    from weightstream.warm import warm as load  # noqa: PLC0415

    def announce() -> None:
        session.shutdown.codes[signal.SIGTERM] = DONE
        click.echo(f"weightstream: holding the weights in process {os.getpid()}; Ctrl-C or SIGTERM ends it", err=True)

    work = functools.partial(
        load,
        settings,
        to,
        make_display(session.shutdown, quiet=quiet),
        timeline=timeline,
        on_report=_print_json if as_json else _print_summary,
        on_hold=announce if hold else None,
    )
    # The summary has what would be a warning.
    with logging_to_stderr("WARNING" if as_json and not quiet else "ERROR", verbose=session.verbose):
        session.shutdown.run(work)


def _read_config(session: _Session, file: str, checkpoint: str | None, to: Destination) -> LoaderConfig:
    from weightstream.config import LoaderConfig  # noqa: PLC0415

    session.config_file = file
    overrides: dict[str, Any] = {}
    if checkpoint is not None:
        overrides["checkpoint"] = checkpoint
    if to == "host":
        overrides["device"] = {"target": "cpu"}
    settings = LoaderConfig.from_yaml(file, **overrides)
    if settings.checkpoint is None:
        raise click.UsageError(f"{file} names no checkpoint: set `checkpoint` there, or pass --checkpoint.")
    if settings.model is None and to != "page-cache":
        raise click.UsageError(
            f"{file} names no model: set `model` to package.module:callable or to transformers, or pass --to page-cache."
        )
    return settings


def _print_json(report: LoadReport) -> None:
    _emit(report.to_json(indent=2))


def _print_summary(report: LoadReport) -> None:
    from weightstream.display import Output  # noqa: PLC0415
    from weightstream.summary import print_report  # noqa: PLC0415

    print_report(Output(), report)


@_weightstream.command()
@click.argument("checkpoint", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, with every tensor.")
@_verbose
@click.pass_obj
def inspect(session: _Session, checkpoint: str, *, as_json: bool) -> None:
    """Check CHECKPOINT as a load would, and show what is in it.

    A folder, an index, one .safetensors, .bin, .pt or .pth file, or org/name in the local Hugging Face cache.
    """
    from weightstream.config import LoaderConfig  # noqa: PLC0415
    from weightstream.display import Output  # noqa: PLC0415
    from weightstream.outputs import Inspection, to_json  # noqa: PLC0415
    from weightstream.scheduler.looking import look  # noqa: PLC0415
    from weightstream.summary import print_checkpoint  # noqa: PLC0415
    from weightstream.warm import in_thread  # noqa: PLC0415

    settings = LoaderConfig(checkpoint=checkpoint)  # type: ignore[arg-type]  # a string may be a pkg:// address

    async def show() -> None:
        found = await in_thread(look, settings)
        if as_json:
            await in_thread(lambda: _emit(to_json(Inspection.of(found))))
        else:
            await in_thread(print_checkpoint, Output(), found)

    session.shutdown.run(show)


@_weightstream.command()
@click.argument("checkpoint", type=click.Path())
@click.option("--write-manifest", is_flag=True, help="Write what was found to SHA256SUMS beside the checkpoint.")
@click.option("--force", is_flag=True, help="With --write-manifest: replace one that is there, and do not believe it.")
@click.option("--json", "as_json", is_flag=True, help="Print everything alone, as JSON, on standard output.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@_verbose
@click.pass_obj
def verify(session: _Session, checkpoint: str, *, write_manifest: bool, force: bool, as_json: bool, quiet: bool) -> int:
    """Hash the files of CHECKPOINT and compare their SHA-256.

    What it should be is said by a manifest beside the checkpoint (SHA256SUMS or *.sha256, as sha256sum writes them), or
    by the file's name in the Hugging Face cache. The exit code is 1 if a file is not what it should be, and also if
    nobody says what it should be, unless --write-manifest does so from now on.
    """
    if force and not write_manifest:
        raise click.UsageError("--force is for --write-manifest.")
    from weightstream import verifying  # noqa: PLC0415
    from weightstream.config import LoaderConfig  # noqa: PLC0415
    from weightstream.display import Output, make_display  # noqa: PLC0415
    from weightstream.outputs import to_json  # noqa: PLC0415
    from weightstream.warm import in_thread  # noqa: PLC0415

    settings = LoaderConfig(checkpoint=checkpoint)  # type: ignore[arg-type]  # as in inspect
    display = make_display(session.shutdown, quiet=quiet)
    codes: list[int] = []

    async def show() -> None:
        found = await verifying.verify(
            settings,
            display,
            writes_manifest=write_manifest,
            overwrites=force,
            cleanups=session.shutdown.cleanups,
        )
        codes.append(DONE if found.is_good else FAILED)
        if as_json:
            await in_thread(_emit, to_json(found.printed()))
        else:
            await in_thread(verifying.print_verdict, Output(), found)

    try:
        session.shutdown.run(show)
    except verifying.ManifestExistsError as error:
        raise click.UsageError(f"{error}: --force replaces it.") from error
    return codes[0]


@_weightstream.command()
@click.argument("checkpoint", type=click.Path())
@click.option("--device", metavar="NAME", help="Load onto this one: auto (the default), cpu, cuda, cuda:1, ...")
@click.option(
    "--runs", type=click.IntRange(1), default=3, show_default=True, help="Measure everything so often; medians count."
)
@click.option("--cold", is_flag=True, help="Measure with an empty page cache too: it is emptied of these files.")
@_timeline
@click.option("--json", "as_json", is_flag=True, help="Print everything alone, as JSON, on standard output.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@_verbose
@click.pass_obj
def bench(
    session: _Session,
    checkpoint: str,
    *,
    device: str | None,
    runs: int,
    cold: bool,
    timeline: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure what disk and bus can do, and what a load reaches.

    CHECKPOINT is what `inspect` takes. It is read many times, raw and into a
    model that is made from it, which takes host memory of twice its size. The result says what bounds the load and
    where its time goes. Settings can be tried through the environment, for example WEIGHTSTREAM_PREFETCH__WORKERS=4.
    """
    from weightstream import bench as measuring  # noqa: PLC0415
    from weightstream.config import LoaderConfig  # noqa: PLC0415
    from weightstream.display import Output, make_display  # noqa: PLC0415
    from weightstream.outputs import to_json  # noqa: PLC0415
    from weightstream.verdict import Findings, print_findings  # noqa: PLC0415

    target = {} if device is None else {"target": device}
    settings = LoaderConfig(checkpoint=checkpoint, device={**target, "dtype": "model", "strict": True})  # type: ignore[arg-type]  # as in inspect
    console = Output()

    def show(found: Findings) -> None:
        if as_json:
            _emit(to_json(found.printed()))
        else:
            print_findings(console, found)

    work = functools.partial(
        measuring.bench,
        settings,
        make_display(session.shutdown, quiet=quiet),
        num_runs=runs,
        is_cold=cold,
        timeline=timeline,
        on_plan=lambda subject: None if as_json else measuring.print_plan(console, subject),
        on_findings=show,
    )
    with logging_to_stderr("ERROR", verbose=session.verbose):  # the findings have what would be a warning
        session.shutdown.run(work)


@_weightstream.command()
@click.argument("of", type=click.Choice(["config", "report", "inspect", "verify", "bench"]), default="config")
def schema(of: str) -> None:
    """Print a JSON schema: of the YAML file, for editors, or of what a command prints with --json.

    `report` is what `warm --json` prints.
    """
    from weightstream.outputs import schema_of  # noqa: PLC0415

    _emit(json.dumps(schema_of(of), indent=2))
