"""A study on a real Slurm: one training is cancelled in the middle, and one is preempted.

These tests wait for Slurm, so they have a limit of time.
"""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from cluster.conftest import Slurm, wait_until

from project import ENVIRONMENT, Project

STUDY = "config/tiny.yaml"
RESULTS = Path("results", "tiny")
# The node is near and idle, so nothing has to wait long.
FAST = {
    "--latency-wait": "5",
    "--slurm-init-seconds-before-status-checks": "3",
    "--seconds-between-status-checks": "2",
}
# Python runs a file of this name at its start. Each job writes down its command and its GPU. A
# training stops after its first line until the other end of a named pipe was opened and closed.
SITE = """
import builtins, os, sys

words = sys.orig_argv
if "--cell" in words:
    method = words[words.index("--cell") + 1].split("/")[2]
    command = next(w for w in words if w in ("train", "evaluate"))
    with open("seen", "a") as seen:
        print(command, method, os.environ.get("CUDA_VISIBLE_DEVICES"), file=seen)
    held = f"held.{method}"

    def print_and_wait(*words, plain=print, **options):
        plain(*words, **options)
        if command == "train" and os.path.exists(held):
            open(held).read()

    builtins.print = print_and_wait
"""


@dataclass(frozen=True)
class Finished:
    """A finished run on Slurm: its folder, and the two jobs that were stopped (job ids)."""

    project: Project
    cancelled: str
    preempted: str

    def log(self, method: str) -> str:
        [path] = self.project.root.glob(f"{RESULTS}/logs/train/**/{method}/**/*.log")
        return path.read_text()


def shrink_study(project: Project) -> None:
    """Two methods, one seed, ten images, no slow attack."""
    study = yaml.safe_load((project.root / STUDY).read_text())
    study["grid"] |= {"methods": ["dense", "bcs"], "seeds": [0]}
    study["evaluation"] |= {"n_examples": 10, "batch_size": 10}
    study["evaluation"]["selections"] = {"best_val": ["clean", "pgd"], "last": ["clean"]}
    project.write(study)


def stop_two_trainings(slurm: Slurm, project: Project, process: subprocess.Popen) -> Finished:
    """Cancel the training of BCS and preempt that of the dense network; both are held."""
    logs = project.root / RESULTS / "logs/train/digits/small_cnn"

    def are_held() -> bool:
        lines = [one.read_text() for one in logs.rglob("*.log")]
        return len(lines) == 2 and all(lines)

    wait_until(are_held, process)
    rows = [row.split() for row in slurm.run("squeue", "-h", "-o", "%i %k").splitlines()]
    [dense] = [number for number, comment in rows if "_dense_" in comment]
    [bcs] = [number for number, comment in rows if "_bcs_" in comment]
    slurm.run("scancel", bcs)
    slurm.run("scontrol", "requeue", dense)  # as after a preemption
    for method in ("dense", "bcs"):
        held = project.root / f"held.{method}"
        with held.open("w"):  # opens when the job has opened its end
            held.unlink()
    wait_until(lambda: slurm.run("squeue", "-h", "-j", dense, "-o", "%T") == "PENDING", process)
    slurm.run("scontrol", "update", f"JobId={dense}", "StartTime=now")  # else in two minutes
    return Finished(project, bcs, dense)


@pytest.fixture(scope="module")
def finished(slurm, project_at, tmp_path_factory) -> Finished:
    """The study on Slurm, through the profile."""
    project = project_at(tmp_path_factory.mktemp("slurm") / "project")
    shrink_study(project)
    (project.root / "sitecustomize.py").write_text(SITE)
    for method in ("dense", "bcs"):
        os.mkfifo(project.root / f"held.{method}")
    options = [word for pair in FAST.items() for word in pair]
    with (project.root / "printed").open("w") as printed:
        process = subprocess.Popen(
            ["snakemake", "--profile", "profiles/slurm", "--configfile", STUDY, *options],
            cwd=project.root,
            env=os.environ | ENVIRONMENT | slurm.environment | {"PYTHONPATH": str(project.root)},
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
        try:
            found = stop_two_trainings(slurm, project, process)
            code = process.wait(timeout=1200)
        finally:
            process.kill()
            process.wait()
    assert code == 0, (project.root / "printed").read_text()
    return found


def test_every_bit_is_that_of_a_run_on_this_machine(finished, project_at, tmp_path, repository):
    local = project_at(tmp_path / "project")
    shrink_study(local)
    done = local.run("snakemake", "--cores", "2", "--configfile", STUDY)
    assert done.returncode == 0, done.stderr
    digests = (sys.executable, str(repository / "benchmarks" / "digests.py"), str(RESULTS))
    assert local.run(*digests, str(tmp_path / "local.json")).returncode == 0
    done = finished.project.run(*digests, "--against", str(tmp_path / "local.json"))
    assert done.returncode == 0, done.stdout


def test_cancelled_job_is_submitted_again_with_more_time_and_continues(finished, slurm):
    states = {job["JobId"]: job["JobState"] for job in slurm.jobs()}
    assert Counter(states.values()) == {"COMPLETED": 6, "CANCELLED": 1}
    assert states[finished.cancelled] == "CANCELLED"
    assert finished.log("bcs").startswith("resuming digits/small_cnn/bcs/")
    third = next(job for job in slurm.jobs() if job["JobId"] == "3")  # the next submission
    assert (third["TimeLimit"], third["Tres"].split(",")[1]) == ("120", "mem=4000M")


def test_preempted_job_is_started_again_by_slurm_and_continues(finished, slurm):
    runs = [job["JobState"] for job in slurm.jobs() if job["JobId"] == finished.preempted]
    assert runs == ["PENDING", "COMPLETED"]
    assert finished.log("dense").startswith("resuming digits/small_cnn/dense/")


def test_attacks_on_a_network_are_one_submission(finished, slurm):
    seen = [line.split()[:2] for line in (finished.project.root / "seen").read_text().splitlines()]
    assert Counter(map(tuple, seen)) == {
        ("train", "dense"): 2,
        ("train", "bcs"): 2,
        ("evaluate", "dense"): 2,
        ("evaluate", "bcs"): 2,
    }
    # Two trainings, one of them twice; the attacks on two networks; collect and figures.
    assert len({job["JobId"] for job in slurm.jobs()}) == 3 + 2 + 2


def test_two_jobs_at_a_time_have_two_gpus_that_the_cluster_chose(finished):
    """Slurm gives them out, so the jobs lock none; the GPUs of this machine are no limit."""
    seen = [line.split() for line in (finished.project.root / "seen").read_text().splitlines()]
    first = {method: gpu for command, method, gpu in reversed(seen) if command == "train"}
    assert {first["dense"], first["bcs"]} == {"0", "1"}
    assert {gpu for _, _, gpu in seen} <= {"0", "1"}
    assert "GPU" not in finished.log("dense") + finished.log("bcs")
