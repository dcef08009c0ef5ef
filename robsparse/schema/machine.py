"""Where jobs run. No torch in here."""

from typing import Literal

from pydantic import Field, PositiveInt

from robsparse.schema.fields import Strict

MOST_THREADS = 1024


class Machine(Strict):
    """Where jobs run, and what they may use.

    None of it is a setting of a network or an attack, and it belongs to no fingerprint's settings.
    But other devices, and another number of threads, add floating-point numbers in another order:
    results then differ by rounding, and after many steps by more.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt = Field(1, le=MOST_THREADS, description="CPU threads of one job")
    memory_mb: PositiveInt = Field(2000, description="memory that a job asks a cluster for")
    minutes: PositiveInt = Field(60, description="run time that a job asks a cluster for")
    rerun_on_code_change: bool = Field(
        False, description="let a change of the code that trains or attacks start jobs again"
    )
