"""Compares weightstream with other loaders and with what the machine can do.

Run: python -m benchmarks [compare | growth] [options]. `make bench` installs the peers first.

`compare` loads a checkpoint of many small tensors, one of few large ones, and one of transformers' own models, each in
and out of the page cache, with every loader that is installed. `growth` loads ever more tensors, and ever more bytes.
Both print tables in Markdown and save them, with every measurement as JSON and with charts as PNG; so they do after
Ctrl-C, of what was measured until then. The machine must be quiet. The checkpoints stay in `--folder` for the next time.
`python -m benchmarks.sources` is about `io: auto`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import growth, machine
from benchmarks.charts import draw_comparison, draw_growth
from benchmarks.checkpoints import LARGE, LLAMA, SMALL, Recipe, write
from benchmarks.registry import all_arms, arms_for
from benchmarks.run import Series, Setting, measure_all
from benchmarks.tables import comparison

_COLUMNS = 2560
_TENSORS = (1_000, 3_000, 10_000, 30_000, 100_000, 200_000)
_GIGABYTES = (0.25, 0.5, 1, 2, 4)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    deadline_s = time.monotonic() + options.budget_s
    device = options.device = "cuda:0" if options.device == "cuda" else options.device
    if device.startswith("cuda") and not _has_cuda():
        sys.exit(f"there is no CUDA device for --device {device}")
    prepare, finish = (_growth, _finish_growth) if options.command == "growth" else (_compare, _finish_comparison)
    try:
        series = prepare(options)
    except OSError as error:  # a full disk, most often
        sys.exit(f"a checkpoint cannot be written: {error}")
    about = machine.describe(options.folder, device)
    output: Path = options.output or machine.ROOT / "benchmarks" / "results" / machine.folder_name(about)
    output.mkdir(parents=True, exist_ok=True)

    def document() -> dict[str, Any]:
        return {"machine": about, "runs": options.runs, "series": [one.to_dict() for one in series]}

    def save() -> None:
        (output / f"{options.command}.json").write_text(json.dumps(document(), indent=1) + "\n")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` sends it
    is_interrupted = False
    try:
        measure_all(
            series,
            num_runs=options.runs,
            deadline_s=deadline_s,
            timeout_s=options.timeout_s,
            pythons=dict(pair.split("=", 1) for pair in options.python),
            save=save,
        )
    except KeyboardInterrupt:
        is_interrupted = True
    save()
    text = finish(document(), output)
    (output / f"{options.command}.md").write_text(text)
    print(text)
    print(f"saved in {output}", file=sys.stderr)
    if not any(one.results for one in series):
        sys.exit("nothing was measured")
    if is_interrupted:
        print("interrupted: not everything was measured", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--runs", type=int, default=5, help="how often each arm is measured (5)")
    common.add_argument("--device", default="cpu", help="where parameters go: cpu, cuda, cuda:1 (cpu)")
    common.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "weightstream-benchmarks")
    common.add_argument("--output", type=Path, help="where results are saved (benchmarks/results/DATE-MACHINE)")
    common.add_argument("--timeout-s", type=float, default=600, help="for one load, with all that is around it (600)")
    common.add_argument(
        "--budget-s", type=float, default=math.inf, help="begin nothing that would end later (no limit)"
    )
    common.add_argument(
        "--python",
        nargs="+",
        default=[],
        metavar="ARM=PYTHON",
        help="interpreters of arms with an environment of their own",
    )
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command")
    compare = commands.add_parser("compare", parents=[common], help="weightstream, its peers, and the ceilings")
    compare.add_argument("--caches", nargs="+", choices=["warm", "cold"], default=["warm", "cold"])
    compare.add_argument(
        "--checkpoints", nargs="+", choices=["small", "large", "llama"], default=["small", "large", "llama"]
    )
    compare.add_argument(
        "--arms", nargs="+", default=[], choices=list(all_arms()), metavar="ARM", help=f"of: {', '.join(all_arms())}"
    )
    compare.add_argument("--small-tensors", type=int, default=SMALL.count, help="of 16 KiB (46,000: 0.75 GB)")
    compare.add_argument("--large-gigabytes", type=float, default=2.56, help="in 200 tensors (2.56)")
    compare.add_argument("--llama-layers", type=int, default=LLAMA.count, help="each of 0.09 GB (12: 1.4 GB)")
    grow = commands.add_parser("growth", parents=[common], help="cost against tensors and bytes")
    grow.add_argument("--tensors", nargs="*", type=int, default=_TENSORS, help="how many, each of 4 KiB")
    grow.add_argument("--gigabytes", nargs="*", type=float, default=_GIGABYTES, help="how many, in 200 tensors each")
    parser.set_defaults(**vars(compare.parse_args([])) | {"command": "compare"})
    return parser


def _has_cuda() -> bool:
    import torch  # noqa: PLC0415 - the parent of all measurements needs no more of it

    return torch.cuda.is_available()


def _compare(options: argparse.Namespace) -> list[Series]:
    rows = max(1, round(options.large_gigabytes * 1e9 / LARGE.count / (2 * _COLUMNS)))
    chosen = {
        "small": dataclasses.replace(SMALL, count=options.small_tensors),
        "large": dataclasses.replace(LARGE, rows=rows),
        "llama": dataclasses.replace(LLAMA, count=options.llama_layers),
    }
    series: list[Series] = []
    for name in options.checkpoints:
        recipe: Recipe = chosen[name]
        path = write(recipe, options.folder)
        for cache in options.caches:
            setting = Setting(recipe, path, cache, options.device)
            arms = arms_for(recipe.family, options.device.partition(":")[0], cache, options.arms)
            series += [Series(arm, setting) for arm in arms]
    return series


def _finish_comparison(document: dict[str, Any], output: Path) -> str:
    for name in dict.fromkeys(one["checkpoint"]["name"] for one in document["series"]):
        series = [one for one in document["series"] if one["checkpoint"]["name"] == name]
        if any(one["results"] for one in series):
            draw_comparison(series, output / f"compare-{name}.png")
    return f"{comparison(document)}\n{machine.sentence(document['machine'])}\n"


def _growth(options: argparse.Namespace) -> list[Series]:
    recipes = growth.recipes(options.tensors, [round(size * 1e9) for size in options.gigabytes])
    settings = [Setting(recipe, write(recipe, options.folder), "warm", options.device) for recipe in recipes]
    return growth.series_for(settings)


def _finish_growth(document: dict[str, Any], output: Path) -> str:
    found = growth.growth_of(document["series"])
    if found:
        draw_growth(found, output / "growth.png")
    return f"{growth.growth_tables(found)}\n{machine.sentence(document['machine'])}\n"


if __name__ == "__main__":
    main()
