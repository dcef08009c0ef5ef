"""Tables, plots and report of a study, made from the collected tables. No torch in here."""

from robsparse.study.study import Study

# What `robsparse figures` writes under results/<study>, for the workflow to declare.
TABLES = tuple(
    f"tables/{name}"
    for name in ("main.md", "main.tex", "main.csv", "per_class.csv", "disagreements.csv")
)
PLOTS = tuple(
    f"plots/{name}.{suffix}"
    for name in (
        "robust_accuracy",
        "cost",
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
    for suffix in ("png", "pdf")
)
REPORT = "report.md"


def tables_of(study: Study) -> tuple[str, ...]:
    """All tables of a study, those of papers included."""
    papers = (f"tables/{t.name}.{suffix}" for t in study.tables for suffix in ("md", "tex", "csv"))
    return (*TABLES, *papers)


def measures_distances(study: Study) -> list[str]:
    """Attacks of the first selection that measure the smallest perturbation."""
    names = next(iter(study.evaluation.selections.values()))
    return [n for n in names if study.entry("attack", n).literals.get("GIVES_DISTANCES")]


def plots_of(study: Study) -> tuple[str, ...]:
    """All plots of a study; some are drawn only where it has what they show.

    Published numbers: where a table names their files. Accuracy against eps: where an attack of the
    first selection measures the smallest perturbation.
    """
    further = {
        "published": any(table.published for table in study.tables),
        "accuracy_against_eps": bool(measures_distances(study)),
    }
    names = [name for name, wanted in further.items() if wanted]
    return (*PLOTS, *(f"plots/{name}.{suffix}" for name in names for suffix in ("png", "pdf")))
