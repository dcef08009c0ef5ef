"""Makes tables, plots and the report of a study from its collected tables, without torch."""

from robsparse.study.study import Study

# The workflow declares these files; `robsparse figures` writes them under results/<study>.
TABLES = tuple(
    f"tables/{name}"
    for name in (
        "main.md",
        "main.tex",
        "main_notes.tex",
        "main.csv",
        "per_class.csv",
        "disagreements.csv",
    )
)
# Each plot for the screen, for a column and a page of a paper, and its caption.
SUFFIXES = (".png", "-column.pdf", "-page.pdf", ".caption.md")
PLOTS = tuple(
    f"plots/{name}{suffix}"
    for name in (
        "pareto",
        "robust_accuracy",
        "cost",
        "training_curves",
        "active_weights",
        "layer_density",
        "density_over_training",
        "rewiring",
        "survival",
        "weight_magnitudes",
        "overlap",
        "per_class",
        "pictures",
    )
    for suffix in SUFFIXES
)
REPORT = "report.md"
PAGE = "report.html"


def tables_of(study: Study) -> tuple[str, ...]:
    """Return the file names of all tables of a study, including the tables of papers."""
    papers = (f"tables/{t.name}.{suffix}" for t in study.tables for suffix in ("md", "tex", "csv"))
    return (*TABLES, *papers)


def measures_distances(study: Study) -> list[str]:
    """Return the attacks of the first selection that measure the smallest perturbation."""
    names = next(iter(study.evaluation.selections.values()))
    return [n for n in names if study.entry("attack", n).literals.get("GIVES_DISTANCES")]


def plots_of(study: Study) -> tuple[str, ...]:
    """Return the names of all plots of a study.

    The plot of published numbers needs a table that names their files. The plot of accuracy against
    eps needs an attack of the first selection that measures the smallest perturbation. The plot of
    corruptions needs `evaluation.corruptions`.
    """
    further = {
        "published": any(table.published for table in study.tables),
        "accuracy_against_eps": bool(measures_distances(study)),
        "corruptions": study.evaluation.corruptions is not None,
    }
    names = [name for name, wanted in further.items() if wanted]
    return (*PLOTS, *(f"plots/{name}{suffix}" for name in names for suffix in SUFFIXES))
