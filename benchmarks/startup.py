"""How long `weightstream --help` takes, as a whole process.

Run: python -m benchmarks.startup [--runs N]. Prints a row of a Markdown table.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    command = shutil.which("weightstream", path=str(Path(sys.executable).parent))
    if command is None:
        sys.exit("weightstream is not installed beside this interpreter: make demo installs it")
    walls: list[float] = []
    for _ in range(runs + 1):
        begin = time.perf_counter()
        subprocess.run([command, "--help"], check=True, stdout=subprocess.DEVNULL)
        walls.append(time.perf_counter() - begin)
    walls = walls[1:]  # the first one reads the interpreter from the disk
    print("| command | runs | median s | min s | max s |\n|---|---|---|---|---|")
    print(f"| `weightstream --help` | {runs} | {statistics.median(walls):.3f} | {min(walls):.3f} | {max(walls):.3f} |")


if __name__ == "__main__":
    main()
