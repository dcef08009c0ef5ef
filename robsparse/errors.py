"""The one error a user can cause, and the sentence it is reported in."""

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """Bad input. The message is one line that says what, where, and what was expected.

    The command line prints it and exits with 2; nothing is written.
    """


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return "; nearest match: 'x'" for the choice closest to `word`, or "" if none is close."""
    found = difflib.get_close_matches(str(word).lower(), [str(c) for c in choices], n=1, cutoff=0.5)
    return f"; nearest match: '{found[0]}'" if found else ""
