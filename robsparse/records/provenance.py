"""Versions of the code and of the libraries that computed a result."""

import functools
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import robsparse

# The packages with the code that decides a result. Each one has a separate folder.
CODE_PACKAGES = (
    "robsparse",
    "robsparse.method",
    "robsparse.baselines",
    "robsparse.eval",
    "robsparse.figures",
)


@functools.cache
def current() -> dict[str, Any]:
    """code_version, code_dirty and libraries of this process; the keys are columns of a Row."""
    commit, dirty = _git_state(_code_folders())
    return {
        "code_version": f"{robsparse.__version__}+{commit}" if commit else robsparse.__version__,
        "code_dirty": dirty,
        "libraries": libraries(),
    }


@functools.cache
def libraries() -> str:
    """Versions of the libraries that decide a result."""
    found = {
        name: importlib.metadata.version(name)
        for name in ("torch", "pyautoattack", "foolbox", "numpy", "scikit-learn")
    }
    found["python"] = platform.python_version()
    return " ".join(f"{name}={version}" for name, version in found.items())


def _code_folders() -> list[Path]:
    """The folders of CODE_PACKAGES."""
    specs = [importlib.util.find_spec(name) for name in CODE_PACKAGES]
    places = [spec.submodule_search_locations or [] for spec in specs if spec]
    return [Path(place) for folders in places for place in folders]


def _git_state(folders: list[Path]) -> tuple[str, bool]:
    """Short commit of the code in the folders, and whether it differs from that commit.

    The code differs if a tracked file was changed, or if the folders have a Python file that git
    does not track. The result is ("", False) if git does not track the code: for example, if the
    package is installed in an environment inside the repository of another project.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=folders[0], env=clean, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "-uno")
        places = [str(folder) for folder in folders]
        unknown = git("ls-files", "--others", "--", *places).splitlines()
        return commit, bool(changed) or any(name.endswith(".py") for name in unknown)
    except (OSError, subprocess.CalledProcessError):
        return "", False
