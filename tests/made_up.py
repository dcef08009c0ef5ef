"""Artificial results of a small study: tables and outcomes of images, without any training."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from robsparse.base.files import file_checksum, write_json
from robsparse.collection import plausibility
from robsparse.figures.data import summary, tidy
from robsparse.records.columns import COLLECTED, MANIFEST, OVERLAP_COLUMNS
from robsparse.records.rows import Row, wilson_interval
from robsparse.study import loading
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study

IMAGES = 20
LAYERS = {"0": 40, "3": 160, "11": 200}
COMPONENTS = ("apgd-ce", "apgd-t")
STUDY = {
    "study": "made_up",
    "title": "Made-up numbers",
    "small": True,
    "grid": {
        "datasets": ["digits"],
        "archs": ["small_cnn"],
        "objectives": ["at"],
        "methods": ["lwm", "bcs", "dense"],
        "sparsities": [0.9, 0.95],
        "seeds": [0, 1],
    },
    "threat": {"eps": "8/255"},
    "training": {"crafting": {"step_size": "2/255"}},
    "evaluation": {
        "n_examples": IMAGES,
        "selections": {
            "best_val": ["clean", "pgd", "autoattack"],
            "last": ["clean", "pgd", "autoattack"],
        },
    },
}


# ------------------------------------------------------------------ artificial tidy files


@dataclass
class MadeUp:
    """Writes artificial tidy files. `correct(cell, selection, attack)` is a number of images."""

    study: Study
    layout: Layout
    correct: Callable[[Cell, str, str], int]
    images: int = IMAGES
    layers: Sequence[tuple[str, int]] = tuple(LAYERS.items())
    epochs: int = 4
    steps_per_epoch: int = 5
    potentially_unreliable: str = ""
    skip: Callable[[Cell], bool] = lambda cell: False

    def write(self) -> Layout:
        """Write results.csv, layers.csv, curves.csv, steps.parquet and the flags."""
        rows, layers, points, steps = [], [], [], []
        for cell in self.study.cells():
            if self.skip(cell):
                continue
            axes = vars(cell)
            for selection in self.study.evaluation.selections:
                rows += self._rows(cell, selection)
                layers += [axes | {"selection": selection} | row for row in self._layers(cell)]
            points += [axes | point for point in self._curve(cell)]
            if cell.method == "bcs":
                steps.append(self._steps().assign(**axes))
        self.layout.root.mkdir(parents=True, exist_ok=True)
        results = plausibility.mark_weak_attacks(pd.DataFrame(rows))
        results = plausibility.mark_missed_budgets(results).assign(other_code="")
        results.to_csv(self.layout.root / "results.csv", index=False)
        pd.DataFrame(layers).to_csv(self.layout.root / "layers.csv", index=False)
        pd.DataFrame(points).to_csv(self.layout.root / "curves.csv", index=False)
        bins = pd.DataFrame(layers).assign(low=0.1, high=0.2, count=5)
        bins.to_csv(self.layout.root / "weights.csv", index=False)
        if steps:
            pd.concat(steps).to_parquet(self.layout.root / "steps.parquet")
            lifetimes = pd.concat(steps).drop_duplicates([*tidy.SEEDED])
            lifetimes = lifetimes.assign(age=3, pruned=2, active=1)
            lifetimes.to_parquet(self.layout.root / "lifetimes.parquet")
        self._overlap().to_csv(self.layout.root / "overlap.csv", index=False)
        self.write_manifest()
        return self.layout

    def write_manifest(self) -> None:
        """Write the checksums of the existing tables, as `robsparse collect` does."""
        found = [name for name in COLLECTED if (self.layout.root / name).exists()]
        sums = {n: file_checksum(self.layout.root / n) for n in found}
        content = {"tables": sums, "outcomes": {}}
        write_json(self.layout.root / MANIFEST, content)

    def _overlap(self) -> pd.DataFrame:
        sparse = [c for c in self.study.cells() if c.sparsity]
        rows = [
            (
                *(a.dataset, a.arch, a.objective, a.sparsity),
                *(a.method, a.seed, "best_val", b.method, b.seed, "best_val", 0.25, 0.05),
            )
            for a, b in itertools.combinations(sparse, 2)
            if (a.sparsity, a.objective) == (b.sparsity, b.objective)
        ]
        return pd.DataFrame(rows, columns=list(OVERLAP_COLUMNS))

    def flags(self, cell: Cell, selection: str) -> dict[str, np.ndarray]:
        """Outcomes of images. The first images stay correct under each attack."""
        found = {}
        for attack in ("clean", "pgd", "autoattack"):
            count = self.correct(cell, selection, attack)
            for part in (*COMPONENTS, "all") if attack == "autoattack" else ("all",):
                extra = 2 if part == COMPONENTS[0] else 0
                found[f"{attack}.{part}"] = np.arange(self.images) < count + extra
        return found

    def _rows(self, cell: Cell, selection: str) -> list[dict]:
        flags = self.flags(cell, selection)
        path = self.layout.flags(cell, selection)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, labels=np.arange(self.images) % 10, **flags)
        nonzero = sum(layer["nonzero"] for layer in self._layers(cell))
        size = sum(size for _, size in self.layers)
        rows = []
        for name, robust in flags.items():
            attack, component = name.split(".")
            low, high = wilson_interval(int(robust.sum()), self.images)
            row = Row(
                **vars(cell),
                selection=selection,
                attack=attack,
                component=component,
                accuracy=robust.mean(),
                n_correct=robust.sum(),
                n_examples=self.images,
                ci_low=low,
                ci_high=high,
                norm="Linf",
                eps=0 if attack == "clean" else 8 / 255,
                steps=50 if attack == "pgd" else None,
                restarts=5 if attack == "pgd" else None,
                version="standard" if attack == "autoattack" else None,
                potentially_unreliable=self.potentially_unreliable,
                classes=10,
                chance=0.125,
                sparsity_reached=1 - nonzero / size,
                nonzero=nonzero,
                prunable=size,
                layers=len(self.layers),
                dense_macs=1,
                sparse_macs=1,
                model_bytes=1,
                epochs=self.epochs * (1 if cell.method == "dense" else 2),
                peak_active_weights=nonzero if cell.method == "bcs" else size,
                train_device="cpu (1 thread)",
                eval_device="cpu (1 thread)",
                settings_digest="0" * 16,
                code_digest="3" * 16,
                code_version="0.1.0+0123456789ab",
                code_dirty=True,
                libraries="numpy=2",
                data_checksum="1" * 16,
                model_checksum="2" * 16,
            )
            rows.append(row.model_dump())
        return rows

    def _layers(self, cell: Cell) -> list[dict]:
        tilt = {"bcs": 0.6, "hydra": 0.15, "admm": 0.05}.get(cell.method, 0.0)
        share = [size**-tilt for _, size in self.layers]
        scale = sum(s * n for s, (_, n) in zip(share, self.layers, strict=True))
        budget = (1 - cell.sparsity) * sum(size for _, size in self.layers)
        return [
            {
                "layer": name,
                "size": size,
                "nonzero": min(size, round(budget * s * size / scale)),
                "positions": 1,
            }
            for s, (name, size) in zip(share, self.layers, strict=True)
        ]

    def _curve(self, cell: Cell) -> list[dict]:
        size = sum(size for _, size in self.layers)
        nonzero = sum(layer["nonzero"] for layer in self._layers(cell))
        stages = {
            "dense": [("pretrain", size, 1)],
            "bcs": [("train", nonzero, 2)],
            "lwm": [("pretrain", size, 1), ("finetune", nonzero, 1)],
        }.get(
            cell.method, [("pretrain", size, 1), ("prune", size, 0.4), ("finetune", nonzero, 0.6)]
        )
        points = [
            {"stage": stage, "active_weights": held}
            for stage, held, share in stages
            for _ in range(round(share * self.epochs))
        ]
        robust = {"val_robust": 0.4 + 0.1 * cell.seed}
        return [{"epoch": i} | point | robust for i, point in enumerate(points, 1)]

    def _steps(self) -> pd.DataFrame:
        """Two layers; step 0 is the initial network."""
        count = 2 * self.epochs * self.steps_per_epoch
        step = np.arange(count + 1)
        pruned = np.random.default_rng(0).poisson(30 * 0.1 ** (3 * step // (count + 1)))
        pruned[0] = 0
        names = list(dict(self.layers))[:2]
        one = pd.DataFrame({"step": step, "pruned": pruned, "regrown": pruned})
        return pd.concat([one.assign(layer=name, active=10, age=step / 2.0) for name in names])


def correct(cell: Cell, selection: str, attack: str) -> int:
    """Number of correct images: BCS is best, seed 1 better than 0, `last` worse than `best_val`."""
    start = {"dense": 16, "bcs": 12}.get(cell.method, 8)
    loss = {"clean": 0, "pgd": 2, "autoattack": 3}[attack]
    return start - loss + 2 * cell.seed - (selection == "last")


def load(folder: Path, **changes: object) -> Study:
    """The artificial study, with changes of the grid."""
    path = folder / "made_up.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"grid": STUDY["grid"] | changes}))
    return loading.load(path)


def prepare(folder: Path, grid: dict | None = None, **options: object) -> summary.Material:
    """Write artificial results to `folder` and read them."""
    study = load(folder, **(grid or {}))
    made_up = MadeUp(study, Layout(folder / "made_up"), options.pop("correct", correct), **options)
    layout = made_up.write()
    return summary.make_material(study, layout, tidy.read(layout.root))


def words(figure) -> str:
    """All text of a figure and of its caption."""
    parts = [*figure.caption, *(text.get_text() for text in figure.texts)]
    for panel in figure.axes:
        parts += [panel.get_title(), panel.get_xlabel(), panel.get_ylabel()]
        parts += [text.get_text() for text in panel.texts]
    return " ".join(" ".join(parts).split())


def drawn(panel, label: str):
    """The line with this label in a panel."""
    [line] = [line for line in panel.lines if line.get_label() == label]
    return line
