"""Writes the tables, plots, report and page of a study from its collected results.

Import path: robsparse.figures.report
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pandas as pd
import yaml

from robsparse.base.files import write_text
from robsparse.figures import PAGE, REPORT, SUFFIXES, TABLES, plots_of
from robsparse.figures.data import tidy
from robsparse.figures.data.summary import STRONGEST, Material, make_material
from robsparse.figures.data.tidy import Group, groups, seeds, sparsities
from robsparse.figures.page.page import Drawn, page
from robsparse.figures.plots import (
    connections,
    corruptions,
    costs,
    curves,
    details,
    finals,
    images,
    leaderboard,
    style,
)
from robsparse.figures.plots.style import Plot
from robsparse.figures.tables import one_column, papers, study_tables
from robsparse.figures.text.captions import interval_note
from robsparse.figures.text.formats import SMALL, code, device, join, percent
from robsparse.figures.text.markup import bullets, markdown
from robsparse.figures.text.notes import table_notes
from robsparse.study.cells import Layout
from robsparse.study.study import Study

_DRAW: dict[str, tuple[Callable[[Material], Plot], str]] = {
    "pareto": (costs.pareto, "Robust accuracy against active weights held in training"),
    "robust_accuracy": (finals.robust_accuracy, "Robust accuracy against sparsity"),
    "cost": (costs.cost, "Robust accuracy and the cost of training"),
    "training_curves": (curves.training_curves, "Robust accuracy during training"),
    "active_weights": (curves.active_weights, "Active weights during training"),
    "layer_density": (finals.layer_density, "Nonzero weights of each layer"),
    "density_over_training": (
        connections.density_over_training,
        "Density of each layer during training",
    ),
    "rewiring": (curves.rewiring, "Rewiring during training"),
    "survival": (connections.survival, "How long regrown connections stay active"),
    "weight_magnitudes": (connections.weight_magnitudes, "Magnitudes of the nonzero weights"),
    "overlap": (connections.mask_overlap, "Mask overlap of the methods"),
    "per_class": (details.per_class, "Robust accuracy of each class"),
    "pictures": (images.pictures, "Images that are broken for one method and not for another"),
    "accuracy_against_eps": (details.accuracy_against_eps, "Robust accuracy at every eps"),
    "corruptions": (corruptions.corruptions, "Accuracy on common corruptions"),
    "published": (leaderboard.published, "Our and published accuracies"),
}

_FILES = """\
| file | one row | columns |
|---|---|---|
| `results.csv`, `results.parquet` | one network under one attack component | the cell (dataset, \
arch, method, objective, sparsity, seed), selection, attack, component (`all`: the whole attack); \
`accuracy` as a fraction with its Wilson interval `ci_low`, `ci_high`; threat; sizes; cost; \
provenance (`kernels`: the instruction set of the sparse kernels); `origin`: where the network \
comes from; `attacked_on`: the network or its folded view; \
`code_digest`: digest of the code that made the row; `other_code`: not empty if older or \
changed code made the row; `potentially_unreliable`: reasons why the network \
is potentially unreliable |
| `collected.json` | one collected file | its checksum; `robsparse figures` refuses edited files |
| `layers.csv` | one layer of one saved network | `size` and `nonzero` weights, output `positions` |
| `curves.csv` | one epoch of one training run, including pretraining | `stage`, `lr`, `loss`, \
`active_weights`, held-out accuracies `val_clean`, `val_robust` |
| `steps.parquet` | one layer at one logged step of a method that rewires (step 0: the initial \
network) | connections `pruned` and `regrown` since the row before, `active` ones, their mean \
`age` in steps |
| `lifetimes.parquet` | regrown connections by age in steps | how many were `pruned` at this age, \
how many were `active` with this age at the end |
| `weights.csv` | one bin of magnitudes of the nonzero weights of one saved network | `count` of \
magnitudes in [`low`, `high`) |
| `sanity_checks.csv` | one saved network | results of its sanity checks on the `examined` images, \
see docs/evaluation.md |
| `corruptions.csv` | one saved network on one common corruption at one severity | `source`: \
generated corruptions or files; `n_correct` of `n_examples` images |
| `failures.csv` | one network whose training failed | the cell, `reason` |
| `overlap.csv` | two saved networks of the same size and sparsity | `jaccard`: Jaccard index of \
their masks; `expected_jaccard`: the index to expect of random masks with as many nonzero weights \
in each layer |
| `tables/main.csv` | one line of the main table | `<attack>_accuracy` (mean over seeds), \
`_spread` (sample standard deviation), `_low`, `_high` (95 % interval), as fractions; \
`reliability`: fine, look or unreliable, empty without a result |
| `tables/main.tex`, `tables/main_notes.tex` | the table for a column of a paper, and its notes | \
accuracy without attack and under the strongest attack, active weights held in training; it needs \
the package booktabs |
| `tables/per_class.csv` | one class for one method at one sparsity | accuracy under the \
strongest attack, `images` of the class |
| `tables/disagreements.csv` | one test image that the strongest attack breaks for one method and \
not for another | methods by outcome, first seed |
| `evaluations/**/*.flags.npz` | one network | outcome of each test image: `labels`, \
`<attack>.<component>`, `<attack>.distance`; some of the images that an attack broke |
"""


def write(study: Study, layout: Layout, folder: Path) -> str:
    """Write all tables, plots, the report and the page; return a text with their paths.

    Args:
        study: the resolved study.
        layout: paths of the study's results, with the outcomes of single images.
        folder: folder of the collected tables; the files are written to it.

    Raises:
        UsageError: if the collected tables are missing or damaged, or if they contradict the
            outcomes of single images.
    """
    collected = tidy.read(folder)
    tidy.check(collected, layout, folder)
    material = make_material(study, layout, collected)
    _write_tables(material, folder)
    plots = _write_plots(material, folder)
    write_text(folder / REPORT, report(material, {n: plot.caption for n, plot in plots.items()}))
    write_text(folder / PAGE, page(material, plots))
    paths = {"main table": TABLES[0], "report": REPORT, "page": PAGE}
    return "\n".join(f"{name}: {folder / path}" for name, path in paths.items())


def _write_tables(material: Material, root: Path) -> None:
    contents = {
        "main.md": study_tables.main_markdown(material),
        "main.tex": one_column.main_latex(material),
        "main_notes.tex": one_column.notes_latex(material),
        "main.csv": _graded(material.summary).to_csv(index=False),
        "per_class.csv": details.class_accuracies(material).to_csv(index=False),
        "disagreements.csv": images.disagreements(material).to_csv(index=False),
    }
    for name in TABLES:
        write_text(root / name, contents[Path(name).name])
    for spec in material.study.tables:
        for suffix, text in papers.contents(material, spec).items():
            write_text(root / "tables" / f"{spec.name}{suffix}", text)


def _graded(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary; a line without a result has no grade."""
    return summary.assign(reliability=summary.reliability.mask(summary.seeds == 0, ""))


def _write_plots(material: Material, root: Path) -> dict[str, Drawn]:
    """Write every plot in every size; return the plots for the page by name."""
    plots = {}
    for name in _plot_names(material.study):
        draw, title = _DRAW[name]
        with style.applied():
            figure = draw(material)
            style.save(figure, root / f"plots/{name}.png")
            vectors = [style.svg(figure, name)]
        for size, inches in style.WIDTHS.items():
            with style.applied(inches):
                paper = draw(material)
                style.save(paper, root / f"plots/{name}-{size}.pdf")
                if size == "column":  # also fits a phone
                    vectors.append(style.svg(paper, f"{name} {size}"))
        plots[name] = Drawn(title, figure.caption, *vectors)
        text = "\n\n".join([f"**{title}.**", *figure.caption])
        write_text(root / f"plots/{name}.caption.md", text + "\n")
    return plots


def _plot_names(study: Study) -> list[str]:
    files = (Path(name).name for name in plots_of(study))
    return [name.removesuffix(SUFFIXES[0]) for name in files if name.endswith(SUFFIXES[0])]


def report(material: Material, captions: Mapping[str, Sequence[str]] = MappingProxyType({})) -> str:
    """Return the report as Markdown. Links to plots are relative to results/<study>.

    Args:
        material: the data of the report.
        captions: paragraphs of the caption of each plot; without them, only the plots are shown.
    """
    study = material.study
    parts = [
        f"# {study.title}",
        *([f"**{SMALL}**"] if study.small else []),
        *(part for group in groups(study) for part in _group_sections(material, group)),
        *_ranks(material),
        *(papers.contents(material, spec)[".md"] for spec in study.tables),
        "## Plots",
        *(_plot(name, captions.get(name, ())) for name in _plot_names(study)),
        f"## Files\n\nBeside this report:\n\n{_FILES}",
        _reproduce(material),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _plot(name: str, caption: Sequence[str]) -> str:
    title = _DRAW[name][1]
    sizes = ", ".join(
        f"[{inches:g} inches](plots/{name}-{size}.pdf)" for size, inches in style.WIDTHS.items()
    )
    text = "\n\n".join(caption)
    return f"### {title}\n\n![{title}](plots/{name}.png)\n\n{text}\n\nPDF: {sizes}."


def _section(heading: str, text: str, table: pd.DataFrame | None) -> list[str]:
    """Return heading, text and table; nothing if there is no table."""
    return [] if table is None else [heading, text, markdown(table)]


def _ranks(material: Material) -> list[str]:
    label = material.study.label("attack", STRONGEST)
    return _section(
        "## Ranks",
        f"Ranks of the sparse methods by {label} accuracy (mean over seeds), mean over all cells "
        "(data set, arch, objective, sparsity) in which every sparse method has a result. Not "
        "ruled out: smallest and largest rank that the paired differences of all pairs in a cell "
        "do not rule out (p < 0.05, Holm), mean over cells. Ranks do not show how large a "
        "difference is.",
        study_tables.rank_table(material),
    )


def _group_sections(material: Material, group: Group) -> list[str]:
    label = material.study.label("attack", STRONGEST)
    return [
        f"## Main table: {group}",
        markdown(study_tables.main(material, group)),
        bullets(table_notes(material, group)),
        "Also for a column of a paper, as [LaTeX](tables/main.tex) with "
        "[notes](tables/main_notes.tex), and as [CSV](tables/main.csv).",
        *_section(
            f"### Components of {label}: {group}",
            "The components run one after the other on the images that are still robust. So the "
            "accuracy after a component counts all components before it, and the last one is the "
            "accuracy of the main table. Mean over seeds.",
            study_tables.component_table(material, group),
        ),
        *_section(
            f"### Sanity checks: {group}",
            f"Selection {material.primary}, on the first images of the evaluation; the worst "
            "result of all seeds. PGD runs with the given number of steps and one restart. A "
            "robust network has gradients, and its accuracy at eps 1 is at most chance. Random "
            "search does not break images that attacks with gradients leave correct. The "
            "reasons for a mark are below the main table.",
            study_tables.sanity_checks_table(material, group),
        ),
        *_section(
            f"### Common corruptions: {group}",
            f"Selection {material.primary}. Accuracy in % of all images of the evaluation, mean "
            "over the severities 1 to 5 and over seeds; first the mean over all corruptions. In "
            f"brackets: {interval_note(material)}. A "
            "corruption is no attack and no part of a robust accuracy. Generated corruptions are "
            "not the images of CIFAR-10-C.",
            study_tables.corruptions_table(material, group),
        ),
        *_section(
            f"### Cost of training: {group}",
            "Mean over seeds, including everything that a method starts from. A pass is a forward "
            "or backward pass over one batch, including those of crafting. Seconds and memory "
            "were measured on this device, which may have run other jobs at the same time. Model: "
            "bytes of all tensors in the compact file that `robsparse export` writes. Latency, if "
            "the study measures it: median time of one image on the device of the evaluation.",
            study_tables.cost_table(material, group),
        ),
        *_section(
            f"### Comparison under {label}: {group}",
            f"Selection {material.primary}. In brackets: {interval_note(material)}. Differences "
            "are paired by seed and image. p is below 0.05 if and only if the interval of the "
            "difference does not contain zero. p (Holm) is corrected for "
            "the number of rows, and the verdict follows from it. Detectable: a true difference "
            'of this size has p < 0.05 with probability 0.8; "not separated" does not exclude '
            "smaller differences. The dense network is the same in every row.",
            study_tables.comparison_table(material, group),
        ),
        *_section(
            f"### Ablations under {label}: {group}",
            "Each variant is compared with the method without changes. Brackets: as above.",
            study_tables.ablation_table(material, group),
        ),
    ]


def _reproduce(material: Material) -> str:
    study, results = material.study, material.tidy.results
    printed = ", ".join(percent(value) for value in sparsities(study))
    settings = yaml.safe_dump(study.settings(), sort_keys=False, width=90)
    return f"""\
## How to reproduce

`robsparse run config/{study.study}.yaml --cores 2` trains and attacks every network \
(sparsities {printed}; seeds {join(seeds(study))}) and writes this report. \
`robsparse figures config/{study.study}.yaml` writes it again from the collected tables.

- Code: {code(results)}
- Libraries: {join(results.libraries)}
- Sparse kernels: {join(results.kernels)}
- Device: {device(results)}
- Checksum of the data: {join(results.data_checksum)}

All settings that results depend on, including defaults:

```yaml
{settings.strip()}
```
"""
