"""Measures the commands on studies of 500 to 10,000 networks with invented records.

    python benchmarks/scale.py FOLDER --cells 500 2000 10000 --write docs/scale.md

FOLDER gets the studies (about 0.12 MB for each network) and is not part of the repository. A study
that is already there is used again. The table has processor seconds beside wall seconds, because
other programs may run at the same time. Numbers in docs/scale.md are between its two markers; the
text around them is written by hand.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import synthetic_study
import yaml

from robsparse.study import loading

ROOT = Path(__file__).resolve().parent.parent
MARKERS = "<!-- measured -->", "<!-- end -->"
# Seconds of a job until training begins, without the imports, which are the same for every study.
JOB = """
import argparse, sys, time
from pathlib import Path
from robsparse.cli.arguments import load_cell
from robsparse.study import fingerprints
began = time.process_time()
found = load_cell(argparse.Namespace(config=sys.argv[1], cell=sys.argv[2], results=Path("results")))
fingerprints.training(found[0], found[2]).plan
fingerprints.evaluation(found[0], found[2], "best_val").plan
print(time.process_time() - began)
"""
COMMANDS = ("check", "job", "plan", "collect", "figures")


@dataclass(frozen=True)
class Measured:
    """What one command took on one study: seconds, and its largest memory in MB."""

    command: str
    networks: int
    processor: float
    wall: float
    megabytes: float


def run(command: Sequence[str], folder: Path) -> tuple[float, float, float, str]:
    """Run a command; return processor seconds, wall seconds, MB and its output.

    Raises:
        RuntimeError: if the command fails.
    """
    began = time.perf_counter()
    with (folder / "output.txt").open("w+b") as output:
        started = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(started.pid, 0)
    wall = time.perf_counter() - began
    text = (folder / "output.txt").read_text(errors="replace")
    if status:
        raise RuntimeError(f"{' '.join(map(str, command))}: {text[-2000:]}")
    return used.ru_utime + used.ru_stime, wall, used.ru_maxrss / 1024, text


def measure(command: str, folder: Path) -> Measured:
    """Run a command on the study of a folder and measure it."""
    config, tools = folder / "study.yaml", Path(sys.executable).parent
    study = loading.load(config, whole=command != "job")
    networks = len(loading.load(config).cells())
    words: dict[str, list[str]] = {
        "plan": [
            *(str(tools / "snakemake"), "-n", "-q", "--cores", "2"),
            *("-s", str(ROOT / "Snakefile"), "--configfile", "study.yaml"),
        ],
    }
    if command == "job":
        key = next(iter(study.planned)).key
        found = run([sys.executable, "-c", JOB, "study.yaml", key], folder)
        return Measured(command, networks, float(found[3].split()[-1]), found[1], found[2])
    default = [str(tools / "robsparse"), command, "study.yaml"]
    return Measured(command, networks, *run(words.get(command, default), folder)[:3])


def prepare(root: Path, size: int, records: bool) -> Path:
    """Return the folder of a study of about `size` networks; write what is missing."""
    folder = root / str(size)
    config = synthetic_study.write_config(folder, size)
    done = folder / "results" / yaml.safe_load(config.read_text())["study"] / "complete"
    if records and not done.exists():
        synthetic_study.write_records(config, folder / "results")
        done.touch()
    return folder


def as_table(rows: list[Measured]) -> str:
    """The measurements as Markdown."""
    lines = [
        "| command | networks | processor seconds | wall seconds | memory (MB) |",
        "|---|---:|---:|---:|---:|",
    ]
    names = {"plan": "snakemake -n", "job": "start of one job, after its imports"}
    for row in sorted(rows, key=lambda row: (COMMANDS.index(row.command), row.networks)):
        name = names.get(row.command, f"robsparse {row.command}")
        lines.append(
            f"| {name} | {row.networks:,} | {row.processor:.2f} | {row.wall:.1f} | "
            f"{row.megabytes:,.0f} |"
        )
    return "\n".join(lines)


def write(path: Path, table: str) -> None:
    """Replace the table between the markers of a page."""
    before, rest = path.read_text().split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    path.write_text(f"{before}{MARKERS[0]}\n\n{table}\n\n{MARKERS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, nargs="+", default=[*synthetic_study.SHAPES])
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--write", type=Path, help="page that gets the table")
    arguments = parser.parse_args()
    needed = {"collect", "figures"} & set(arguments.only)
    rows = []
    for size in arguments.cells:
        folder = prepare(arguments.folder.resolve(), size, bool(needed))
        for command in arguments.only:
            rows.append(measure(command, folder))
            print(rows[-1], flush=True)
    table = as_table(rows)
    print(table)
    if arguments.write:
        write(arguments.write, table)


if __name__ == "__main__":
    main()
