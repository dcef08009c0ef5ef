"""What goes wrong by a user's input or in a training run, and the sentence it is reported in."""

import difflib
import json
from collections.abc import Iterable


class UsageError(Exception):
    """Bad input. The message is one line that says what, where, and what was expected.

    The command line prints it and exits with 2; nothing is written.
    """


class RunError(Exception):
    """A run that cannot go on. The message is one line; the command line exits with 1."""


class TrainingError(RunError):
    """A training run cannot go on, e.g. because its loss is no longer finite."""


def in_a_line(error: BaseException) -> str:
    """What somebody else's code raised, as one line of at most about 200 characters."""
    said = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return "; nearest match: 'x'" for the choice closest to `word`, or "" if none is close."""
    found = difflib.get_close_matches(str(word).lower(), [str(c) for c in choices], n=1, cutoff=0.5)
    return f"; nearest match: '{found[0]}'" if found else ""


def cut(text: str) -> str:
    """Text cut to a readable length, in one line."""
    text = text if text.isprintable() else json.dumps(text)[1:-1]
    return text if len(text) <= 80 else f"{text[:77]}..."
