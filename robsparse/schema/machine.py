"""Settings of the machine that jobs run on. Imports no torch."""

from typing import Literal

from pydantic import Field, PositiveInt

from robsparse.schema.fields import Strict

MOST_THREADS = 1024


class Machine(Strict):
    """The device, threads, memory and time that a job may use.

    device: where networks are trained and attacked; auto: on a GPU if there is one.

    These are not settings of a network or an attack, so no fingerprint contains them. But another
    device or another number of threads adds floating-point numbers in another order. Results then
    differ by rounding, and after many steps by more.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    jobs_per_gpu: PositiveInt = Field(
        1, description="jobs that share one GPU at a time, if the jobs run on this machine"
    )
    threads: PositiveInt = Field(1, le=MOST_THREADS, description="CPU threads of one job")
    memory_mb: PositiveInt = Field(
        2000, description="memory that a job requests on a cluster; more at each further attempt"
    )
    minutes: PositiveInt = Field(
        60, description="run time that a job requests on a cluster; more at each further attempt"
    )
    rerun_on_code_change: bool = Field(
        False, description="run jobs again when the code of training or attacks has changed"
    )
