"""Does a study survive? Kills, damaged files, full disks and broken configs, with counts.

    python tests/faults/run.py --kills 60 --damaged 150 --configs 20000 --weights 200 --disks

Each part runs only if its option is given. The faults are random; `--seed` repeats them. The last
lines are a table; docs/faults.md explains its columns. The exit code is 1 if there was a traceback,
an error that does not name its file, or a result that is lost or differs.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faults import commands, configs, damage, disks, kills
from faults.results import COLUMNS, Counts


def main(argv: list[str] | None = None) -> int:
    """Run the parts that are asked for; print and return whether something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, text in {
        "kills": "kills of jobs, of snakemake and of `robsparse run`, over all methods",
        "damaged": "damaged files",
        "weights": "weight files of random bytes",
        "configs": "broken configs",
        "seed": "of the random faults",
    }.items():
        parser.add_argument(f"--{name}", type=int, default=0, metavar="N", help=text)
    parser.add_argument(
        "--methods", nargs="+", default=(), metavar="NAME", help="that are killed (default: all)"
    )
    parser.add_argument(
        "--disks", nargs="*", metavar="STAGE", help="full and read-only disks (default: all stages)"
    )
    arguments = parser.parse_args(argv)
    commands.prepare()
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        counts = _run(arguments, Path(folder))
    print(counts.table())
    return int(any(row[column] for row in counts.rows.values() for column in COLUMNS[3:]))


def _run(arguments: argparse.Namespace, folder: Path) -> Counts:
    counts = Counts()
    draw = random.Random(arguments.seed)
    parts = {name: folder / name for name in ("configs", "weights", "disks", "damaged", "kills")}
    for path in parts.values():
        path.mkdir()
    if arguments.configs:
        counts.join(configs.broken_configs(parts["configs"], arguments.configs, arguments.seed))
    if arguments.weights:
        counts.join(damage.random_weights(parts["weights"], arguments.weights, draw))
    if arguments.disks is not None:
        counts.join(disks.full_disks(parts["disks"], folder / "disk", arguments.disks))
    if arguments.damaged:
        study = damage.finished_study(parts["damaged"])
        places = parts["damaged"], folder / "scratch"
        counts.join(damage.damage_files(study, *places, arguments.damaged, draw))
    if arguments.kills:
        counts.join(kills.kill_all(parts["kills"], arguments.kills, draw, arguments.methods))
    return counts


if __name__ == "__main__":
    sys.exit(main())
