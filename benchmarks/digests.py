"""Digests of what a study has produced: shows that a change of the code moved no number.

    python benchmarks/digests.py results/tiny before.json              write the digests
    python benchmarks/digests.py results/tiny --against before.json    compare with them

One digest for each tensor file, each array of outcomes, and each column of a table (CSV or
parquet), so that a renamed column shows up as one that is gone and one that is new. Left out are
the columns of VARY, which differ from run to run. The exit code is 1 if a digest differs or is
gone.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import safe_open

VARY = {"train_seconds", "attack_seconds", "seconds", "peak_memory_mb", "latency_ms"}


def digests(study: Path) -> dict[str, str]:
    """Name -> digest of everything in the folder of a study that a number is read from."""
    return {name: hashlib.sha256(data).hexdigest()[:16] for name, data in _contents(study)}


def _contents(study: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(study.rglob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            arrays = {key: file.get_tensor(key) for key in sorted(file.keys())}
        yield _name(study, path), b"".join(k.encode() + _plain(v) for k, v in arrays.items())
    for path in sorted(study.rglob("*.npz")):
        with np.load(path) as file:
            for key in sorted(file.files):
                yield _name(study, path, key), _plain(file[key])
    for path in sorted([*study.rglob("*.csv"), *study.rglob("*.parquet")]):
        csv = path.suffix == ".csv"
        table = pd.read_csv(path, dtype=str) if csv else pd.read_parquet(path)
        for column in table.columns:
            if column not in VARY:
                yield (
                    _name(study, path, column),
                    table[column].to_csv(index=False, header=False).encode(),
                )


def _name(study: Path, path: Path, part: str = "") -> str:
    return f"{path.relative_to(study).as_posix()} {part}".strip()


def _plain(array: np.ndarray) -> bytes:
    """The bytes of an array; 0 and -0 are the same number."""
    number = np.issubdtype(array.dtype, np.number)
    return np.ascontiguousarray(array + array.dtype.type(0) if number else array).tobytes()


def differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """A line for each digest that differs or is gone; of a renamed column, the new name."""
    fresh = {value: name for name, value in now.items() if name not in before}
    found = []
    for name, value in before.items():
        if name not in now:
            also = f" (same content: {fresh[value]})" if value in fresh else ""
            found.append(f"gone: {name}{also}")
        elif now[name] != value:
            found.append(f"differs: {name}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Write or compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", type=Path, help="folder of a study, e.g. results/tiny")
    parser.add_argument("out", type=Path, nargs="?", help="JSON file to write")
    parser.add_argument("--against", type=Path, help="JSON file of an earlier call")
    arguments = parser.parse_args(argv)
    now = digests(arguments.study)
    if not now:
        parser.error(f"{arguments.study}: there is no result of a study in this folder")
    if arguments.out:
        arguments.out.write_text(json.dumps(now, indent=1), encoding="utf-8")
    found = []
    if arguments.against:
        found = differences(json.loads(arguments.against.read_text(encoding="utf-8")), now)
    print("\n".join([*found, f"{len(now)} digests, {len(found)} differ or are gone"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
