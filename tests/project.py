"""A copy of the workflow in a temporary folder, and commands that run in it."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

BIN = Path(sys.executable).parent
# Added to the environment of each command.
ENVIRONMENT = {
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Project:
    """A folder to run commands in, which is not the checkout."""

    root: Path

    def run(self, *words: str, **environment: str):
        """Run a command to its end, however long that takes; stdout and stderr are text."""
        return subprocess.run(
            words,
            cwd=self.root,
            env=os.environ | ENVIRONMENT | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def start(self, *words: str, environment: dict[str, str] | None = None, **options: Any):
        """Start a command; stdout is a pipe of lines."""
        # A background shell hands an ignored SIGINT down to its children; a terminal does not.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen(
            words,
            cwd=self.root,
            env=os.environ | ENVIRONMENT | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def write(self, data: dict[str, Any], name: str = "config/tiny.yaml") -> str:
        """Write a study file; returns its name relative to the folder."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return name

    def files(self) -> dict[str, bytes]:
        """Every file below results/, by name, locks and logs excepted."""
        return {
            str(path.relative_to(self.root)): path.read_bytes()
            for path in sorted(self.root.glob("results/**/*"))
            if path.is_file() and path.name != "lock" and "logs" not in path.parts
        }
