"""Writes the tables, the plots and the report of a study from its collected results.

Import path: robsparse.figures.report
"""

from collections.abc import Callable
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from robsparse.base.files import atomic
from robsparse.figures import (
    REPORT,
    TABLES,
    connections,
    costs,
    curves,
    details,
    finals,
    images,
    leaderboard,
    papers,
    plots_of,
    style,
    tables,
    tidy,
)
from robsparse.figures.notes import (
    SMALL,
    code,
    device,
    interval_note,
    join,
    percent,
    table_notes,
)
from robsparse.figures.summary import STRONGEST, Material, gather
from robsparse.figures.tidy import Group, groups, seeds, sparsities
from robsparse.study.cells import Layout
from robsparse.study.study import Study

_DRAW: dict[str, tuple[Callable[[Material], Figure], str]] = {
    "robust_accuracy": (finals.robust_accuracy, "Robust accuracy against sparsity"),
    "cost": (costs.cost, "Robust accuracy against the cost of training"),
    "active_weights": (curves.active_weights, "Weights that training must hold"),
    "layer_density": (finals.layer_density, "Where the live weights are"),
    "density_over_training": (connections.density_over_training, "Layers during training"),
    "rewiring": (curves.rewiring, "Rewiring during training"),
    "survival": (connections.survival, "How long regrown connections live"),
    "weight_magnitudes": (connections.weight_magnitudes, "How large the live weights are"),
    "overlap": (connections.mask_overlap, "Which weights the masks have in common"),
    "per_class": (details.per_class, "Robust accuracy of each class"),
    "pictures": (images.pictures, "Images that break for one method and not for another"),
    "accuracy_against_eps": (details.accuracy_against_eps, "Robust accuracy at every eps"),
    "published": (leaderboard.published, "Among published numbers"),
}

_FILES = """\
| file | one row is | columns |
|---|---|---|
| `results.csv`, `results.parquet` | one network under one attack component | the cell (dataset, \
arch, method, objective, sparsity, seed), selection, attack, component (`all`: the whole attack); \
`accuracy` as a fraction with its Wilson interval `ci_low`, `ci_high`; threat; sizes; cost; \
provenance; `origin`: where the network comes from; `attacked_on`: the network or its frozen view; \
`code_digest`, `other_code`: which code made it, and whether that is not the present; \
`potentially_unreliable`: why the network is potentially unreliable |
| `collected.json` | one collected file | its checksum; edited files are refused |
| `layers.csv` | one layer of one saved network | `size` and `nonzero` weights, output `positions` |
| `curves.csv` | one epoch of one training run, pretraining included | `stage`, `lr`, `loss`, \
`active_weights`, held-out accuracies `val_clean`, `val_robust` |
| `steps.parquet` | one layer at one logged step of a method that rewires (step 0: the initial \
network) | connections `pruned` and `regrown` since the row before, `active` ones, their mean \
`age` in steps |
| `lifetimes.parquet` | regrown connections by age in steps | how many were `pruned` at this age, \
how many were `active` with this age at the end |
| `weights.csv` | live weights of one saved network by magnitude | `count` in [`low`, `high`) |
| `sanity_checks.csv` | one saved network | its sanity checks: shares \
of the `examined` images, see `robsparse/evaluation/sanity_checks.py` |
| `failures.csv` | one network that could not be trained | the cell, `reason` |
| `overlap.csv` | two saved networks of the same size and sparsity | `overlap`: Jaccard index of \
their live sets; `chance`: the same expected of random sets with as many weights in each layer |
| `tables/main.csv` | one line of the main table | `<attack>_accuracy` (mean over seeds), \
`_spread` (sample standard deviation), `_low`, `_high` (95 % interval), as fractions |
| `tables/per_class.csv` | one class for one method at one sparsity | accuracy under the \
strongest attack, `images` of the class |
| `tables/disagreements.csv` | one test image that breaks for one method and not for another | \
methods by outcome, first seed |
| `evaluations/**/*.flags.npz` | one network | outcome of each test image: `labels`, \
`<attack>.<component>`, `<attack>.distance`; pictures of the first ones that broke |
"""


def write(study: Study, layout: Layout, folder: Path) -> str:
    """Write every file named in robsparse.figures; say where the report and the main table are.

    The collected tables are in `folder`, which the files are written to; outcomes of single images
    are in the layout's.

    Raises UsageError when the collected tables are missing, damaged or contradict the outcomes of
    the single images.
    """
    collected = tidy.read(folder)
    tidy.check(collected, layout, folder)
    material = gather(study, layout, collected)
    _write_tables(material, folder)
    _write_plots(material, folder)
    _write_text(folder / REPORT, report(material))
    return f"main table: {folder / TABLES[0]}\nreport: {folder / REPORT}"


def _write_tables(material: Material, root: Path) -> None:
    contents = {
        "main.md": tables.main_markdown(material),
        "main.tex": tables.main_latex(material),
        "main.csv": material.summary.to_csv(index=False),
        "per_class.csv": details.class_accuracies(material).to_csv(index=False),
        "disagreements.csv": images.disagreements(material).to_csv(index=False),
    }
    for name in TABLES:
        _write_text(root / name, contents[Path(name).name])
    for spec in material.study.tables:
        for suffix, text in papers.contents(material, spec).items():
            _write_text(root / "tables" / f"{spec.name}{suffix}", text)


def _write_plots(material: Material, root: Path) -> None:
    with style.applied():
        wanted = plots_of(material.study)
        figures = {name: _DRAW[name][0](material) for name in _plot_names(material.study)}
        for name in wanted:
            style.save(figures[Path(name).stem], root / name)


def _plot_names(study: Study) -> list[str]:
    return list(dict.fromkeys(Path(name).stem for name in plots_of(study)))


def _write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def report(material: Material) -> str:
    """The report as Markdown; pictures are linked relative to results/<study>."""
    study = material.study
    parts = [f"# {study.title}"]
    parts += [f"**{SMALL}**"] if study.small else []
    parts += [part for group in groups(study) for part in _group_tables(material, group)]
    ranked = tables.rank_table(material)
    if ranked is not None:
        parts += [
            "## Ranks",
            f"By {study.label('attack', STRONGEST)} accuracy (mean over seeds) among the sparse "
            "methods, in every cell "
            "(data set, arch, objective, sparsity) in which all of them have a result. Not ruled "
            "out: from the smallest to the largest rank that the paired differences of all pairs "
            "in a cell leave open (p < 0.05, Holm), mean over cells. Ranks say nothing of how far "
            "apart two methods are.",
            tables.markdown(ranked),
        ]
    parts += [papers.contents(material, spec)[".md"] for spec in study.tables]
    parts.append("## Plots")
    parts += [
        f"### {_DRAW[name][1]}\n\n![{_DRAW[name][1]}](plots/{name}.png)\n\n"
        f"([PDF](plots/{name}.pdf))"
        for name in _plot_names(study)
    ]
    parts += [f"## Files\n\nBeside this report:\n\n{_FILES}", _reproduce(material)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _group_tables(material: Material, group: Group) -> list[str]:
    parts = [
        f"## Main table: {group}",
        tables.markdown(tables.main(material, group)),
        tables.bullets(table_notes(material, group)),
        "Also as [LaTeX](tables/main.tex) and [CSV](tables/main.csv).",
    ]
    label = material.study.label("attack", STRONGEST)
    broken_down = tables.component_table(material, group)
    if broken_down is not None:
        parts += [
            f"### Components of {label}: {group}",
            "The components run one after the other on the images that are still robust, so each "
            "column counts all before it and the last is the accuracy of the main table. "
            "Mean over seeds.",
            tables.markdown(broken_down),
        ]
    sanity_checks = tables.sanity_checks_table(material, group)
    if sanity_checks is not None:
        parts += [
            f"### Sanity checks: {group}",
            f"Selection {material.primary}, the first images of the evaluation, the worst of the "
            "seeds; PGD with so many steps and one restart. Robustness that is real falls to "
            "chance at eps 1, has gradients, and is broken by gradients rather than by random "
            "search; the reasons for a mark stand under the main table.",
            tables.markdown(sanity_checks),
        ]
    parts += [
        f"### Cost of training: {group}",
        "Mean over seeds, everything that a method starts from included. A pass is one of the "
        "network over a batch, crafting included. Seconds and memory are of this device, with "
        "whatever else it was doing.",
        tables.markdown(tables.cost_table(material, group)),
    ]
    compared = tables.comparison_table(material, group)
    if compared is not None:
        parts += [
            f"### Comparison under {label}: {group}",
            f"Selection {material.primary}. In brackets {interval_note(material)}. Differences are "
            "paired seed by seed and image by image. p belongs to the interval of the difference: "
            "it is below 0.05 exactly if the interval leaves out zero; Holm: corrected for the "
            "number of rows, and the verdict follows it. Detectable: a true difference of this "
            'size would get p < 0.05 with probability 0.8; "not separated" says nothing of '
            "smaller ones. The dense network is the same in every row.",
            tables.markdown(compared),
        ]
    ablated = tables.ablation_table(material, group)
    if ablated is not None:
        parts += [
            f"### Ablations under {label}: {group}",
            "Each variant against the plain method; in brackets as above.",
            tables.markdown(ablated),
        ]
    return parts


def _reproduce(material: Material) -> str:
    study, results = material.study, material.tidy.results
    printed = ", ".join(percent(value) for value in sparsities(study))
    settings = yaml.safe_dump(
        study.model_dump(mode="json", exclude={"machine"}), sort_keys=False, width=90
    )
    return f"""\
## How to reproduce

`snakemake --cores 2 --configfile config/{study.study}.yaml` trains and attacks every network \
(sparsities {printed}; seeds {join(seeds(study))}) and writes this report. \
`robsparse figures config/{study.study}.yaml` draws it again from the collected tables.

- Code: {code(results)}
- Libraries: {join(results.libraries)}
- Device: {device(results)}
- Checksum of the data: {join(results.data_checksum)}

All settings that decide a number, defaults included:

```yaml
{settings.strip()}
```
"""
