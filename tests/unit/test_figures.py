"""Tables and plots from small artificial results; no network is trained or attacked."""

import dataclasses
import itertools
import re
import shutil
import statistics as by_hand
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from robsparse.base.errors import UsageError
from robsparse.base.files import file_checksum, write_json
from robsparse.collection import plausibility
from robsparse.figures import PLOTS, REPORT, TABLES, report
from robsparse.figures.data import compare, statistics, summary, tidy
from robsparse.figures.plots import connections, costs, curves, finals, leaderboard, style
from robsparse.figures.tables import study_tables
from robsparse.figures.text import formats, markup, notes
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
        return [{"epoch": i} | point for i, point in enumerate(points, 1)]

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


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> summary.Material:
    return prepare(tmp_path_factory.mktemp("results"))


@pytest.fixture
def group(material: summary.Material) -> tidy.Group:
    [only] = tidy.groups(material.study)
    return only


@pytest.fixture
def main(material: summary.Material, group: tidy.Group) -> pd.DataFrame:
    return study_tables.main(material, group)


@pytest.fixture(autouse=True)
def _style():
    with style.applied():
        yield


# ------------------------------------------------------------------ files


def test_write_makes_all_declared_files_and_no_others(tmp_path):
    study = load(tmp_path, sparsities=[0.9])
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    before = {path for path in layout.root.rglob("*") if path.is_file()}
    text = report.write(study, layout, layout.root)
    after = {path for path in layout.root.rglob("*") if path.is_file()}
    assert after - before == {layout.root / name for name in (*TABLES, *PLOTS, REPORT)}
    assert str(layout.root / REPORT) in text
    assert str(layout.root / "tables/main.md") in text
    content = {name: (layout.root / name).read_bytes() for name in (*TABLES, *PLOTS, REPORT)}
    assert all(content.values())
    table = pd.read_csv(layout.root / "tables/main.csv")
    assert table.clean_accuracy[0] == pytest.approx(0.85)
    report.write(study, layout, layout.root)
    again = {name: (layout.root / name).read_bytes() for name in content}
    assert [name for name in content if content[name] != again[name]] == []


ELSEWHERE = {"dataset": "digits", "objective": "trades", "callable": "nets:build"}
WITHOUT_A_SPARSE_METHOD = {
    "dense networks alone": {"grid": STUDY["grid"] | {"methods": ["dense"]}},
    "networks from elsewhere alone": {"grid": [], "models": {"theirs": ELSEWHERE}},
    "sparse ones from elsewhere": {"grid": [], "models": {"theirs": ELSEWHERE | {"sparsity": 0.9}}},
    "a group of them beside others": {"models": {"theirs": ELSEWHERE}},
}


@pytest.mark.parametrize("name", WITHOUT_A_SPARSE_METHOD)
def test_a_group_without_a_sparse_method_is_drawn(name, tmp_path):
    path = tmp_path / "made_up.yaml"
    path.write_text(yaml.safe_dump(STUDY | WITHOUT_A_SPARSE_METHOD[name]))
    study = loading.load(path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    report.write(study, layout, layout.root)
    assert all((layout.root / name).stat().st_size for name in (*TABLES, *PLOTS, REPORT))
    material = summary.make_material(study, layout, tidy.read(layout.root))
    levels = [line for panel in finals.robust_accuracy(material).axes for line in panel.lines]
    labels = {study.label("method", method) for method in tidy.methods(study)}
    assert labels <= {line.get_label() for line in levels}
    for group in tidy.groups(study):
        notes_of = " ".join(notes.table_notes(material, group))
        foreign = "theirs" in tidy.methods(study, group)
        assert ("Architecture from code outside this suite: theirs" in notes_of) == foreign


def test_report_shows_the_existing_plots(material):
    links = re.findall(r"\]\(([^)]+)\)", report.report(material))
    assert set(links) == {*PLOTS, "tables/main.tex", "tables/main.csv"}


def test_error_about_missing_results_names_the_command_to_run(tmp_path):
    with pytest.raises(UsageError, match=r"results\.csv: .*run `robsparse collect CONFIG` first"):
        report.write(load(tmp_path), Layout(tmp_path / "nothing"), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", ["results.csv", "layers.csv", "steps.parquet"])
def test_error_about_a_damaged_table_names_the_file(tmp_path, name):
    study = load(tmp_path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    (layout.root / name).write_text("nonsense\n1\n")
    with pytest.raises(UsageError, match=re.escape(name)):
        report.write(study, layout, layout.root)


def test_outcomes_that_contradict_a_table_are_an_error(tmp_path):
    study = load(tmp_path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    path = layout.flags(study.cells()[0], "best_val")
    with np.load(path) as stored:
        flags = dict(stored)
    flags["pgd.all"] = ~flags["pgd.all"]
    np.savez(path, **flags)
    with pytest.raises(
        UsageError, match=r"results\.csv: row \d+, .* pgd all: n_correct = 14: expected 6"
    ):
        report.write(study, layout, layout.root)


EDITS = {
    "accuracy": ("results.csv", {"accuracy": 0.99}, r"results\.csv: row 2, .*: accuracy = 0\.99"),
    "interval": ("results.csv", {"ci_low": 0.001}, r"results\.csv: row 2, .*: ci_low = 0\.001"),
    "another column": ("results.csv", {"train_seconds": 1.0}, r"results\.csv: not as it was"),
    "layers": ("layers.csv", {"nonzero": 1}, r"layers\.csv: not as it was collected"),
    "curves": ("curves.csv", {"active_weights": 1}, r"curves\.csv: not as it was collected"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_table_is_refused_and_nothing_is_drawn(edit, tmp_path):
    name, values, message = EDITS[edit]
    study = load(tmp_path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    table = pd.read_csv(layout.root / name)
    for column, value in values.items():
        table[column] = table[column].astype(float)
        table.loc[0, column] = value
    table.to_csv(layout.root / name, index=False)
    with pytest.raises(UsageError, match=message):
        report.write(study, layout, layout.root)
    assert not (layout.root / REPORT).exists()


def test_edited_row_of_a_component_is_refused(tmp_path):
    study = load(tmp_path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    table = pd.read_csv(layout.root / "results.csv")
    [index, *_] = table.index[table.component == COMPONENTS[0]]
    table.loc[index, "n_correct"] -= 1
    count = int(table.n_correct[index])
    table.loc[index, "accuracy"] = count / 20
    table.loc[index, ["ci_low", "ci_high"]] = wilson_interval(count, 20)
    table.to_csv(layout.root / "results.csv", index=False)
    with pytest.raises(UsageError, match=rf"row {index + 2}, .* {COMPONENTS[0]}: n_correct = "):
        report.write(study, layout, layout.root)


def test_notes_report_rows_of_other_code(material, group):
    assert not any("other code" in note for note in notes.table_notes(material, group))
    results = material.tidy.results.assign(other_code="training")
    note = notes.other_code(results)
    assert note.startswith(f"{len(results)} of {len(results)} rows were made by other code")


def test_figures_load_neither_torch_nor_pyplot():
    modules = ("torch", "sklearn", "pyautoattack", "matplotlib.pyplot")
    code = (
        f"import sys, robsparse.figures.report; print([m for m in {modules} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------ main table


def test_lines_are_in_the_order_of_the_grid_with_dense_first(main):
    wanted = [("Dense", "0 %")] + [(m, s) for m in ("LWM", "BCS") for s in ("90 %", "95 %")]
    found = list(zip(main.Method, main.Sparsity, strict=True))
    assert found == [line for line in wanted for _ in range(2)]
    assert main.Selection.tolist() == ["best_val", "last"] * len(wanted)


def test_means_and_spreads_equal_values_computed_by_hand(main):
    # LWM, best_val: 8 and 10 of 20 images clean, 6 and 8 under PGD, 5 and 7 under AutoAttack.
    line = main[(main.Method == "LWM") & (main.Selection == "best_val")].iloc[0]
    spread = 100 * by_hand.stdev([8 / 20, 10 / 20])
    assert f"{spread:.1f}" == "7.1"
    assert line["Clean (%)"] == "45.0 ± 7.1"
    assert line["PGD (%)"] == "35.0 ± 7.1"
    assert line["AutoAttack (%)"] == "30.0 ± 7.1"
    assert line["Nonzero weights"] == "40"
    assert line["Peak active weights"] == "400"


def test_summary_has_fractions_and_intervals(material):
    line = material.summary.query("method == 'bcs' and selection == 'last'").iloc[0]
    assert line.autoattack_accuracy == pytest.approx((8 / 20 + 10 / 20) / 2)
    assert line.autoattack_spread == pytest.approx(by_hand.stdev([8 / 20, 10 / 20]))
    assert line.autoattack_low < line.autoattack_accuracy < line.autoattack_high


def test_cells_without_results_are_printed_as_not_available(tmp_path):
    material = prepare(tmp_path, skip=lambda cell: cell.method == "lwm" and cell.sparsity == 0.95)
    [group] = tidy.groups(material.study)
    main = study_tables.main(material, group)
    line = main[(main.Method == "LWM") & (main.Sparsity == "95 %")].iloc[0]
    assert line.Seeds == "0 of 2"
    assert line.drop(["Method", "Sparsity", "Selection", "Seeds"]).unique().tolist() == ["n/a"]
    assert "Incomplete: 4 of 20 networks" in study_tables.main_markdown(material)
    pair = compare.compare(material, group).set_index(["sparsity", "theirs"]).loc[0.95, "lwm"]
    assert np.isnan(pair.difference)
    assert pair.verdict == ""
    report.report(material)
    finals.robust_accuracy(material)


def test_one_seed_has_no_spread(tmp_path):
    material = prepare(tmp_path, skip=lambda cell: cell.seed == 1)
    [group] = tidy.groups(material.study)
    line = study_tables.main(material, group).iloc[0]
    assert line["Clean (%)"] == "80.0"
    assert line.Seeds == "1 of 2"


def test_an_attack_that_one_selection_lacks_is_not_available(tmp_path):
    study = load(tmp_path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    results = pd.read_csv(layout.root / "results.csv")
    lacking = (results.attack == "autoattack") & (results.selection == "last")
    results[~lacking].to_csv(layout.root / "results.csv", index=False)
    material = summary.make_material(study, layout, tidy.read(layout.root))
    [group] = tidy.groups(study)
    main = study_tables.main(material, group)
    assert set(main[main.Selection == "last"]["AutoAttack (%)"]) == {"n/a"}
    assert "n/a" not in set(main[main.Selection == "best_val"]["AutoAttack (%)"])
    after = study_tables.component_table(material, group)
    assert set(after[after.Selection == "last"]["after apgd-ce (%)"]) == {"n/a"}


def test_accuracy_under_a_weak_autoattack_is_marked_with_the_reason(tmp_path):
    def weak(cell: Cell, selection: str, attack: str) -> int:
        fewer = (cell.method, cell.seed, selection, attack) == ("lwm", 1, "last", "pgd")
        return correct(cell, selection, attack) - 4 * fewer

    material = prepare(tmp_path, correct=weak)
    [group] = tidy.groups(material.study)
    main = study_tables.main(material, group)
    marked = main[main["AutoAttack (%)"].str.contains(formats.UNRELIABLE)]
    assert set(zip(marked.Method, marked.Selection, strict=True)) == {("LWM", "last")}
    [note] = notes.marks(material, group)
    assert "LWM 95 % last, seed 1: pgd breaks 3 more images than AutoAttack" in note


def test_accuracies_of_potentially_unreliable_networks_are_marked_in_tables(
    tmp_path,
):
    material = prepare(tmp_path, potentially_unreliable="no gradient on 12% of the images")
    [group] = tidy.groups(material.study)
    main = study_tables.main(material, group)
    for column in ("AutoAttack (%)", "PGD (%)"):
        assert main[column].str.endswith(formats.UNRELIABLE).all()
    assert not main["Clean (%)"].str.contains(formats.UNRELIABLE).any()
    others = (
        study_tables.component_table(material, group)["after apgd-ce (%)"],
        study_tables.cost_table(material, group)["AutoAttack (%)"],
        study_tables.comparison_table(material, group)["Accuracy (%)"],
        study_tables.comparison_table(material, group)["Baseline accuracy (%)"],
    )
    for column in others:
        assert column.str.endswith(formats.UNRELIABLE).all()
    [note] = notes.marks(material, group)
    assert note.startswith(formats.UNRELIABLE)
    reason = "no gradient on 12% of the images"
    assert f"Dense last, seed 0: {reason}; seed 1: {reason}." in note


@pytest.mark.parametrize("draw", [finals.robust_accuracy, costs.cost])
def test_potentially_unreliable_networks_are_marked_in_plots(draw, tmp_path):
    def daggers(material):
        passes = {"forward_passes": 10.0, "backward_passes": 10.0}
        material = dataclasses.replace(material, summary=material.summary.assign(**passes))
        texts = [text for panel in draw(material).axes for text in panel.texts]
        return [text for text in texts if text.get_text() == formats.UNRELIABLE]

    assert daggers(prepare(tmp_path, potentially_unreliable="")) == []
    found = daggers(prepare(tmp_path, potentially_unreliable="no gradient"))
    lines = 1 + 2 * 2  # dense, and two methods at two sparsities
    assert len(found) == (lines if draw is finals.robust_accuracy else 2 * (2 + 2 * 2))


def test_notes_name_networks_attacked_without_the_folded_view(tmp_path):
    material = prepare(tmp_path)
    [group] = tidy.groups(material.study)
    message = "Attacked without the folded view, because the folded view could not be used"
    results = material.tidy.results
    results["attacked_on"] = "view"
    assert message not in " ".join(notes.table_notes(material, group))
    results.loc[results.method == "lwm", "attacked_on"] = "network"
    assert f"{message}: LWM." in notes.table_notes(material, group)


def test_note_on_validation_images_that_were_trained_on(material, group):
    assert "train_on_validation" not in " ".join(notes.table_notes(material, group))
    shared = {group.dataset: SimpleNamespace(train_on_validation=True)}
    study = dataclasses.replace(material.study, datasets=shared)
    text = " ".join(notes.table_notes(dataclasses.replace(material, study=study), group))
    assert "Networks were also trained on the validation images (train_on_validation)." in text


def test_notes_describe_the_measurement(material, group):
    text = " ".join(notes.table_notes(material, group))
    for fact in (
        "Small study: not comparable with published numbers",
        "first 20 test images of digits",
        "seeds 0, 1 (n = 2)",
        "worst case per image",
        "Epochs: 4 (Dense); 8 (LWM, BCS). LWM starts from the trained Dense network",
        "best_val = the epoch with the best PGD accuracy on held-out training images",
        "Linf, eps 8/255",
        "PGD 50 steps x 5 restarts",
        "AutoAttack version standard",
        "Device: cpu (1 thread). Code: 0.1.0+0123456789ab (with uncommitted changes)",
    ):
        assert fact in text


def test_latex_is_balanced_and_escaped(material):
    text = study_tables.main_latex(material)
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert re.findall(r"\\begin{(\w+)}", text) == ["table", "tabular"]
    assert re.findall(r"\\end{(\w+)}", text) == ["tabular", "table"]
    assert not re.search(r"(?<!\\)[%#]", text)
    assert text.count("$") % 2 == 0
    assert text.isascii()
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    [columns] = re.findall(r"\\begin{tabular}{(\w+)}", text)
    assert {line.count("&") for line in body.strip().splitlines()} == {len(columns) - 1}
    assert r"45.0 $\pm$ 7.1" in body
    assert r"best\_val" in body


def test_latex_escapes_every_special_character():
    assert markup.escape_latex("a_b & 5 % ± {x} †") == r"a\_b \& 5 \% $\pm$ \{x\} $^{\dagger}$"
    assert markup.escape_latex("\\") == r"\textbackslash{}"


def test_markdown_keeps_trailing_zeros(material, group):
    text = markup.markdown(study_tables.main(material, group))
    assert "| 45.0 ± 7.1 |" in re.sub(" +", " ", text)


def test_several_groups_get_a_table_and_a_row_of_panels_each(tmp_path):
    material = prepare(tmp_path, grid={"objectives": ["at", "trades"]})
    assert study_tables.main_markdown(material).count("\n| Dense") == 4
    assert study_tables.main_latex(material).count(r"\begin{tabular}") == 2
    assert len(finals.robust_accuracy(material).axes) == 2
    assert len(curves.active_weights(material).axes) == 4


# ------------------------------------------------------------------ components and comparison


def test_components_are_in_the_order_of_their_runs(material, group):
    table = summary.components(material, group)
    assert table.columns.tolist()[-2:] == list(COMPONENTS)
    line = table[(table.method == "lwm") & (table.selection == "best_val")].iloc[0]
    assert line["apgd-ce"] == pytest.approx((7 + 9) / 2 / IMAGES)
    assert line["apgd-t"] == pytest.approx((5 + 7) / 2 / IMAGES)


def test_bcs_is_compared_with_every_baseline(material, group):
    table = compare.compare(material, group)
    assert list(zip(table.sparsity, table.theirs, strict=True)) == [
        (sparsity, name) for sparsity in (0.9, 0.95) for name in ("dense", "lwm")
    ]
    assert set(table.ours) == {"bcs"}
    pair = table[table.theirs == "lwm"].iloc[0]
    # In both seeds, the same 4 of 20 images differ: only images make the difference uncertain.
    assert pair.difference == pytest.approx(4 / IMAGES)
    assert 0 < pair.low < 0.2 < pair.high < 0.45
    assert pair.p < pair.p_holm < 0.05
    assert (pair.seeds, pair.verdict) == (2, "ahead")
    assert "+20.0 [+" in markup.markdown(study_tables.comparison_table(material, group))


def test_study_without_autoattack_has_no_comparison_and_an_empty_plot(tmp_path):
    selections = {"best_val": ["clean", "pgd"]}
    path = tmp_path / "study.yaml"
    path.write_text(
        yaml.safe_dump(STUDY | {"evaluation": {**STUDY["evaluation"], "selections": selections}})
    )
    study = loading.load(path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    results = pd.read_csv(layout.root / "results.csv")
    results[results.attack != "autoattack"].to_csv(layout.root / "results.csv", index=False)
    material = summary.make_material(study, layout, tidy.read(layout.root))
    [group] = tidy.groups(study)
    assert study_tables.component_table(material, group) is None
    assert set(study_tables.comparison_table(material, group)["Verdict"]) == {"n/a"}
    assert "No AutoAttack accuracy" in words(finals.robust_accuracy(material))


def test_an_incomplete_autoattack_is_never_printed_as_autoattack(tmp_path):
    attacks = {"autoattack": {"components": [*COMPONENTS]}}
    path = tmp_path / "made_up.yaml"
    data = STUDY | {"evaluation": STUDY["evaluation"] | {"attacks": attacks}}
    path.write_text(yaml.safe_dump(data))
    study = loading.load(path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    material = summary.make_material(study, layout, tidy.read(layout.root))
    texts = [
        report.report(material),
        study_tables.main_markdown(material),
        study_tables.main_latex(material),
    ]
    texts += [words(finals.robust_accuracy(material)), words(costs.cost(material))]
    texts += [words(leaderboard.published(material))]
    for text in texts:
        assert "AutoAttack (apgd-ce, apgd-t only)" in text
        assert not re.search(r"AutoAttack(?! \(apgd-ce, apgd-t only\))", text)


# ------------------------------------------------------------------ statistics


def test_spread_is_the_sample_standard_deviation():
    mean, spread = statistics.mean_and_spread([0.2, 0.4, 0.9])
    assert mean == pytest.approx(0.5)
    assert spread == pytest.approx(by_hand.stdev([0.2, 0.4, 0.9]))
    assert np.isnan(statistics.mean_and_spread([0.2])[1])
    assert np.isnan(statistics.mean_and_spread([])[0])


# ------------------------------------------------------------------ plots


def words(figure) -> str:
    """All text of a figure."""
    parts = [text.get_text() for text in figure.texts]
    for panel in figure.axes:
        parts += [panel.get_title(), panel.get_xlabel(), panel.get_ylabel()]
        parts += [text.get_text() for text in panel.texts]
    return " ".join(" ".join(parts).split())


def drawn(panel, label: str):
    """The line with this label in a panel."""
    [line] = [line for line in panel.lines if line.get_label() == label]
    return line


def test_robust_accuracy_shows_means_dense_and_chance(material):
    figure = finals.robust_accuracy(material)
    [panel] = figure.axes
    bcs, lwm = drawn(panel, "BCS"), drawn(panel, "LWM")
    assert bcs.get_ydata() == pytest.approx([50, 50])
    assert lwm.get_ydata() == pytest.approx([30, 30])
    assert (bcs.get_xdata() != lwm.get_xdata()).all()
    assert [text.get_text() for text in panel.get_xticklabels()] == ["90 %", "95 %"]
    assert drawn(panel, "Dense").get_ydata()[0] == pytest.approx(70)
    # Chance is that of the whole test set, not of the attacked images.
    assert drawn(panel, "chance").get_ydata()[0] == pytest.approx(12.5)
    assert panel.get_ylabel() == "AutoAttack accuracy (%)"


def test_error_bars_of_robust_accuracy_are_the_interval(material):
    [panel] = finals.robust_accuracy(material).axes
    line = material.summary.query("method == 'lwm' and selection == 'best_val'").iloc[0]
    ends = [path.vertices[:, 1] for bars in panel.collections for path in bars.get_paths()]
    wanted = [100 * line.autoattack_low, 100 * line.autoattack_high]
    assert any(end == pytest.approx(wanted) for end in ends if len(end) == 2)


def test_without_flags_files_there_are_means_but_no_intervals(tmp_path):
    study = load(tmp_path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    shutil.rmtree(layout.root / "evaluations")
    material = summary.make_material(study, layout, tidy.read(layout.root))
    [panel] = finals.robust_accuracy(material).axes
    assert drawn(panel, "LWM").get_ydata() == pytest.approx([30, 30])
    assert drawn(panel, "chance").get_ydata()[0] == pytest.approx(12.5)
    [group] = tidy.groups(study)
    table = study_tables.comparison_table(material, group)
    assert set(table["Difference (points)"]) == {"−20.0", "+20.0"}
    assert set(table["Verdict"]) == {"n/a"}


def test_all_weights_are_active_at_the_start_except_with_bcs(material):
    figure = curves.active_weights(material)
    panel = figure.axes[0]
    lwm, bcs = drawn(panel, "LWM"), drawn(panel, "BCS")
    assert lwm.get_xdata().tolist() == list(range(9))
    assert lwm.get_ydata().tolist() == [400] * 5 + [40] * 4
    assert lwm.get_markevery() == [0, 4]
    assert set(bcs.get_ydata()) == {40}
    assert panel.get_yscale() == "log"
    assert [axes.get_title() for axes in figure.axes] == ["sparsity 90 %", "sparsity 95 %"]


def test_layer_density_is_nonzero_weights_over_size(material):
    panel = finals.layer_density(material).axes[0]
    assert drawn(panel, "LWM").get_ydata() == pytest.approx([10, 10, 10])
    assert drawn(panel, "BCS").get_ydata()[0] > 10
    assert [text.get_text() for text in panel.get_xticklabels()] == ["1\n40", "2\n160", "3\n200"]


def test_a_layer_without_nonzero_weights_is_drawn(tmp_path):
    study = load(tmp_path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    layers = pd.read_csv(layout.root / "layers.csv")
    layers.loc[(layers.method == "lwm") & (layers.layer == 3), "nonzero"] = 0
    layers.to_csv(layout.root / "layers.csv", index=False)
    figure = finals.layer_density(summary.make_material(study, layout, tidy.read(layout.root)))
    hollow = drawn(figure.axes[0], "_all_zero")
    assert hollow.get_markerfacecolor() == "none"
    assert len(hollow.get_xdata()) == 1
    assert hollow.get_ydata()[0] > 0


def test_rewiring_is_the_smoothed_mean_over_seeds(tmp_path):
    material = prepare(tmp_path, epochs=12, steps_per_epoch=10)
    figure = curves.rewiring(material)
    assert "moving average of 5 steps" in words(figure)
    steps = material.tidy.steps.query("sparsity == 0.9 and step > 0")
    own = steps.groupby(["seed", "step"]).regrown.sum().groupby("step").mean()
    line = drawn(figure.axes[0], "BCS: regrown")
    assert line.get_ydata()[10] == pytest.approx(own.loc[9:13].mean())
    assert f"BCS renewed {own.sum() / 40:.2g} times" in words(figure)


def test_without_logs_of_rewiring_the_figure_is_a_message(tmp_path):
    material = prepare(tmp_path, grid={"methods": ["dense", "lwm"]})
    assert "No method of this study rewires" in words(curves.rewiring(material))
    [group] = tidy.groups(material.study)
    assert study_tables.comparison_table(material, group) is None


@pytest.mark.parametrize("name", ["layers.csv", "curves.csv"])
def test_figures_of_empty_tables_are_messages(tmp_path, name):
    study = load(tmp_path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    (layout.root / name).write_text("\n")
    material = summary.make_material(study, layout, tidy.read(layout.root))
    draw = {"layers.csv": finals.layer_density, "curves.csv": curves.active_weights}[name]
    assert "have been collected" in words(draw(material))


@pytest.mark.parametrize("draw", [draw for draw, _ in report._DRAW.values()])
def test_every_plot_has_a_caption(material, draw):
    text = words(draw(material))
    for fact in (
        "seeds 0, 1 (n = 2)",
        "Epochs: 4 (Dense); 8 (LWM, BCS)",
        "eps 8/255",
        formats.SMALL,
    ):
        assert fact in text
    assert "cpu (1 thread)" in text
    assert "election" in text


# ------------------------------------------------------------------ connections


def test_survival_equals_the_kaplan_meier_estimate_by_hand():
    # 10 connections: 2 are pruned at age 1, one has age 1 at the end; 3 of 7 are pruned at age 3.
    ages, share = statistics.survival_curve([1, 3, 4], [2, 3, 0], [1, 0, 4])
    assert ages.tolist() == [0, 1, 2, 3, 4]
    assert share == pytest.approx([1, 0.8, 0.8, 0.8 * 4 / 7, 0.8 * 4 / 7])


def test_survival_adds_up_the_connections_of_several_seeds():
    one = statistics.survival_curve([1, 2], [1, 0], [0, 3])[1]
    two = statistics.survival_curve([1, 2, 1, 2], [1, 0, 1, 0], [0, 3, 0, 3])[1]
    assert one == pytest.approx(two)


def test_survival_plot_has_one_line_for_each_method_that_rewires(material):
    figure = connections.survival(material)
    line = drawn(figure.axes[0], "BCS")
    # Two seeds: in each one, two connections are pruned at age 3 and one has age 3 at the end.
    assert line.get_ydata()[-1] == pytest.approx(100 / 3)
    assert "Kaplan-Meier" in words(figure)


def test_density_over_training_has_a_line_for_each_layer_with_three_markers(material):
    figure = connections.density_over_training(material)
    assert len(figure.axes) == 2  # one method that rewires, two sparsities
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    sizes = list(LAYERS.values())[:2]
    assert [line.get_ydata()[-1] for line in lines] == pytest.approx([1000 / n for n in sizes])
    assert lines[0].get_xdata()[0] == 0
    assert lines[0].get_xdata()[-1] == 1


def test_overlap_shows_the_index_and_the_expected_index_of_every_pair(material):
    figure = connections.mask_overlap(material)
    assert len(figure.axes) == 2
    assert [text.get_text() for text in figure.axes[0].texts] == ["25\n(5)"] * 4
    assert figure.axes[0].images[0].get_array().shape == (2, 2)


def test_magnitudes_are_shares_of_the_nonzero_weights(material):
    figure = connections.weight_magnitudes(material)
    line = drawn(figure.axes[0], "BCS")
    assert line.get_ydata().max() == pytest.approx(100)  # all made-up weights are in one bin
    peak = line.get_xdata()[line.get_ydata().argmax()]
    assert 0.05 < peak < 0.4


@pytest.mark.parametrize(
    "draw", [connections.survival, connections.density_over_training, curves.rewiring]
)
def test_without_rewiring_the_plot_has_a_message(draw, tmp_path):
    material = prepare(tmp_path, grid={"methods": ["dense", "lwm"]})
    assert "No method of this study" in words(draw(material))


# ------------------------------------------------------------------ failures, budgets, variants


def test_a_failed_training_is_marked_everywhere(tmp_path):
    study = load(tmp_path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    results = pd.read_csv(layout.root / "results.csv", dtype={"failure": str})
    broken = (results.method == "bcs") & (results.seed == 1) & (results.sparsity == 0.9)
    results["failure"] = results.failure.astype(object)
    results.loc[broken, "failure"] = "training collapsed: it only guessed"
    results.to_csv(layout.root / "results.csv", index=False)
    material = summary.make_material(study, layout, tidy.read(layout.root))
    [group] = tidy.groups(study)
    main = study_tables.main(material, group)
    marked = main[main["Clean (%)"].str.contains(formats.FAILED)]
    assert set(zip(marked.Method, marked.Sparsity, strict=True)) == {("BCS", "90 %")}
    text = " ".join(notes.marks(material, group))
    assert "BCS 90 % best_val, seed 1: training collapsed: it only guessed" in text
    lines = finals.robust_accuracy(material).axes[0].lines
    assert sum(line.get_marker() == "x" and len(line.get_xdata()) for line in lines) == 1


def test_a_missed_budget_is_marked(tmp_path):
    material = prepare(tmp_path, layers=[("0", 40), ("3", 160), ("11", 201)])
    [group] = tidy.groups(material.study)
    assert not study_tables.main(material, group)["Clean (%)"].str.contains(formats.MISSED).any()
    material.summary.loc[2, "budget"] = "seed 0: 50 nonzero weights, 40 asked"
    assert "50 nonzero weights, 40 asked" in " ".join(notes.marks(material, group))
    main = study_tables.main(material, group)
    assert main["Clean (%)"][2].endswith(formats.MISSED)
    line = material.summary.loc[2]
    reached = f"({100 * (1 - line.nonzero / line.prunable):.1f} % reached)"
    assert main["Sparsity"][2] == f"{formats.percent(line.sparsity)} {reached}"
    assert not main["Sparsity"].drop(2).str.contains("reached").any()
    costs = study_tables.cost_table(material, group)
    assert [reached in text for text in costs["Sparsity"]].count(True) == 1


def test_a_missed_budget_is_marked_in_comparisons(tmp_path):
    material = prepare(tmp_path, layers=[("0", 40), ("3", 160), ("11", 201)])
    [group] = tidy.groups(material.study)
    missed = (material.summary.method == "lwm") & (material.summary.sparsity == 0.95)
    material.summary.loc[missed, "budget"] = "seed 0: 50 nonzero weights, 40 asked"
    table = study_tables.comparison_table(material, group)
    marked = table["Baseline accuracy (%)"].str.endswith(formats.MISSED)
    assert table[marked][["Sparsity", "Baseline"]].to_numpy().tolist() == [["95 %", "LWM"]]
    assert not table["Accuracy (%)"].str.contains(formats.MISSED).any()


def test_variants_are_compared_with_the_plain_method(tmp_path):
    path = tmp_path / "made_up.yaml"
    variant = {"other": {"base": "bcs", "label": "BCS, other", "momentum": "reset"}}
    grid = STUDY["grid"] | {"methods": ["dense", "bcs", "other"]}
    path.write_text(yaml.safe_dump(STUDY | {"grid": grid, "methods": variant}))
    study = loading.load(path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    material = summary.make_material(study, layout, tidy.read(layout.root))
    [group] = tidy.groups(study)
    found = compare.ablations(material, group)
    assert list(zip(found.sparsity, found.ours, found.theirs, strict=True)) == [
        (0.9, "other", "bcs"),
        (0.95, "other", "bcs"),
    ]
    # Correct clean images: 8 and 10 of 20 for the variant, 12 and 14 for bcs.
    assert found.difference.tolist() == pytest.approx([-0.2, -0.2])
    assert set(compare.compare(material, group).theirs) == {"dense"}
    assert "BCS, other" in report.report(material)
    assert "### Ablations under AutoAttack" in report.report(material)


def test_panels_without_networks_are_left_out(tmp_path):
    path = tmp_path / "made_up.yaml"
    blocks = [
        STUDY["grid"] | {"sparsities": [0.9]},
        STUDY["grid"] | {"objectives": ["trades"], "sparsities": [0.95], "seeds": [3]},
    ]
    path.write_text(yaml.safe_dump(STUDY | {"grid": blocks}))
    study = loading.load(path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    material = summary.make_material(study, layout, tidy.read(layout.root))
    visible = [panel.get_visible() for panel in curves.active_weights(material).axes]
    assert visible == [True, False, False, True]
    first, second = tidy.groups(study)
    assert tidy.sparsities(study, second) == [0.95]
    assert "seeds 3 (n = 1)" in " ".join(notes.table_notes(material, second))
    assert "seeds 0, 1 (n = 2)" in " ".join(notes.table_notes(material, first))


def test_methods_look_different_and_have_the_same_look_in_every_study(tmp_path):
    all_methods = style.looks(load(tmp_path, methods=["dense", "lwm", "admm", "hydra", "bcs"]))
    few = style.looks(load(tmp_path, methods=["bcs", "lwm"]))
    assert few["lwm"] == all_methods["lwm"]
    for part in ("color", "marker", "linestyle"):
        assert len({str(getattr(look, part)) for look in all_methods.values()}) == 5
    unknown = [style._look("lwm", index) for index in range(40)]
    assert len({(look.color, look.marker, str(look.linestyle)) for look in unknown}) == 40


@pytest.mark.parametrize(
    ("eps", "text"), [(8 / 255, "8/255"), (0.15, "0.15"), (1 / 255, "1/255"), (1.0, "255/255")]
)
def test_radius(eps, text):
    assert formats.radius(eps) == text


def test_sparsities_are_printed_unrounded():
    assert [formats.percent(s) for s in (0.9, 0.995, 0.57, 0.9999)] == [
        "90 %",
        "99.5 %",
        "57 %",
        "99.99 %",
    ]


# ---------------------------------------------------------------- paired tests, ranks, failures


def robust(levels):
    """Make a function `correct` with given numbers of images under AutoAttack, by method."""

    def count(cell: Cell, selection: str, attack: str) -> int:
        return levels.get(cell.method, 10) if attack == "autoattack" else 18

    return count


def test_p_values_and_intervals_never_contradict_each_other(tmp_path):
    # One seed of BCS is 12 images ahead, the other is 2 behind: the order is not certain.
    by_seed = [{"bcs": 20, "lwm": 8}, {"bcs": 8, "lwm": 10}]
    material = prepare(tmp_path, correct=lambda *key: robust(by_seed[key[0].seed])(*key))
    [group] = tidy.groups(material.study)
    table = compare.compare(material, group)
    pair = table[table.theirs == "lwm"].iloc[0]
    assert pair.difference == pytest.approx(0.25)
    assert pair.low < 0 < pair.high
    assert pair.p > 0.05
    assert pair.verdict == "not separated"
    assert (
        not study_tables.main(material, group)["AutoAttack (%)"]
        .str.contains("**", regex=False)
        .any()
    )
    assert compare.ranks(material)[["low", "high"]].to_numpy().tolist() == [[1, 2], [1, 2]]


def test_one_seed_gives_no_evidence_about_methods(tmp_path):
    material = prepare(
        tmp_path,
        grid={"seeds": [0]},
        correct=robust({"bcs": 18, "lwm": 1}),
    )
    [group] = tidy.groups(material.study)
    shown = study_tables.comparison_table(material, group)
    assert set(shown["p"]) == set(shown["p (Holm)"]) == {"n/a (one seed)"}
    assert set(shown["Verdict"]) == {"one seed"}
    assert shown["Difference (points)"].str.contains("[", regex=False).all()
    assert (
        not study_tables.main(material, group)["AutoAttack (%)"]
        .str.contains("**", regex=False)
        .any()
    )
    assert compare.ranks(material)[["low", "high"]].to_numpy().tolist() == [[1, 2], [1, 2]]
    assert any(note.startswith("One seed:") for note in notes.table_notes(material, group))
    assert "over test images only, because there is one seed" in report.report(material)


@pytest.mark.parametrize(("others", "wanted"), [(1, "bcs"), (6, None)])
def test_a_winner_is_corrected_for_the_number_of_others(tmp_path, others, wanted):
    # p is about 0.02 for each pair: significant for one pair, but not for six pairs.
    names = {f"lwm_{i}": {"base": "lwm"} for i in range(others)}
    grid = STUDY["grid"] | {"methods": ["bcs", *names], "sparsities": [0.9]}
    path = tmp_path / "made_up.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"grid": grid, "methods": names}))
    study = loading.load(path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), robust({"bcs": 15})).write()
    material = summary.make_material(study, layout, tidy.read(layout.root))
    [group] = tidy.groups(study)
    pairs = compare.compare(material, group)
    assert pairs[pairs.theirs != "dense"].p.between(0.01, 0.045).all()
    assert compare.winner(material, group, 0.9) == wanted


def test_a_winner_is_bold_only_if_every_difference_is_separated(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    clear = prepare(tmp_path / "a", correct=robust({"bcs": 18}))
    [group] = tidy.groups(clear.study)
    shown = study_tables.main(clear, group)
    bold = shown["AutoAttack (%)"].str.startswith("**")
    wanted = (shown.Method == "BCS") & (shown.Selection == clear.primary)
    assert bold.tolist() == wanted.tolist()
    assert any(note.startswith("Bold:") for note in notes.table_notes(clear, group))
    assert r"\textbf{90.0" in study_tables.main_latex(clear)
    close = prepare(tmp_path / "b", correct=robust({"bcs": 11}))
    assert (
        not study_tables.main(close, group)["AutoAttack (%)"].str.contains("*", regex=False).any()
    )


def test_ranks_share_ties(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    table = compare.ranks(prepare(tmp_path / "a", correct=robust({"bcs": 15})))
    assert table.set_index("method")["rank"].to_dict() == {"bcs": 1.0, "lwm": 2.0}
    assert set(table.cells) == {2}
    tied = compare.ranks(prepare(tmp_path / "b", correct=robust({})))
    assert set(tied["rank"]) == {1.5}


def test_differences_rule_out_ranks(tmp_path):
    grid = STUDY["grid"] | {"methods": ["lwm", "lwm_b", "bcs"], "sparsities": [0.9]}
    path = tmp_path / "made_up.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"grid": grid, "methods": {"lwm_b": {"base": "lwm"}}}))
    study, levels = loading.load(path), robust({"bcs": 18, "lwm": 5, "lwm_b": 6})
    layout = MadeUp(study, Layout(tmp_path / "made_up"), levels).write()
    material = summary.make_material(study, layout, tidy.read(layout.root))
    found = compare.ranks(material).set_index("method")
    assert found["rank"].to_dict() == {"bcs": 1, "lwm_b": 2, "lwm": 3}
    assert found.index.tolist() == ["bcs", "lwm_b", "lwm"]
    assert found["low"].to_dict() == {"bcs": 1, "lwm_b": 2, "lwm": 2}
    assert found["high"].to_dict() == {"bcs": 1, "lwm_b": 3, "lwm": 3}
    assert study_tables.rank_table(material)["Not ruled out"].tolist() == [
        "1.0 to 1.0",
        "2.0 to 3.0",
        "2.0 to 3.0",
    ]


def test_verdicts_follow_the_corrected_p_value(tmp_path):
    material = prepare(tmp_path, correct=robust({"bcs": 3, "lwm": 19, "dense": 3}))
    [group] = tidy.groups(material.study)
    pairs = compare.compare(material, group).set_index(["sparsity", "theirs"])
    assert pairs.verdict.to_dict() == {
        (0.9, "dense"): "not separated",
        (0.9, "lwm"): "behind",
        (0.95, "dense"): "not separated",
        (0.95, "lwm"): "behind",
    }
    assert pairs.p_holm.tolist() == statistics.holm(pairs.p.tolist())
    assert (pairs.detectable > 0).all()


def test_methods_with_different_seeds_are_not_paired(tmp_path):
    material = prepare(tmp_path, skip=lambda cell: (cell.method, cell.seed) == ("lwm", 1))
    [group] = tidy.groups(material.study)
    pairs = compare.compare(material, group).set_index(["sparsity", "theirs"])
    assert (pairs.xs("lwm", level="theirs")[["verdict", "seeds"]] == ["", 0]).all().all()
    assert pairs.xs("lwm", level="theirs").p.isna().all()
    assert (pairs.xs("dense", level="theirs").seeds == 2).all()
    assert compare.winner(material, group, 0.9) is None


def test_ranks_leave_out_incomplete_cells(tmp_path):
    material = prepare(tmp_path, skip=lambda cell: (cell.method, cell.sparsity) == ("lwm", 0.95))
    assert set(compare.ranks(material).cells) == {1}


def test_comparison_has_p_values(material, group):
    table = compare.compare(material, group)
    assert table.p.between(0, 1).all()
    assert (table.p_holm >= table.p).all()


def test_failed_networks_are_printed_as_failed(tmp_path):
    material = prepare(tmp_path)
    [group, *_] = tidy.groups(material.study)
    gone = material.tidy.results.method != "lwm"
    lost = [c for c in material.study.cells() if c.method == "lwm"]
    failures = pd.DataFrame([vars(c) | {"reason": "it broke"} for c in lost])
    changed = dataclasses.replace(
        material.tidy, results=material.tidy.results[gone], failures=failures
    )
    summed = summary.summarise(material.study, changed, material.outcomes)
    material = dataclasses.replace(material, tidy=changed, summary=summed)
    shown = study_tables.main(material, group).set_index("Method")
    assert set(shown.loc["LWM", "AutoAttack (%)"]) == {f"failed {formats.FAILED}"}
    message = " ".join(notes.table_notes(material, group))
    assert f"seed {lost[0].seed}: it broke" in message


def test_cost_table_and_plot_have_every_line(material, group):
    table = study_tables.cost_table(material, group)
    assert len(table) == len(tidy.lines(material.study, group))
    assert set(table["Peak active weights"][table.Method == "BCS"]) != {"n/a"}
