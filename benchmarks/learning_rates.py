"""Prints the learning rate of each method and sparsity with the best accuracy on held-out images.

    python benchmarks/learning_rates.py config/photos_lr.yaml

The study has one seed and, for each method, variants with different learning rates. Only training
records are read, so no test image decides anything. The accuracy is that under PGD on held-out
images, in the epoch that `best_val` selects; the smaller rate wins a tie. The rate of a variant is
that of its last stage. A run that failed is never chosen. After the table come the chosen rates as
`params` of a block of a study, for each sparsity.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from robsparse.records.training_record import read_training
from robsparse.schema.training import Fit
from robsparse.study.cells import Cell, Layout
from robsparse.study.loading import load
from robsparse.study.study import Study


@dataclass(frozen=True)
class Trial:
    """A trained network: its registered method, the rate of its last stage, and what came of it."""

    method: str
    label: str
    sparsity: float
    lr: float
    stages: dict[str, Fit]
    accuracy: float
    seconds: float
    failed: bool


def trials(study: Study, layout: Layout) -> Iterator[Trial]:
    """The finished networks of a study."""
    for cell, planned in study.planned.items():
        if not layout.training(cell).exists():
            continue
        record, stages = read_training(layout.training(cell)), planned.stages
        yield Trial(
            method=study.base("method", cell.method),
            label=study.entry("method", cell.method).literals["LABEL"],
            sparsity=cell.sparsity,
            lr=[*stages.values()][-1].lr,
            stages=stages,
            accuracy=record["selected"]["best_val"]["val_robust"],
            seconds=record["cost"]["seconds"] - _before(study, cell, layout),
            failed=bool(record["failure"]),
        )


def _before(study: Study, cell: Cell, layout: Layout) -> float:
    """Training time of the network that a cell starts from; its record counts it too."""
    start = study.starting_cell(cell)
    return read_training(layout.training(start))["cost"]["seconds"] if start else 0.0


def chosen(found: Iterable[Trial]) -> dict[tuple[str, float], Trial]:
    """The best trial of each method and sparsity, from all its rates."""
    best: dict[tuple[str, float], Trial] = {}
    for trial in sorted(found, key=lambda t: t.lr):
        key = trial.method, trial.sparsity
        if not trial.failed and (key not in best or trial.accuracy > best[key].accuracy):
            best[key] = trial
    return best


def table(found: list[Trial]) -> list[str]:
    """A line for each method and sparsity with the accuracy (%) at each rate."""
    rates = sorted({trial.lr for trial in found})
    best = chosen(found)
    lines = [
        "| Method | Sparsity | " + " | ".join(f"lr {lr:g}" for lr in rates) + " | Chosen |",
        "| --- | --: |" + " --: |" * (len(rates) + 1),
    ]
    for method, sparsity in dict.fromkeys((t.method, t.sparsity) for t in found):
        own = {t.lr: t for t in found if (t.method, t.sparsity) == (method, sparsity)}
        shown = [_shown(own.get(lr)) for lr in rates]
        pick = best.get((method, sparsity))
        edge = " (edge)" if pick and len(own) > 1 and pick.lr in (min(own), max(own)) else ""
        label = next(iter(own.values())).label
        choice = f"{pick.lr:g}{edge}" if pick else "none"
        lines.append(f"| {label} | {sparsity:.0%} | {' | '.join(shown)} | {choice} |")
    return lines


def _shown(trial: Trial | None) -> str:
    if trial is None:
        return "n/a"
    return f"{100 * trial.accuracy:.1f}{' §' if trial.failed else ''}"


def block_params(found: list[Trial]) -> list[str]:
    """The chosen rates as `params` of a block; a dense network has one rate for all sparsities.

    Listed are the stages whose rate differs between the variants.
    """
    best, lines = chosen(found), []
    for sparsity in sorted({t.sparsity for t in found if t.sparsity}):
        lines.append(f"    params: # {sparsity:.0%}")
        for (method, own), pick in best.items():
            if own in (0, sparsity):
                stages = {n: f"{n}: {{lr: {pick.stages[n].lr:g}}}" for n in varied(found, method)}
                lines.append(f"      {method}: {{{', '.join(stages.values())}}}")
    return lines


def varied(found: Iterable[Trial], method: str) -> list[str]:
    """The stages of a method that do not have the same rate in all trials."""
    own = [trial.stages for trial in found if trial.method == method]
    return [name for name in own[0] if len({stages[name].lr for stages in own}) > 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--results", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    study = load(arguments.config)
    if len({cell.seed for cell in study.cells()}) > 1:
        raise SystemExit(f"{arguments.config}: grid.seeds: expected one seed")
    found = list(trials(study, Layout(arguments.results / study.study)))
    if not found:
        raise SystemExit(f"{arguments.results / study.study}: no network is trained yet")
    missing = len(study.cells()) - len(found)
    hours = sum(trial.seconds for trial in found) / 3600
    print("\n".join(table(found)))
    print(f"\n{len(found)} networks, {hours:.1f} hours of one job; {missing} are not trained yet\n")
    print("\n".join(block_params(found)))


if __name__ == "__main__":
    main()
