"""Writes the page of a study: one HTML file that works offline.

Import path: robsparse.figures.page.page
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import itables.options
import jinja2
import yaml

from robsparse.figures import TABLES
from robsparse.figures.data.summary import STRONGEST, Material
from robsparse.figures.data.tidy import groups, seeds
from robsparse.figures.page import sections
from robsparse.figures.page.sections import Table
from robsparse.figures.page.vectors import inline
from robsparse.figures.plots import style
from robsparse.figures.tables import study_tables
from robsparse.figures.text.formats import SMALL, code, device, join, radius
from robsparse.figures.text.notes import table_notes

_FOLDER = Path(__file__).parent
_HEADLINE = "pareto"
# Plots by the section of the page in which they are; all other plots are in the last section.
_PLACES = {
    "results": ("robust_accuracy", "accuracy_against_eps", "corruptions", "per_class", "published"),
    "training": ("training_curves", "active_weights"),
    "cost": ("cost",),
    "images": ("pictures",),
}


@dataclass(frozen=True)
class Drawn:
    """A plot for the page: its title, the paragraphs of its caption, and its SVG.

    wide, narrow: for a screen and for a phone.
    """

    title: str
    caption: Sequence[str]
    wide: str
    narrow: str


def page(material: Material, plots: Mapping[str, Drawn]) -> str:
    """Return the page as HTML. It loads nothing from elsewhere.

    Args:
        material: the data of the study.
        plots: all plots by name.
    """
    study, results = material.study, material.tidy.results
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.j2").render(
        title=study.title,
        name=study.study,
        small=SMALL if study.small else "",
        facts={
            "Networks": ", ".join(map(str, groups(study))),
            "Threat": f"{study.threat.norm}, eps {radius(study.threat.eps)}",
            "Seeds": join(seeds(study)),
            "Test images": join(results.n_examples),
            "Device": device(results),
            "Code": code(results),
        },
        methods=sections.method_looks(material),
        findings=sections.findings(material),
        plots=_placed(plots),
        widths=style.WIDTHS,
        files=[f"tables/{Path(name).name}" for name in TABLES],
        tables=_tables(material),
        notes={str(group): table_notes(material, group) for group in groups(study)},
        reasons=sections.reasons(material),
        failures=sections.failures(material),
        networks=sections.networks(material),
        total=len(study.planned),
        marked=sections.count_marked(material),
        settings=yaml.safe_dump(study.settings(), sort_keys=False, width=90),
        strongest=study.label("attack", STRONGEST),
        css=_text("page.css"),
        script=_text("page.js"),
        library=_library(),
    )


def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _library() -> dict[str, str]:
    """DataTables as the package itables ships it: its CSS, and its module in base64."""
    module = Path(itables.options.dt_bundle)
    return {
        "css": module.with_suffix(".css").read_text(encoding="utf-8"),
        "module": b64encode(module.read_bytes()).decode("ascii"),
    }


def _placed(plots: Mapping[str, Drawn]) -> dict[str, list[dict[str, Any]]]:
    """Plots by section, each with its SVG for a page."""
    placed = {name: section for section, names in _PLACES.items() for name in names}
    placed[_HEADLINE] = "summary"
    found: dict[str, list[dict[str, Any]]] = {"summary": [], **{s: [] for s in _PLACES}, "more": []}
    for name, plot in plots.items():
        shown: dict[str, Any] = {"name": name, "title": plot.title}
        shown["caption"] = list(plot.caption)
        shown |= {size: inline(getattr(plot, size), plot.title) for size in ("wide", "narrow")}
        found[placed.get(name, "more")].append(shown)
    return found


def _tables(material: Material) -> dict[str, list[Table]]:
    """Tables by section, one for each group."""
    makers = {
        "results": ("Accuracy", sections.main_table),
        "components": ("Components of the strongest attack", study_tables.component_table),
        "comparison": ("Comparison with the baselines", study_tables.comparison_table),
        "ablations": ("Ablations", study_tables.ablation_table),
        "corruptions": ("Common corruptions", study_tables.corruptions_table),
        "cost": ("Cost of training", study_tables.cost_table),
        "checks": ("Sanity checks", study_tables.sanity_checks_table),
    }
    return {
        section: [
            made
            for group in groups(material.study)
            if (made := sections.table(material, f"{title}: {group}", make(material, group)))
        ]
        for section, (title, make) in makers.items()
    }
