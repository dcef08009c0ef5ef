"""Names that may stand in a path and in a command as they are."""

import re

LONGEST_NAME = 64
NAME = "[A-Za-z0-9][A-Za-z0-9_-]*"


def is_name(text: str) -> bool:
    """Whether a text may be part of a path and of a command as it is.

    It is of letters, digits, - and _, starts with a letter or digit and is not longer than
    LONGEST_NAME.
    """
    return len(text) <= LONGEST_NAME and re.fullmatch(NAME, text) is not None
