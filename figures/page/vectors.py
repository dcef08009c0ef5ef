"""SVG of plots inside a page: small curves, and plots whose colours follow the theme of the page.

Import path: robsparse.figures.page.vectors
"""

import math
import re
from collections.abc import Sequence

_LARGER = 1.35  # a plot is at most so many times larger than on paper
# Colours of the style that a dark page changes. Of the methods, only black and blue change.
THEME = {
    "#000000": "var(--ink)",
    "#ffffff": "var(--paper)",
    "#e0e0e0": "var(--grid)",
    "#595959": "var(--quiet)",
    "#0072b2": "var(--blue)",
}


def inline(svg: str, title: str) -> str:
    """Return the SVG of a plot for a page.

    Methods get the attribute data-method, by which the page shows and hides them. Identifiers that
    nothing refers to are removed, because a page has many plots. Colours follow the theme, except
    in plots with images: their letters lie on colours that no theme changes.

    Args:
        svg: a file written by matplotlib.
        title: the title of the plot, for screen readers.
    """
    text = svg[svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="method:([^"]+)"', r'<g data-method="\1"', text)
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)
    kind = "fixed" if "<image" in text else "themed"
    if kind == "themed":
        text = re.sub("|".join(THEME), lambda m: THEME[m[0]], text)
    width = re.search(r'width="([\d.]+)pt"', text)
    assert width is not None
    widest = f"max-width: {_LARGER * float(width[1]):.0f}pt"
    opening = f'<svg class="{kind}" role="img" aria-label="{title}" style="{widest}"'
    return re.sub(r"^<svg", opening, text).strip()


def points(values: Sequence[float], width: float, height: float) -> str:
    """Return the attribute `points` of a polyline through shares in [0,1]; nan is left out."""
    step = width / max(1, len(values) - 1)
    return " ".join(
        f"{step * i:.1f},{height * (1 - value):.1f}"
        for i, value in enumerate(values)
        if not math.isnan(value)
    )
