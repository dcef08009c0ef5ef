"""A job of the workflow ends with the process that started it, also if that was killed."""

import ctypes
import os
import signal
import sys

PARENT = "ROBSPARSE_PARENT"  # the rules set it to the process id of Snakemake
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def end_with_parent() -> None:
    """Ask the kernel to send SIGTERM to this process when its parent ends.

    A training then saves its state and stops. Nothing is done if the variable ROBSPARSE_PARENT is
    not set, so a command that was typed goes on when its terminal closes. Only Linux can do this.

    Raises:
        SystemExit: if the parent has already ended.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):  # it ended before the request
        sys.exit(f"robsparse: process {parent}, which started this job, has ended")
