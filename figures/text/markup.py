"""Tables and notes as Markdown and LaTeX.

Import path: robsparse.figures.text.markup
"""

import re
from collections.abc import Sequence

import pandas as pd

from robsparse.figures.data.reliability import LOOK, UNRELIABLE
from robsparse.figures.text.formats import FAILED, MARKS, MISSED

# Columns with text. All other columns of a table have numbers.
_TEXT_COLUMNS = (
    "Method",
    "Baseline",
    "Variant",
    "Plain",
    "Selection",
    "Verdict",
    "Reliability",
)
# Characters that LaTeX reads as commands, and characters that some of its fonts do not have.
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "±": r"$\pm$",
        "−": r"$-$",
        MARKS[UNRELIABLE]: r"$^{\dagger}$",
        MARKS[LOOK]: r"$^{\circ}$",
        FAILED: r"\S{}",
        MISSED: r"\P{}",
    }
)


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table: text is aligned left, numbers right."""
    align = ["left" if name in _TEXT_COLUMNS else "right" for name in table]
    # Without disable_numparse tabulate would read "0.10" as a number and print 0.1.
    return str(table.to_markdown(index=False, disable_numparse=True, colalign=align))


def bullets(notes: Sequence[str]) -> str:
    """Notes as a Markdown list."""
    return "\n".join(f"- {note}" for note in notes)


def latex(
    table: pd.DataFrame, *, title: str, notes: Sequence[str], label: str, text_columns: int
) -> str:
    """A LaTeX table for the package booktabs; the title is its caption, the notes are below it.

    The first `text_columns` columns are aligned left, all others right.
    """
    styler = table.style.format(escape_latex).format_index(escape_latex, axis=1).hide(axis="index")
    text = str(
        styler.to_latex(
            hrules=True,
            position="tbp",
            position_float="centering",
            column_format="l" * text_columns + "r" * (table.shape[1] - text_columns),
            caption=escape_latex(title),
            label=f"tab:{label}",
        )
    )
    below = rf"\par\smallskip{{\footnotesize {escape_latex(' '.join(notes))}\par}}"
    return text.replace(r"\end{tabular}", "\\end{tabular}\n" + below)


def escape_latex(text: str) -> str:
    """Text for LaTeX: special characters and marks are escaped, ** becomes bold."""
    return re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text.translate(_LATEX))
