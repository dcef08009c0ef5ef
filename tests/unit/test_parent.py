"""A job that the workflow started ends with the workflow; a command that was typed does not."""

import os
import subprocess
import sys

import pytest

from robsparse.base.parent import PARENT, end_with_parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux sends the signal")

# A job that writes its process id, asks to end with its parent, and then waits for its stdin.
JOB = """
import os, signal, sys
from robsparse.base.parent import end_with_parent
signal.signal(signal.SIGTERM, lambda *_: (print("stopped", flush=True), os._exit(75)))
end_with_parent()
print("ready", flush=True)
sys.stdin.read()
print("went on", flush=True)
"""
# A workflow that starts the job like a rule does, in a shell that the job replaces.
WORKFLOW = """
import subprocess, sys
shell = f'export {sys.argv[1]}=$PPID; exec "{sys.executable}" -c "$JOB"'
subprocess.run(["bash", "-c", shell], check=False)
"""


def start(variable):
    """The workflow as a process. Its job shares its stdin and stdout."""
    return subprocess.Popen(
        [sys.executable, "-c", WORKFLOW, variable],
        env=os.environ | {"JOB": JOB},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("variable", "last"), [(PARENT, "stopped\n"), ("OTHER", "went on\n")])
def test_job_gets_sigterm_when_its_workflow_is_killed(variable, last):
    process = start(variable)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    if variable == PARENT:
        assert process.stdout.readline() == last
        process.stdin.close()
    else:  # a typed command goes on
        process.stdin.close()
        assert process.stdout.readline() == last
    process.stdout.close()


def test_job_whose_workflow_ended_before_it_asked_ends_at_once(monkeypatch):
    monkeypatch.setenv(PARENT, str(os.getpid()))  # not the parent of this process
    monkeypatch.setattr("ctypes.CDLL", lambda _: type("", (), {"prctl": lambda *_: 0}))
    with pytest.raises(SystemExit, match="has ended"):
        end_with_parent()


def test_the_variable_is_not_handed_down(monkeypatch):
    monkeypatch.setenv(PARENT, str(os.getppid()))
    monkeypatch.setattr("ctypes.CDLL", lambda _: type("", (), {"prctl": lambda *_: 0}))
    end_with_parent()
    assert PARENT not in os.environ
