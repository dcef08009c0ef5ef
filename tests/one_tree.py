"""Run a tool on the package as one tree of files: python tests/one_tree.py COMMAND [ARGUMENT ...]

`method/`, `baselines/`, `eval/` and `figures/` are sub-packages of robsparse by a map in
pyproject.toml. The type checker and the import linter do not read that map. This file copies every
folder to its place in a temporary tree and runs the command there.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def package_folders(root: Path = ROOT) -> dict[str, str]:
    """Folder of each mapped package, for example {"robsparse.method": "method"}."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    return settings["tool"]["setuptools"]["package-dir"]


def build(tree: Path, root: Path = ROOT) -> None:
    """Copy the package and the settings of its tools to the empty folder `tree`."""
    for package, folder in sorted(package_folders(root).items()):
        shutil.copytree(
            root / folder,
            tree / package.replace(".", "/"),
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shutil.copy(root / "pyproject.toml", tree)


def run(command: list[str]) -> tuple[int, str]:
    """Run a command in such a tree.

    Returns:
        Its exit code, and what it printed with the names of files as they are in the checkout.
    """
    with tempfile.TemporaryDirectory() as tree:
        build(Path(tree))
        environment = os.environ | {"PYTHONPATH": tree, "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache")}
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, check=False
        )
    printed = done.stdout + done.stderr
    for package, folder in package_folders().items():
        printed = printed.replace(f"{package.replace('.', '/')}/", f"{folder}/")
    return done.returncode, printed


if __name__ == "__main__":
    code, printed = run(sys.argv[1:])
    print(printed, end="")
    sys.exit(code)
