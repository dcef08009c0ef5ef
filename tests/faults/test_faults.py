"""A sample of the harness, and what the harness would notice. docs/faults.md has the whole run."""

import subprocess
import sys
from pathlib import Path

import pytest
from faults.commands import Ended
from faults.results import COLUMNS, Counts, differences, leftovers

RUN = Path(__file__).with_name("run.py")


def test_sample_of_kills_damaged_files_and_random_weights(tmp_path):
    words = "--kills 3 --methods bcs --damaged 5 --weights 5"
    done = subprocess.run(
        [sys.executable, RUN, *words.split()],
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    total = done.stdout.splitlines()[-1].split("|")[2:-1]
    numbers = dict(zip(COLUMNS, map(int, total), strict=True))
    assert numbers["cases"] >= 2 + 5 + 5  # a kill may come after the end of its job
    assert numbers["one line"] >= 5
    assert not list(tmp_path.iterdir())


def ended(code=2, err="", killed=False):
    return Ended(("collect", "a.yaml"), code, "", err, 0.1, killed)


@pytest.mark.parametrize(
    ("command", "wrong", "column"),
    [
        (ended(err="robsparse: error: results/a.json: damaged\n"), [], "one line"),
        (ended(err="robsparse: error: damaged\n"), [], "unnamed"),
        (ended(err="Traceback (most recent call last):\n"), [], "traceback"),
        (ended(code=-11), [], "traceback"),
        (ended(code=75), [], "traceback"),
        (ended(code=0), [], "no effect"),
        (ended(code=0), ["last.json"], "lost or different"),
    ],
)
def test_harness_judges_a_command(command, wrong, column):
    counts = Counts()
    counts.judge("truncated", command, "a.json", wrong)
    assert counts.rows["truncated"] == {"cases": 1, column: 1}
    assert bool(counts.wrong) == (column in COLUMNS[3:])
    assert counts.table().splitlines()[-1].startswith("| **all** | 1 |")


def test_harness_sees_another_result_and_a_temporary_file(tmp_path):
    assert differences({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4"}) == ["b", "c"]
    (tmp_path / ".last.json.x1").touch()
    assert leftovers(tmp_path) == [str(tmp_path / ".last.json.x1")]
