"""Writes a large study with invented records, to measure how the suite scales. Nothing is trained.

The files have the format and, except for the weights, the size of real ones; they are written by
the functions that write real ones. The accuracies are random numbers: no result may be read from
such a study.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from robsparse.base import files
from robsparse.base.files import file_checksum
from robsparse.records import provenance
from robsparse.records.evaluation_record import Record, write_record
from robsparse.records.rows import Row, wilson_interval
from robsparse.schema.evaluation import Selection
from robsparse.study import fingerprints, loading
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study

METHODS = ("dense", "lwm", "global_magnitude", "admm", "hydra", "gmp", "snip", "static_random")
METHODS += ("set", "rigl", "bcs")
REWIRING = ("set", "rigl", "bcs")
# Data sets, architectures and objectives of each size. Each combination has 510 networks: ten
# sparse methods at five sparsities and the dense network, with ten seeds.
DATASETS = ("cifar10", "svhn")
ARCHS = ("resnet18", "vgg16", "wrn28_4", "resnet34", "preactresnet18")
OBJECTIVES = ("at", "trades")
SHAPES = {500: (1, 1, 1), 2000: (1, 2, 2), 10000: (2, 5, 2)}

IMAGES, CLASSES, PICTURES = 1000, 10, 32
LAYERS, EPOCHS, LOGGED_STEPS, LIFETIMES, BINS = 20, 100, 100, 200, 60
COMPONENTS = {
    "clean": ("all",),
    "pgd": ("all",),
    "transfer": ("all",),
    "autoattack": ("apgd-ce", "apgd-t", "fab-t", "square", "all"),
}


def settings(size: int, name: str, seeds: int = 10) -> dict[str, Any]:
    """The config of a study of about `size` networks, a key of SHAPES."""
    datasets, archs, objectives = SHAPES[size]
    return {
        "study": name,
        "title": f"Invented records of about {size:,} networks",
        "small": True,
        "grid": {
            "datasets": list(DATASETS[:datasets]),
            "archs": list(ARCHS[:archs]),
            "objectives": list(OBJECTIVES[:objectives]),
            "methods": list(METHODS),
            "sparsities": [0.5, 0.8, 0.9, 0.95, 0.99],
            "seeds": list(range(seeds)),
        },
        "threat": {"norm": "Linf", "eps": "8/255"},
        "training": {"crafting": {"steps": 10, "step_size": "2/255"}},
        "evaluation": {
            "n_examples": IMAGES,
            "selections": {"best_val": list(COMPONENTS)},
        },
        "machine": {"device": "cpu"},
    }


def write_config(folder: Path, size: int, seeds: int = 10) -> Path:
    """Write the config of a study to a folder and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(settings(size, f"synthetic_{size}", seeds), sort_keys=False))
    return path


def write_records(config: Path, results: Path) -> None:
    """Write weights, records of training and records of evaluation of all networks of a study."""
    study = loading.load(config)
    layout = Layout(results / study.study)
    for index, cell in enumerate(study.cells()):
        maker = _Maker(study, cell, layout, np.random.default_rng(index))
        maker.write_training()
        for selection in study.evaluation.selections:
            maker.write_evaluation(selection)


@dataclass
class _Maker:
    """Writes the files of one network."""

    study: Study
    cell: Cell
    layout: Layout
    rng: np.random.Generator

    def write_training(self) -> None:
        cell, layout = self.cell, self.layout
        for selection in self.study.saved_selections():
            self._write_weights(layout.model(cell, selection))
        rewires = cell.method in REWIRING
        tables = {layout.steps(cell): self._steps(), layout.lifetimes(cell): self._lifetimes()}
        for path, table in tables.items():
            files.write_table(path, table if rewires else table[:0], compression="zstd")
        models = {s: layout.model(cell, s) for s in self.study.saved_selections()}
        files.write_record(
            layout.training(cell),
            {
                "cell": cell.key,
                "selected": {s: {"epoch": EPOCHS, "val_robust": 0.4} for s in models},
                "failure": "",
                "crafted_on": "view",
                "cost": self._cost(),
                "curve": self._curve(),
                "data_checksum": "0" * 16,
                "start_checksum": None,
                **provenance.current(),
                **fingerprints.training(self.study, cell).as_record(),
                "weights": {s: file_checksum(path) for s, path in models.items()},
                "tables": {path.name: file_checksum(path) for path in tables},
            },
        )

    def _write_weights(self, path: Path) -> None:
        """Two small layers in place of a network of 11 million weights."""
        tensors = {}
        for name, size in (("a.weight", 32), ("b.weight", 64)):
            dense = self.rng.normal(0, 0.1, (size, 32)).astype(np.float32)
            tensors[name] = dense * (self.rng.random(dense.shape) >= self.cell.sparsity)
        files.write_tensors(path, tensors)

    def _cost(self) -> dict[str, Any]:
        active = 11_000_000 * (1 - self.cell.sparsity)
        return {
            "epochs": EPOCHS,
            "seconds": 3600.0 + self.cell.seed,
            "forward_passes": 430_000,
            "backward_passes": 430_000,
            "peak_active_weights": int(active),
            "peak_memory_mb": 2000.5,
            "device": "cpu (1 thread)",
        }

    def _curve(self) -> list[dict[str, Any]]:
        active = int(11_000_000 * (1 - self.cell.sparsity))
        return [
            {
                "epoch": epoch,
                "stage": "train" if epoch <= EPOCHS // 2 else "finetune",
                "lr": 0.1,
                "loss": float(2 / epoch),
                "active_weights": active,
                "val_clean": float(0.8 * epoch / EPOCHS),
                "val_robust": 0.45 * epoch / EPOCHS + 0.02 * float(self.rng.random()),
            }
            for epoch in range(1, EPOCHS + 1)
        ]

    def _steps(self) -> pd.DataFrame:
        layers = [f"layer{i}" for i in range(LAYERS)]
        size = LOGGED_STEPS * LAYERS
        pruned = self.rng.poisson(30, size).astype("int32")
        steps = np.repeat(np.arange(LOGGED_STEPS, dtype="int32") * 100, LAYERS)
        return pd.DataFrame(
            {
                "step": steps,
                "layer": pd.Categorical(layers * LOGGED_STEPS, layers),
                "pruned": pruned,
                "regrown": pruned,
                "active": np.full(size, 1000, dtype="int32"),
                "age": steps / 2,
            }
        )

    def _lifetimes(self) -> pd.DataFrame:
        ages = np.arange(LIFETIMES)
        counts = self.rng.poisson(1000 / (1 + ages))
        return pd.DataFrame({"age": ages, "pruned": counts, "active": counts // 2 + 1})

    def write_evaluation(self, selection: Selection) -> None:
        cell, layout = self.cell, self.layout
        outcomes = self._outcomes()
        files.write_arrays(layout.flags(cell, selection), outcomes)
        common = self._common(selection)
        rows = [
            self._row(common, attack, component, outcomes[f"{attack}.{component}"])
            for attack, components in COMPONENTS.items()
            for component in components
        ]
        nonzero = rows[0].nonzero // LAYERS
        layers = [
            {"layer": f"layer{i}", "size": 550_000, "nonzero": nonzero, "positions": 64}
            for i in range(LAYERS)
        ]
        edges = np.geomspace(1e-6, 1, BINS + 1).tolist()
        histogram = [
            {"low": low, "high": high, "count": int(self.rng.integers(1, 1000))}
            for low, high in itertools.pairwise(edges)
        ]
        checks = {"examined": 100, "zero_gradient": 0.0, "huge_eps": 0.0, "pgd_10": 0.5}
        checks |= {"pgd_50": 0.49, "pgd_200": 0.49, "black_box_only": 0.0}
        checks |= {"randomness": 0.0, "nan_logits": 0}
        checksum = file_checksum(layout.flags(cell, selection))
        record = Record(rows, layers, histogram, checks, checksum)
        write_record(layout.evaluation(cell, selection), record)

    def _outcomes(self) -> dict[str, np.ndarray]:
        """Outcomes of images: an image is hard for all networks, or for some of them."""
        hard = np.random.default_rng(0).normal(size=IMAGES)
        strength = 0.3 * METHODS.index(self.cell.method) / len(METHODS) - 0.5 * self.cell.sparsity
        own = hard + self.rng.normal(strength, 0.4, IMAGES)
        levels = {"clean.all": -1.2, "pgd.all": -0.1, "transfer.all": -0.5}
        levels |= {"autoattack.apgd-ce": -0.05, "autoattack.apgd-t": 0.0, "autoattack.fab-t": 0.0}
        levels |= {"autoattack.square": 0.0, "autoattack.all": 0.0}
        found = {"labels": np.arange(IMAGES) % CLASSES}
        found |= {name: own > level for name, level in levels.items()}
        for attack in ("pgd", "transfer", "autoattack"):
            broken = np.flatnonzero(found["clean.all"] & ~found[f"{attack}.all"])
            broken = broken[broken < PICTURES]
            found[f"{attack}.pictured"] = broken
            found[f"{attack}.predicted"] = np.zeros(len(broken), dtype=np.int64)
            grey = np.linspace(0, 1, 3 * 32 * 32, dtype=np.float16).reshape(3, 32, 32)
            found[f"{attack}.pictures"] = np.tile(grey, (len(broken), 2, 1, 1, 1))
        return found

    def _common(self, selection: Selection) -> dict[str, Any]:
        cell, cost = self.cell, self._cost()
        present = fingerprints.evaluation(self.study, cell, selection)
        prunable = 550_000 * LAYERS
        nonzero = int(550_000 * (1 - cell.sparsity)) * LAYERS
        return vars(cell) | {
            "selection": selection,
            "classes": CLASSES,
            "chance": 1 / CLASSES,
            "norm": "Linf",
            "sparsity_reached": 1 - nonzero / prunable,
            "nonzero": nonzero,
            "prunable": prunable,
            "layers": LAYERS,
            "dense_macs": 10**9,
            "sparse_macs": int(10**9 * (1 - cell.sparsity)),
            "model_bytes": 4 * nonzero,
            "selected_epoch": EPOCHS,
            "epochs": EPOCHS,
            "forward_passes": cost["forward_passes"],
            "backward_passes": cost["backward_passes"],
            "train_seconds": cost["seconds"],
            "peak_active_weights": cost["peak_active_weights"],
            "peak_memory_mb": cost["peak_memory_mb"],
            "train_device": cost["device"],
            "eval_device": cost["device"],
            "attacked_on": "view",
            "attack_seconds": 100.0,
            "settings_digest": present.digest,
            "code_digest": present.code,
            **provenance.current(),
            "data_checksum": "0" * 16,
            "model_checksum": file_checksum(self.layout.model(cell, selection)),
            "potentially_unreliable": self._reason(),
        }

    def _reason(self) -> str:
        """One network of twenty is marked."""
        return "random search breaks 3% of the images" if self.rng.random() < 0.05 else ""

    @staticmethod
    def _row(common: dict[str, Any], attack: str, component: str, robust: np.ndarray) -> Row:
        correct = int(robust.sum())
        low, high = wilson_interval(correct, IMAGES)
        own = {"pgd": {"steps": 50, "restarts": 10}, "autoattack": {"version": "standard"}}
        return Row(
            **common,
            **own.get(attack, {}),
            attack=attack,
            component=component,
            accuracy=correct / IMAGES,
            n_correct=correct,
            n_examples=IMAGES,
            ci_low=low,
            ci_high=high,
            eps=0 if attack == "clean" else 8 / 255,
        )
