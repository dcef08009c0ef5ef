"""Study files with random errors. They are made as in tests/unit/test_broken_studies.py."""

import sys
from pathlib import Path

import yaml
from faults.commands import ROOT
from faults.results import Counts, stoppable
from hypothesis import HealthCheck, given, seed, settings

from robsparse.base.errors import UsageError
from robsparse.study import loading


def broken_configs(folder: Path, number: int, start: int) -> Counts:
    """Validate `number` broken studies. An error is plain if it is lines that each name a key."""
    sys.path.insert(0, str(ROOT / "tests" / "unit"))
    import test_broken_studies as made  # noqa: PLC0415

    counts = Counts()
    tiny = yaml.safe_load((ROOT / "config" / "tiny.yaml").read_text())
    whole = made.filled_in(made.everything(tiny, folder), folder)

    @seed(start)
    @settings(
        max_examples=number, deadline=None, database=None, suppress_health_check=[*HealthCheck]
    )
    @given(made.broken(whole).filter(made.in_one_line))
    def look(data: object) -> None:
        try:
            loading.validate(data, "study")
            counts.add("broken configs", "no effect")
        except UsageError as error:
            made.assert_plain(str(error).split("\n"), "study: ")
            counts.add("broken configs", "one line")
        except Exception as error:
            counts.add("broken configs", "traceback", repr(error))

    with stoppable():
        look()
    return counts
