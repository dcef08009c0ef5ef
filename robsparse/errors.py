"""What goes wrong by a user's input or in a training run, and the sentence it is reported in."""

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """Bad input. The message is one line that says what, where, and what was expected.

    The command line prints it and exits with 2; nothing is written.
    """


class TrainingError(Exception):
    """A training run cannot go on, e.g. because its loss is no longer finite.

    The message is one line; the command line prints it and exits with 1.
    """


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return "; nearest match: 'x'" for the choice closest to `word`, or "" if none is close."""
    found = difflib.get_close_matches(str(word).lower(), [str(c) for c in choices], n=1, cutoff=0.5)
    return f"; nearest match: '{found[0]}'" if found else ""
