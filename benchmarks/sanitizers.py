"""Run the tests of the sparse kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    python benchmarks/sanitizers.py [ARGUMENT OF PYTEST ...]

Builds the kernels for this run in a temporary folder; the installed module stays as it is. Needs
gcc with its libasan and libubsan. The first wrong access of memory and the first undefined
operation end the run, so the exit code is not 0.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULE = "robsparse.kernels._kernels"
NAMES = ("kernels", "kernels_properties", "norms", "pools")
TESTS = [f"tests/unit/test_{name}.py" for name in NAMES]
CHECKS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"


def build(folder: Path) -> Path:
    """Build the module with both sanitizers and return its file."""
    places = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    environment = os.environ | {"CC": "gcc", "CFLAGS": CHECKS, "LDFLAGS": CHECKS}
    command = [sys.executable, "setup.py", "-q", "build_ext", *places]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    files = [*folder.rglob("_kernels*.so")]
    if not files:
        sys.exit("sanitizers: gcc cannot build the kernels with -fsanitize=address,undefined")
    return files[0]


def run_checked(module: Path, arguments: list[str]) -> int:
    """Run this file again with the library of the sanitizer before all others."""
    found = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    environment = os.environ | {
        "LD_PRELOAD": found.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter keeps memory until it ends
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "SANITIZED": str(module),
    }
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def run_tests(module: str, arguments: list[str]) -> int:
    """Run the tests with the module of this file in the place of the installed one."""
    import pytest  # noqa: PLC0415

    spec = importlib.util.spec_from_file_location(MODULE, module)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[MODULE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[MODULE])
    return int(pytest.main(["-q", "--capture=no", "-p", "no:cacheprovider", *TESTS, *arguments]))


if __name__ == "__main__":
    if "SANITIZED" in os.environ:
        sys.exit(run_tests(os.environ["SANITIZED"], sys.argv[1:]))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run_checked(build(Path(folder)), sys.argv[1:]))
