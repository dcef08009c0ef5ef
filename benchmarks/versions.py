"""Tests the package with other versions of Python and of the libraries.

    python benchmarks/versions.py --python python3.11 python3.13 --libraries oldest newest

`oldest` are the oldest versions that pyproject.toml allows for the libraries that it names,
`newest` the newest versions that are available, and `tested` those of constraints.txt. For each
combination uv makes an environment in a temporary folder, installs the last commit there and runs
some tests: training, attacks, the kernels, the export, a workflow from a config to its figures.
With a CUDA build of torch, an environment takes about 6 GB. At the end the script prints a table.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {
    "oldest": ("--resolution", "lowest-direct"),
    "newest": ("--upgrade",),
    "tested": ("--constraint", "constraints.txt"),
}
TOOLS = ("pytest>=8", "hypothesis>=6.100")  # of the extra `dev`, whose other tools are not needed
TESTS = (
    *(f"tests/unit/test_{name}.py" for name in ("bcs", "datasets", "evaluation", "execution")),
    *(f"tests/unit/test_{name}.py" for name in ("export", "history", "kernels", "optimizer")),
    *(f"tests/unit/test_{name}.py" for name in ("collection", "config", "rows", "statistics")),
    "tests/workflow/test_elsewhere.py",
)
SHOWN = ("torch", "torchvision", "numpy", "scipy", "pandas", "pyarrow", "scikit-learn")
SHOWN += ("matplotlib", "pydantic", "snakemake", "onnx", "onnxruntime")


def main() -> int:
    arguments = _parser().parse_args()
    rows = []
    for python in arguments.python:
        for libraries in arguments.libraries:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
                rows.append(_row(Path(scratch), python, libraries, arguments.tests))
                print(rows[-1], flush=True)
    columns = ("Python", "libraries", "result", "minutes", "date", "versions")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return int(any("passed" not in row[2] or "failed" in row[2] for row in rows))


def _row(scratch: Path, python: str, libraries: str, tests: list[str]) -> tuple[str, ...]:
    """Make one environment and run the tests in it; return a row of the table."""
    tree, start = scratch / "tree", time.monotonic()
    _copy_commit(tree)
    executable = scratch / "env" / "bin" / "python"
    words = ("uv", "pip", "install", "--python", str(executable), *LIBRARIES[libraries])
    for command in (
        ("uv", "venv", "--quiet", "--python", python, str(scratch / "env")),
        (*words, "--quiet", "--editable", ".[robustbench,onnx]", *TOOLS),
    ):
        done = _run(command, tree)
        if done.returncode:
            text = " ".join(done.stderr.split())[:300]
            return python, libraries, f"not installed: {text}", *_when(start), ""
    version, shown = json.loads(_run((str(executable), "-c", _PRINT, *SHOWN), tree).stdout)
    done = _run((str(executable), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests), tree)
    lines = done.stdout.splitlines()
    print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR"))))
    result = lines[-1].strip("= ") if lines else done.stderr[-300:]
    return version, libraries, result.partition(" in ")[0], *_when(start), shown


_PRINT = """
import json, platform, sys
from importlib.metadata import version
shown = ", ".join(f"{name} {version(name)}" for name in sys.argv[1:])
print(json.dumps([platform.python_version(), shown]))
"""


def _when(start: float) -> tuple[str, str]:
    """The minutes since the start, and the date."""
    return f"{(time.monotonic() - start) / 60:.0f}", datetime.date.today().isoformat()


def _copy_commit(tree: Path) -> None:
    archive = tree.with_suffix(".tar")
    subprocess.run(["git", "archive", "--output", archive, "HEAD"], cwd=ROOT, check=True)
    with tarfile.open(archive) as stored:
        stored.extractall(tree, filter="data")


def _run(words: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="PYTHON")
    parser.add_argument("--libraries", nargs="+", default=["oldest", "newest"], choices=LIBRARIES)
    parser.add_argument("--folder", type=Path, help="place of the temporary folders")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
