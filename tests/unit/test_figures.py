"""Tables and the report from small artificial results; no network is trained or attacked."""

import dataclasses
import re
import shutil
import statistics as by_hand
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from made_up import COMPONENTS, IMAGES, STUDY, MadeUp, correct, load, prepare, words
from robsparse.base.errors import UsageError
from robsparse.figures import PAGE, PLOTS, REPORT, TABLES, report
from robsparse.figures.data import compare, reliability, statistics, summary, tidy
from robsparse.figures.plots import costs, curves, finals, leaderboard, style
from robsparse.figures.tables import one_column, study_tables
from robsparse.figures.text import formats, markup, notes
from robsparse.records.rows import wilson_interval
from robsparse.study import loading
from robsparse.study.cells import Cell, Layout


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


DAGGER = formats.MARKS[reliability.UNRELIABLE]


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
    assert after - before == {layout.root / name for name in (*TABLES, *PLOTS, REPORT, PAGE)}
    assert str(layout.root / REPORT) in text
    assert str(layout.root / "tables/main.md") in text
    content = {name: (layout.root / name).read_bytes() for name in (*TABLES, *PLOTS, REPORT, PAGE)}
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
    assert all((layout.root / name).stat().st_size for name in (*TABLES, *PLOTS, REPORT, PAGE))
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
    shown = {name for name in PLOTS if not name.endswith(".caption.md")}
    tables = {"tables/main.tex", "tables/main_notes.tex", "tables/main.csv"}
    assert set(links) == shown | tables


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


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("results.csv", "accuracy"),
        ("results.csv", "attack_seconds"),
        ("layers.csv", "nonzero"),
        ("curves.csv", "epoch"),
        ("weights.csv", "low"),
        ("overlap.csv", "jaccard"),
        ("steps.parquet", "age"),
    ],
)
def test_word_in_the_place_of_a_number_names_file_row_column_and_word(tmp_path, name, column):
    study = load(tmp_path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    path = layout.root / name
    table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    table = table.reset_index(drop=True).astype({column: object})
    table.loc[2, column] = "many"
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.astype({column: str}).to_parquet(path)
    with pytest.raises(UsageError) as caught:
        report.write(study, layout, layout.root)
    assert str(caught.value) == (
        f"{path}: row 4: {column} = many: expected a number; run `robsparse collect CONFIG` again"
    )
    assert not (layout.root / REPORT).exists()


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
    marked = main[main["AutoAttack (%)"].str.contains(DAGGER)]
    assert set(zip(marked.Method, marked.Selection, strict=True)) == {("LWM", "last")}
    [note] = notes.marks(material, group)
    assert "LWM 95 % last, seed 1: pgd breaks 3 more images than AutoAttack" in note
    assert note.startswith(f"{DAGGER} unreliable")  # 3 of 20 images


def test_accuracies_of_potentially_unreliable_networks_are_marked_in_tables(
    tmp_path,
):
    material = prepare(tmp_path, potentially_unreliable="no gradient on 12% of the images")
    [group] = tidy.groups(material.study)
    main = study_tables.main(material, group)
    for column in ("AutoAttack (%)", "PGD (%)"):
        assert main[column].str.endswith(DAGGER).all()
    assert not main["Clean (%)"].str.contains(DAGGER).any()
    others = (
        study_tables.component_table(material, group)["after apgd-ce (%)"],
        study_tables.cost_table(material, group)["AutoAttack (%)"],
        study_tables.comparison_table(material, group)["Accuracy (%)"],
        study_tables.comparison_table(material, group)["Baseline accuracy (%)"],
    )
    for column in others:
        assert column.str.endswith(DAGGER).all()
    [note] = notes.marks(material, group)
    assert note.startswith(DAGGER)
    reason = "no gradient on 12% of the images"
    assert f"Dense last, seed 0: {reason}; seed 1: {reason}." in note


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


def test_table_of_a_column_is_balanced_and_escaped(material):
    text = one_column.main_latex(material)
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert re.findall(r"\\begin{(\w+)}", text) == ["table", "tabular"]
    assert re.findall(r"\\end{(\w+)}", text) == ["tabular", "table"]
    assert text.count("$") % 2 == 0
    assert text.isascii()
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in lines} == {4}
    assert len(lines) == 1 + 1 + 2 * 2  # heads, dense, and two methods at two sparsities
    assert r"45.0}\,{\scriptsize$\pm$7.1}" in text


def test_caption_of_a_column_is_short_and_its_notes_are_outside(material):
    [caption] = re.findall(r"\\caption{(.*)}\n", one_column.main_latex(material))
    assert len(caption.split()) < 50
    assert "20 test images" in caption
    assert r"Linf eps 8/255; mean $\pm$ standard deviation of 2 seeds" in caption
    assert "worst case per image" not in caption
    assert "worst case per image" in one_column.notes_latex(material)
    assert one_column.notes_latex(material).isascii()


def test_best_and_second_best_are_marked_and_unreliable_networks_are_neither(tmp_path):
    names = {f"lwm_{i}": {"base": "lwm"} for i in range(2)}
    grid = STUDY["grid"] | {"methods": ["bcs", "lwm", *names], "sparsities": [0.9]}
    path = tmp_path / "made_up.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"grid": grid, "methods": names}))
    study, levels = loading.load(path), robust({"bcs": 9, "lwm": 12, "lwm_0": 14, "lwm_1": 5})
    layout = MadeUp(study, Layout(tmp_path / "made_up"), levels).write()
    material = summary.make_material(study, layout, tidy.read(layout.root))
    rows = material.summary[material.summary.selection == "best_val"].set_index(
        "method", drop=False
    )
    places = one_column._ranked(material, rows, "autoattack")
    assert places == {"lwm_0": one_column._BEST, "lwm": one_column._SECOND}
    rows.loc["lwm_0", "reliability"] = reliability.UNRELIABLE
    places = one_column._ranked(material, rows, "autoattack")
    assert places == {"lwm": one_column._BEST, "bcs": one_column._SECOND}
    rows.loc["bcs", "autoattack_accuracy"] = rows.autoattack_accuracy["lwm"]
    assert one_column._ranked(material, rows, "autoattack") == dict.fromkeys(
        ("bcs", "lwm"), one_column._BEST
    )


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX: nothing is typeset")
def test_table_fits_a_column_when_it_is_typeset(material, tmp_path):
    (tmp_path / "main.tex").write_text(one_column.main_latex(material))
    (tmp_path / "notes.tex").write_text(one_column.notes_latex(material))
    (tmp_path / "paper.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs}\textwidth 3.25in\columnwidth 3.25in"
        r"\begin{document}\input{main}\clearpage\input{notes}\end{document}"
    )
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout.split("[1")[0]


def test_latex_escapes_every_special_character():
    assert markup.escape_latex("a_b & 5 % ± {x} †") == r"a\_b \& 5 \% $\pm$ \{x\} $^{\dagger}$"
    assert markup.escape_latex("\\") == r"\textbackslash{}"


def test_markdown_keeps_trailing_zeros(material, group):
    text = markup.markdown(study_tables.main(material, group))
    assert "| 45.0 ± 7.1 |" in re.sub(" +", " ", text)


def test_several_groups_get_a_table_and_a_row_of_panels_each(tmp_path):
    material = prepare(tmp_path, grid={"objectives": ["at", "trades"]})
    assert study_tables.main_markdown(material).count("\n| Dense") == 4
    assert one_column.main_latex(material).count(r"\begin{tabular}") == 2
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
        one_column.main_latex(material),
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
    assert r"\textbf{90.0" in one_column.main_latex(clear)
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
    assert set(table["Model (bytes)"]) == {"1"}


def test_cost_table_has_the_latency_if_it_was_measured(material, group):
    assert "Latency (ms)" not in study_tables.cost_table(material, group)
    measured = (material.summary.method == "bcs").map({True: 0.12345, False: np.nan})
    material = dataclasses.replace(material, summary=material.summary.assign(latency_ms=measured))
    table = study_tables.cost_table(material, group)
    assert set(table["Latency (ms)"][table.Method == "BCS"]) == {"0.123"}
    assert set(table["Latency (ms)"][table.Method != "BCS"]) == {"n/a"}
