"""Errors that users see, and helpers that write their messages."""

import difflib
import json
from collections.abc import Iterable


class UsageError(Exception):
    """The input is wrong.

    The message is one line. It says what is wrong, where, and what was expected. The command line
    prints it, writes nothing and exits with code 2.
    """


class RunError(Exception):
    """A run cannot continue. The message is one line; the command line exits with code 1."""


class TrainingError(RunError):
    """A training run cannot continue, e.g. because its loss is not finite."""


def one_line(error: BaseException) -> str:
    """Return the type and the message of an error in one line of about 200 characters at most."""
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def nearest_match(word: str, choices: Iterable[str]) -> str:
    """Return "; nearest match: 'x'" for the choice closest to `word`, or "" if none is close."""
    found = difflib.get_close_matches(str(word).lower(), [str(c) for c in choices], n=1, cutoff=0.5)
    return f"; nearest match: '{found[0]}'" if found else ""


def shortened(text: str) -> str:
    """Return a text in one line of at most 80 characters."""
    text = text if text.isprintable() else json.dumps(text)[1:-1]
    return text if len(text) <= 80 else f"{text[:77]}..."
