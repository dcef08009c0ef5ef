"""A Slurm of one node on loopback, from the programs of Debian's packages slurm-wlm and munge."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from project import ENVIRONMENT
from robsparse.base.parent import PARENT

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "srun", "sbatch", "squeue", "scancel")
PATH = f"{ENVIRONMENT['PATH']}:/usr/sbin:/sbin"  # daemons are not in the PATH of a user
# Two devices that compute nothing: Slurm counts them as GPUs and sets CUDA_VISIBLE_DEVICES.
GPUS = ("/dev/null", "/dev/zero")
CORES = 4
SETTINGS = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,bf_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
MinJobAge=300
KillWait=300
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=32000 Gres=gpu:{gpus}
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A running Slurm. With `environment`, its commands find it."""

    folder: Path
    environment: dict[str, str]

    def run(self, *words: str) -> str:
        """Run a command of Slurm; return what it prints."""
        return subprocess.run(
            words, env=os.environ | self.environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    def is_idle(self) -> bool:
        try:
            return self.run("sinfo", "-h", "-o", "%T") == "idle"
        except subprocess.CalledProcessError:  # it has not started yet
            return False

    def jobs(self) -> list[dict[str, str]]:
        """The fields of each run of a job that has ended, in the order of their ends."""
        lines = (self.folder / "jobs.txt").read_text().splitlines()
        return [dict(f.split("=", 1) for f in line.split() if "=" in f) for line in lines]


def wait_until(condition: Callable[[], object], process: subprocess.Popen) -> None:
    """Wait for what Slurm or a job does. Fail if the process ends, or after 10 minutes."""
    end = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, f"{process.args}: ended with code {process.returncode}"
        assert time.monotonic() < end, "waited for 10 minutes"
        time.sleep(0.2)


def find_programs() -> None:
    """Skip the tests without ROBSPARSE_TEST_SLURM=1 (they take minutes), or if Slurm is not there.

    As root on Debian, first try to install it.
    """
    if os.environ.get("ROBSPARSE_TEST_SLURM") != "1":
        pytest.skip("a Slurm of one node is started only with ROBSPARSE_TEST_SLURM=1")
    pytest.importorskip("snakemake_executor_plugin_slurm")

    def missing() -> list[str]:
        return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]

    if missing() and os.geteuid() == 0 and shutil.which("apt-get"):
        install = ("apt-get", "install", "-y", "--no-install-recommends", *PACKAGES)
        for words in (install, ("apt-get", "update"), install):
            if missing():
                with suppress(subprocess.TimeoutExpired):  # a mirror that does not answer
                    subprocess.run(words, capture_output=True, check=False, timeout=120)
    if names := missing():
        pytest.skip(f"no Slurm here: {', '.join(names)} not found (Debian: {' '.join(PACKAGES)})")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def write_settings(folder: Path) -> None:
    """Write the key of munge, the settings of Slurm, and an srun that finds them.

    The executor plugin removes the variables of Slurm before it calls srun in a job.
    """
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    text = SETTINGS.format(
        folder=folder,
        host=host,
        user=subprocess.check_output(["id", "-un"], text=True).strip(),
        ports=free_ports(2),
        cores=CORES,
        gpus=len(GPUS),
    )
    (folder / "slurm.conf").write_text(text)
    lines = [f"NodeName={host} Name=gpu File={device}\n" for device in GPUS]
    (folder / "gres.conf").write_text("".join(lines))
    srun = folder / "bin" / "srun"
    real = shutil.which("srun", path=PATH)
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {real} "$@"\n')
    srun.chmod(0o755)


# A daemon also ends with the tests if these are killed.
START = """
import os, sys
from robsparse.base.parent import end_with_parent
end_with_parent()
os.execv(sys.argv[1], sys.argv[1:])
"""


def daemons(slurm: Slurm) -> Iterator[subprocess.Popen]:
    """Start one daemon after the other."""
    folder = slurm.folder
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "seed", "pid", "log")]
    for words in (
        ("munged", "--foreground", "--force", f"--socket={folder}/munge.sock", *munge),
        ("slurmctld", "-D"),
        ("slurmd", "-D"),
    ):
        with (folder / f"{words[0]}.out").open("w") as output:
            yield subprocess.Popen(
                [sys.executable, "-c", START, shutil.which(words[0], path=PATH), *words[1:]],
                env=os.environ | slurm.environment | {PARENT: str(os.getpid())},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C must not end it before the jobs
            )


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm with one node, a partition `main` and no accounting. It ends after the tests."""
    find_programs()
    folder = tmp_path_factory.mktemp("slurm")
    write_settings(folder)
    slurm = Slurm(folder, {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{folder}/bin:{PATH}"})
    started: list[subprocess.Popen] = []
    try:
        for process in daemons(slurm):
            started.append(process)
            if len(started) == 1:
                wait_until((folder / "munge.sock").exists, process)
        try:
            wait_until(slurm.is_idle, started[-1])
        except AssertionError as error:
            log = folder / "slurmd.log"
            last = log.read_text().splitlines()[-1:] if log.exists() else []
            pytest.skip(f"Slurm does not start here: {error} {last}")
        yield slurm
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()
