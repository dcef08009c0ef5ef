"""Tests of how jobs share the GPUs of a machine, with names of GPUs that need not exist."""

import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from contextlib import ExitStack

import pytest

from robsparse.base import gpus
from robsparse.cli.arguments import reserved_gpu


@pytest.fixture(autouse=True)
def own_locks(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv(gpus.VISIBLE, raising=False)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """driver(uuids): the tool of the NVIDIA driver reports these GPUs."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)

    def report(uuids):
        tool.write_text("#!/bin/sh\n" + "".join(f"echo {uuid}\n" for uuid in uuids))
        tool.chmod(0o755)

    report([])
    return report


def locks(folder):
    return [path.name for path in folder.glob("robsparse-gpus-*/*")]


@pytest.mark.parametrize(
    ("named", "names"),
    [
        ("0", ["0"]),
        ("2, 0", ["2", "0"]),
        ("GPU-1a,MIG-2b", ["GPU-1a", "MIG-2b"]),
        ("", []),
        ("-1", []),
        ("0,-1,1", ["0"]),  # CUDA reads the list up to the first wrong number
    ],
)
def test_visible_gpus_are_those_of_the_environment_variable(named, names, monkeypatch, driver):
    driver(["GPU-a", "GPU-b", "GPU-c"])
    monkeypatch.setenv(gpus.VISIBLE, named)
    assert gpus.visible() == names


def test_without_the_variable_all_gpus_of_the_driver_are_visible(driver):
    driver(["GPU-a", "GPU-b"])
    assert gpus.visible() == ["0", "1"]


@pytest.mark.parametrize("tool", [None, "#!/bin/sh\nexit 9\n"])
def test_without_a_driver_there_is_no_gpu_and_no_lock(tool, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    if tool:  # installed, but it finds no driver
        (tmp_path / "nvidia-smi").write_text(tool)
        (tmp_path / "nvidia-smi").chmod(0o755)
    with gpus.one_reserved(1):
        assert gpus.VISIBLE not in os.environ
    assert locks(tmp_path) == []


def test_a_single_named_gpu_is_left_alone(monkeypatch, tmp_path):
    """A cluster or the user has chosen it; two jobs may use it at the same time."""
    monkeypatch.setenv(gpus.VISIBLE, "3")
    with gpus.one_reserved(1), gpus.one_reserved(1):
        assert os.environ[gpus.VISIBLE] == "3"
    assert locks(tmp_path) == []


def test_a_single_gpu_that_nobody_named_is_locked(driver, tmp_path):
    driver(["GPU-a"])
    with gpus.one_reserved(1):
        assert os.environ[gpus.VISIBLE] == "0"
        assert locks(tmp_path) == ["GPU-a.0.lock"]
    assert gpus.VISIBLE not in os.environ


def taken(monkeypatch, jobs, jobs_per_gpu, named):
    """The GPUs of jobs that run at the same time."""
    with ExitStack() as stack:
        found = []
        for _ in range(jobs):
            monkeypatch.setenv(gpus.VISIBLE, named)
            stack.enter_context(gpus.one_reserved(jobs_per_gpu))
            found.append(os.environ[gpus.VISIBLE])
    assert os.environ[gpus.VISIBLE] == named
    return found


@pytest.mark.parametrize(
    ("jobs", "jobs_per_gpu", "expected"),
    [(3, 1, ["5", "6", "7"]), (5, 2, ["5", "6", "7", "5", "6"]), (2, 3, ["5", "6"])],
)
def test_jobs_are_spread_over_the_gpus_before_they_share(
    jobs, jobs_per_gpu, expected, monkeypatch, driver
):
    assert taken(monkeypatch, jobs, jobs_per_gpu, "5,6,7") == expected
    assert taken(monkeypatch, jobs, jobs_per_gpu, "5,6,7") == expected  # they were given back


def test_same_numbers_of_two_containers_are_two_gpus(driver, monkeypatch):
    """In a container the numbers begin with 0; the UUID tells which GPU is meant."""
    found = []
    with ExitStack() as stack:
        for uuids in (["GPU-a", "GPU-b"], ["GPU-c", "GPU-d"], ["GPU-a", "GPU-b"]):
            driver(uuids)
            monkeypatch.delenv(gpus.VISIBLE, raising=False)
            stack.enter_context(gpus.one_reserved(1))
            found.append(uuids[int(os.environ[gpus.VISIBLE])])
    assert found == ["GPU-a", "GPU-c", "GPU-b"]


JOB = """
import os, sys
from robsparse.base import gpus
with gpus.one_reserved(1):
    print("has", os.environ[gpus.VISIBLE], flush=True)
    sys.stdin.read()
"""


def test_a_job_waits_for_a_gpu_and_takes_that_of_a_killed_job():
    def job():
        return subprocess.Popen(
            [sys.executable, "-c", JOB],
            env=os.environ | {gpus.VISIBLE: "0,1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    first, second = job(), job()
    lines = [[process.stdout.readline() for _ in range(2)] for process in (first, second)]
    has = {line[1]: process for line, process in zip(lines, (first, second), strict=True)}
    assert set(has) == {"has 0\n", "has 1\n"}
    third = job()
    assert third.stdout.readline().startswith("waiting for a free GPU (of 2, ")
    has["has 1\n"].kill()
    assert third.stdout.readline() == "GPU 1 of 0, 1\n"
    assert third.stdout.readline() == "has 1\n"
    for process in (first, second, third):
        process.communicate()


@pytest.mark.parametrize(
    ("option", "setting", "reserved"),
    [
        (None, "auto", True),
        (None, "cuda", True),
        (None, "cpu", False),
        ("cpu", "cuda", False),
        ("cuda", "cpu", True),
    ],
)
def test_a_command_on_the_cpu_takes_no_gpu(option, setting, reserved, monkeypatch):
    monkeypatch.setenv(gpus.VISIBLE, "0,1")
    machine = Namespace(device=setting, jobs_per_gpu=1)
    with reserved_gpu(Namespace(device=option), Namespace(machine=machine)):
        assert os.environ[gpus.VISIBLE] == ("0" if reserved else "0,1")
