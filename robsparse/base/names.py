"""Names that can be part of a path and of a shell command without quotes."""

import re

LONGEST_NAME = 64
NAME = "[A-Za-z0-9][A-Za-z0-9_-]*"


def is_name(text: str) -> bool:
    """Return whether a text can be part of a path and of a shell command without quotes.

    Such a text has at most LONGEST_NAME letters, digits, - and _, and starts with a letter or a
    digit.
    """
    return len(text) <= LONGEST_NAME and re.fullmatch(NAME, text) is not None
