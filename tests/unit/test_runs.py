"""The lock of a killed run of Snakemake is removed; that of a run that may be alive is not."""

import os
import socket
import subprocess
import sys

import pytest

from robsparse.base.errors import UsageError
from robsparse.base.runs import begin_run

RUN = """
import sys
from pathlib import Path
from robsparse.base.runs import begin_run
own = begin_run(Path(sys.argv[1]))
(Path(sys.argv[1]) / "locks").mkdir(exist_ok=True)
(Path(sys.argv[1]) / "locks" / "0.output.lock").write_text("results/tiny/report.md")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path):
    """A process that has registered itself and has the lock of Snakemake."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def locks(state):
    return [path.name for path in state.glob("locks/*")]


def registered(state):
    return {path.name for path in (state / "runs").iterdir()}


def test_lock_of_a_killed_run_is_removed(other_run, tmp_path, capsys):
    other_run.kill()
    other_run.wait()
    own = begin_run(tmp_path)
    assert locks(tmp_path) == []
    assert registered(tmp_path) == {f"{socket.gethostname()}.{os.getpid()}"}
    assert "removed the lock of a run that was killed" in capsys.readouterr().err
    own.release()


def test_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "state").write_text("")
    with pytest.raises(UsageError, match="cannot write results here"):
        begin_run(tmp_path / "state")


def test_lock_of_a_live_run_is_kept(other_run, tmp_path, capsys):
    own = begin_run(tmp_path)
    assert locks(tmp_path) == ["0.output.lock"]
    message = capsys.readouterr().err
    assert f"{socket.gethostname()}.{other_run.pid}" in message
    assert message.count("\n") == 1
    own.release()


def test_lock_of_a_run_on_another_host_is_kept(other_run, tmp_path, capsys):
    """File locks of another host may not be seen on a shared file system."""
    other_run.kill()
    other_run.wait()
    name = f"{socket.gethostname()}.{other_run.pid}"
    (tmp_path / "runs" / name).rename(tmp_path / "runs" / "node7.cluster.12")
    own = begin_run(tmp_path)
    assert locks(tmp_path) == ["0.output.lock"]
    assert "node7.cluster.12" in capsys.readouterr().err
    own.release()


def test_lock_without_a_registered_run_is_kept(tmp_path):
    """Some other Snakefile may have it."""
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "0.input.lock").touch()
    begin_run(tmp_path).release()
    assert locks(tmp_path) == ["0.input.lock"]


def test_a_run_that_ended_leaves_nothing_to_the_next_but_one(tmp_path, other_run, capsys):
    (tmp_path / "locks" / "0.output.lock").unlink()  # Snakemake ended as usual
    other_run.communicate()
    own = begin_run(tmp_path)
    assert registered(tmp_path) == {f"{socket.gethostname()}.{os.getpid()}"}
    assert capsys.readouterr().err == ""
    own.release()


def test_two_runs_of_one_process_do_not_wait_for_each_other(tmp_path, other_run):
    first, second = begin_run(tmp_path), begin_run(tmp_path)
    assert locks(tmp_path) == ["0.output.lock"]
    assert len(registered(tmp_path)) == 2
    first.release()
    second.release()
