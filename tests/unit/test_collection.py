"""Collection: contradictions in result rows, weak attacks, records that do not match."""

import hashlib
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robsparse.base.errors import UsageError
from robsparse.base.files import file_checksum, read_json, write_json
from robsparse.collection import collect, gather, overlap, tables
from robsparse.collection.plausibility import (
    find_contradictions,
    mark_missed_budgets,
    mark_weak_attacks,
)
from robsparse.records.columns import (
    COLLECTED,
    LIFETIME_COLUMNS,
    MANIFEST,
    OVERLAP_COLUMNS,
    STEP_COLUMNS,
)
from robsparse.records.evaluation_record import Record, write_record
from robsparse.records.rows import Row, wilson_interval
from robsparse.study import fingerprints
from robsparse.study.cells import Layout

MODELS = [("bcs", 0.9, 0, 90), ("bcs", 0.9, 1, 80), ("dense", 0.0, 0, 95)]
# (attack, component): by how many of 100 images the attack reduces the clean accuracy
ATTACKS = {
    ("clean", "all"): 0,
    ("pgd", "all"): 30,
    ("autoattack", "apgd-ce"): 30,
    ("autoattack", "square"): 35,
    ("autoattack", "all"): 35,
}


def row(model, n_correct, attack="clean", component="all", **changes):
    method, sparsity, seed = model
    low, high = wilson_interval(n_correct, 100)
    values = {
        "dataset": "digits",
        "arch": "small_cnn",
        "method": method,
        "objective": "at",
        "sparsity": sparsity,
        "seed": seed,
        "selection": "last",
        "attack": attack,
        "component": component,
        "accuracy": n_correct / 100,
        "n_correct": n_correct,
        "n_examples": 100,
        "ci_low": low,
        "ci_high": high,
        "norm": "Linf",
        "eps": 0.0 if attack == "clean" else 0.1,
        "version": "standard" if attack == "autoattack" else None,
        "max_perturbation": (0.0 if attack == "clean" else 0.1) if component == "all" else None,
        "sparsity_reached": sparsity,
        "nonzero": round(1000 * (1 - sparsity)),
        "prunable": 1000,
        "layers": 4,
        "dense_macs": 5000,
        "sparse_macs": 500,
        "model_bytes": 4096,
        "settings_digest": "d",
        "code_version": "0.1.0",
        "code_digest": "k",
        "code_dirty": False,
        "libraries": "torch=2",
        "data_checksum": "c",
        "model_checksum": "m",
    }
    return Row(**values | changes)


def rows():
    return [
        row((method, sparsity, seed), clean - fewer, attack, component)
        for method, sparsity, seed, clean in MODELS
        for (attack, component), fewer in ATTACKS.items()
    ]


@pytest.fixture
def table():
    return pd.DataFrame([r.model_dump() for r in rows()])


def where(table, attack, component="all", method="bcs", seed=0):
    """Index of one row."""
    found = table[
        (table.attack == attack)
        & (table.component == component)
        & (table.method == method)
        & (table.seed == seed)
    ]
    (index,) = found.index
    return index


def change(table, attack, component="all", **values):
    index = where(table, attack, component)
    for column, value in values.items():
        table.loc[index, column] = value
    return table


PGD = "digits/small_cnn/bcs/at/0.9/0/last/pgd/all"


# ---------------------------------------------------------------- contradictions


def test_table_of_these_tests_has_no_contradiction(table):
    assert find_contradictions(table) == []


CONTRADICTIONS = {
    "accuracy is not the share": ("pgd", {"accuracy": 0.61}, "accuracy 0.61 is not 60/100"),
    "count is not the share": ("pgd", {"n_correct": 59}, "accuracy 0.6 is not 59/100"),
    "interval above": ("pgd", {"ci_low": 0.65}, "accuracy 0.6 is outside its interval"),
    "interval below": ("pgd", {"ci_high": 0.55}, "accuracy 0.6 is outside its interval"),
    "robust above clean": (
        "pgd",
        {"n_correct": 91, "accuracy": 0.91, "ci_high": 0.95},
        "91 correct under attack, but 90 without",
    ),
    "perturbation over eps": (
        "pgd",
        {"max_perturbation": 0.1001},
        "perturbation 0.1001 is larger than eps 0.1",
    ),
    "perturbed clean images": ("clean", {"max_perturbation": 0.01}, "larger than eps 0.0"),
    "NaN images": ("pgd", {"nan_count": 2}, "2 NaN values in adversarial images"),
}


@pytest.mark.parametrize("wrong", CONTRADICTIONS)
def test_message_about_an_impossible_row_starts_with_its_key(wrong, table):
    attack, values, expected = CONTRADICTIONS[wrong]
    found = find_contradictions(change(table, attack, **values))
    assert len(found) == 1
    assert found[0].startswith(f"digits/small_cnn/bcs/at/0.9/0/last/{attack}/all: ")
    assert expected in found[0]


def test_accuracy_that_is_nan_is_a_contradiction(table):
    assert find_contradictions(change(table, "pgd", accuracy=np.nan))


def test_components_are_checked_like_whole_attacks(table):
    (wrong,) = find_contradictions(change(table, "autoattack", "square", n_correct=50))
    assert wrong.endswith("autoattack/square: accuracy 0.55 is not 50/100")


def test_robust_accuracy_is_compared_with_clean_accuracy_of_the_same_network(table):
    # Seed 0 has 90 correct images and seed 1 has 80.
    index = where(table, "pgd", seed=1)
    table.loc[index, ["n_correct", "accuracy", "ci_low", "ci_high"]] = [85, 0.85, 0.8, 0.9]
    (wrong,) = find_contradictions(table)
    assert "at/0.9/1/last/pgd/all: 85 correct under attack, but 80 without" in wrong


def test_missed_budget_is_marked_if_it_is_more_than_one_weight_for_each_layer(table):
    for nonzero, expected in ((95, True), (96, False), (104, False), (105, True)):
        marked = mark_missed_budgets(change(table, "pgd", nonzero=nonzero))
        index = where(table, "pgd")
        assert marked.budget[index] == (f"{nonzero} nonzero weights, 100 asked" if expected else "")
        assert (marked.budget.drop(index) == "").all()


def test_rounding_of_the_perturbation_is_allowed(table):
    assert find_contradictions(change(table, "pgd", max_perturbation=0.1 + 5e-7)) == []


def test_unknown_perturbation_is_no_contradiction(table):
    assert find_contradictions(change(table, "pgd", max_perturbation=np.nan)) == []


def test_two_rows_with_one_key_are_a_contradiction(table):
    twice = pd.concat([table, table.loc[[where(table, "pgd")]]], ignore_index=True)
    assert find_contradictions(twice) == [f"{PGD}: two rows have this key"]


def test_network_without_clean_accuracy_is_a_contradiction(table):
    found = find_contradictions(table.drop(index=where(table, "clean")))
    assert len(found) == 4
    assert all("/0.9/0/last/" in wrong for wrong in found)
    assert all(wrong.endswith("no clean accuracy of this network") for wrong in found)


def test_clean_accuracy_of_another_selection_does_not_count(table):
    assert "no clean accuracy" in find_contradictions(change(table, "pgd", selection="best_val"))[0]


def test_rows_of_one_data_set_must_have_the_same_data_checksum(table):
    found = find_contradictions(change(table, "pgd", data_checksum="other"))
    assert found == ["digits: data_checksum differs between rows: ['c', 'other']"]
    other = table.assign(dataset="letters", data_checksum="x")
    assert find_contradictions(pd.concat([table.assign(data_checksum="c"), other])) == []


def test_rows_of_one_data_set_must_have_the_same_number_of_images(table):
    table.loc[where(table, "pgd"), ["n_examples", "n_correct"]] = [50, 30]
    assert find_contradictions(table) == ["digits: n_examples differs between rows: ['100', '50']"]


def test_all_contradictions_are_reported(table):
    change(table, "pgd", nan_count=1, ci_high=0.1)
    assert len(find_contradictions(change(table, "clean", accuracy=0.1))) >= 3


# ---------------------------------------------------------------- weak attacks


def test_network_is_potentially_unreliable_if_another_attack_beats_autoattack(table):
    change(table, "pgd", n_correct=50, accuracy=0.5)
    change(table, "clean", potentially_unreliable="no gradient")
    marked = mark_weak_attacks(table)
    reason = "pgd breaks 5 more images than AutoAttack"
    own = (table.method == "bcs") & (table.seed == 0)
    assert set(marked.potentially_unreliable[own & (table.attack != "clean")]) == {reason}
    assert marked.potentially_unreliable[where(table, "clean")] == f"no gradient; {reason}"
    assert (marked.potentially_unreliable[~own] == "").all()
    rest = table.drop(columns="potentially_unreliable")
    pd.testing.assert_frame_equal(marked.drop(columns="potentially_unreliable"), rest)
    part = table.assign(version=table.version.replace("standard", "standard, apgd-ce only"))
    reason = "pgd breaks 5 more images than AutoAttack (standard, apgd-ce only)"
    assert mark_weak_attacks(part).potentially_unreliable[where(table, "pgd")] == reason


def test_network_is_not_flagged_if_autoattack_is_the_strongest_attack_or_equal(table):
    assert (mark_weak_attacks(table).potentially_unreliable == "").all()
    change(table, "pgd", n_correct=55, accuracy=0.55)
    assert (mark_weak_attacks(table).potentially_unreliable == "").all()


@pytest.mark.parametrize("threat", [{"eps": 0.2}, {"norm": "L2"}])
def test_attacks_of_another_threat_are_not_compared(threat, table):
    change(table, "pgd", n_correct=10, accuracy=0.1, **threat)
    assert (mark_weak_attacks(table).potentially_unreliable == "").all()


def test_attacks_are_compared_only_on_the_same_network(table):
    index = where(table, "pgd", seed=1)
    table.loc[index, "n_correct"] = 10  # 45 is what AutoAttack leaves of that model
    marked = mark_weak_attacks(table)
    assert marked.potentially_unreliable[where(table, "autoattack", seed=1)].startswith(
        "pgd breaks 35 more"
    )
    assert marked.potentially_unreliable[where(table, "autoattack")] == ""
    assert marked.potentially_unreliable[where(table, "autoattack", method="dense")] == ""


def test_no_network_is_flagged_without_autoattack(table):
    marked = mark_weak_attacks(table[table.attack != "autoattack"])
    assert (marked.potentially_unreliable == "").all()


# ---------------------------------------------------------------- reading and writing


@pytest.fixture
def study(study_data, load_study):
    study_data["grid"] |= {"methods": ["dense", "bcs"], "seeds": [0, 1]}
    study_data["evaluation"]["selections"] = {"last": ["clean", "pgd", "autoattack"]}
    return load_study(study_data)


def write(study, layout, **changes):
    """Write records for the cells of the study that are in MODELS."""
    cells = {(c.method, c.seed): c for c in study.cells()}
    for method, sparsity, seed, clean in MODELS:
        cell = cells[method, seed]
        now = fingerprints.evaluation(study, cell, "last")
        own = [
            row(
                (method, sparsity, seed),
                clean - fewer,
                attack,
                component,
                **{"settings_digest": now.digest, "code_digest": now.code} | changes,
            )
            for (attack, component), fewer in ATTACKS.items()
        ]
        layers = [{"layer": "0", "size": 1000, "nonzero": own[0].nonzero, "positions": 1}]
        bins = [{"low": 0.1, "high": 0.2, "count": own[0].nonzero}]
        flags = layout.flags(cell, "last")
        flags.parent.mkdir(parents=True, exist_ok=True)
        outcomes = {f"{r.attack}.{r.component}": np.arange(100) < r.n_correct for r in own}
        np.savez(flags, labels=np.zeros(100), **outcomes)
        sanity_checks = {"examined": 50.0, "zero_gradient": 0.02}
        record = Record(own, layers, bins, sanity_checks, file_checksum(flags))
        write_record(layout.evaluation(cell, "last"), record)


def test_collected_tables_have_every_row_and_missing_networks_are_listed(study, tmp_path):
    layout = Layout(tmp_path / "run")
    write(study, layout)
    text = collect.collect(study, layout, layout.root)
    assert "collected 15 rows" in text
    assert "missing, printed as n/a: digits/small_cnn/dense/at/s0.0000/seed1 last" in text
    for found in (
        pd.read_csv(layout.root / "results.csv"),
        pd.read_parquet(layout.root / "results.parquet"),
    ):
        assert len(found) == 15
        assert list(found.columns) == [*Row.model_fields, "other_code", "budget"]
        assert sorted(found.n_correct) == sorted(r.n_correct for r in rows())
    layers = pd.read_csv(layout.root / "layers.csv")
    assert layers.nonzero.tolist() == [1000, 100, 100]
    bins = pd.read_csv(layout.root / "weights.csv")
    assert bins["count"].tolist() == [1000, 100, 100]
    sanity_checks = pd.read_csv(layout.root / "sanity_checks.csv")
    assert sanity_checks.zero_gradient.tolist() == [0.02] * 3
    assert sanity_checks.largest_perturbation.tolist() == [1.0] * 3
    assert sanity_checks.nan_count.tolist() == [0] * 3
    assert list(pd.read_csv(layout.root / "overlap.csv")) == list(OVERLAP_COLUMNS)
    for name, columns in (
        ("steps", STEP_COLUMNS),
        ("lifetimes", LIFETIME_COLUMNS),
    ):
        found = pd.read_parquet(layout.root / f"{name}.parquet")
        assert list(found)[-len(columns) :] == list(columns)


def test_nothing_is_written_if_there_is_a_contradiction(study, tmp_path):
    layout = Layout(tmp_path / "run")
    write(study, layout, nan_count=1)
    with pytest.raises(UsageError) as caught:
        collect.collect(study, layout, layout.root)
    lines = str(caught.value).splitlines()
    assert len(lines) == 15
    assert all(line.startswith(f"{layout.root}: digits/") for line in lines)
    assert not list(layout.root.glob("*.*"))


def test_record_made_with_other_settings_is_refused(study, tmp_path):
    layout = Layout(tmp_path / "run")
    write(study, layout, settings_digest="stale")
    with pytest.raises(UsageError, match="made with other settings; run snakemake first"):
        collect.collect(study, layout, layout.root)


def test_error_without_results_is_one_line(study, tmp_path):
    with pytest.raises(UsageError, match="no finished evaluation of the study 'tiny' found"):
        collect.collect(study, Layout(tmp_path / "run"), tmp_path)


@pytest.mark.parametrize("content", ['{"rows": [], "layers": []}', "{", "[]"])
def test_error_about_a_damaged_record_is_one_line_with_its_path(content, study, tmp_path):
    layout = Layout(tmp_path / "run")
    write(study, layout)
    path = layout.evaluation(study.cells()[0], "last")
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        collect.collect(study, layout, layout.root)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- records, weights, flags


@pytest.fixture
def finished(study, tmp_path):
    """Records of evaluations, with the weights that were attacked and the records of training."""
    layout = Layout(tmp_path / "run")
    content = b"weights"
    checksum = hashlib.sha256(content).hexdigest()[:16]
    write(study, layout, model_checksum=checksum)
    for cell in study.cells():
        path = layout.model(cell, "last")
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        training = fingerprints.training(study, cell).as_record() | {
            "cost": None,
            "curve": [],
            "weights": {"last": checksum},
            "data_checksum": "c",
        }
        write_json(layout.training(cell), training)
        for table in (layout.steps(cell), layout.lifetimes(cell)):
            pd.DataFrame().to_parquet(table)
    return layout


@pytest.fixture
def dense_only(monkeypatch):
    """These tests have no files of weights, so mask overlap cannot be computed."""
    monkeypatch.setattr(collect, "mask_overlaps", lambda *_: [])


def refused(study, layout, *words):
    with pytest.raises(UsageError) as caught:
        collect.collect(study, layout, layout.root)
    [line] = str(caught.value).splitlines()
    assert all(word in line for word in words), line
    assert not (layout.root / "results.csv").exists()


def test_files_that_match_are_collected(study, finished, dense_only):
    assert "collected 15 rows" in collect.collect(study, finished, finished.root)
    assert set(pd.read_csv(finished.root / "results.csv").other_code.fillna("")) == {""}


@pytest.mark.parametrize("reader", ["read_record", "read_training", "read_flags", "file_checksum"])
def test_each_file_is_read_once(reader, study, finished, dense_only, monkeypatch):
    read, original = Counter(), getattr(gather, reader)

    def counted(path, *args, **kwargs):
        read[path] += 1
        return original(path, *args, **kwargs)

    monkeypatch.setattr(gather, reader, counted)
    if reader == "file_checksum":
        monkeypatch.setattr(collect, reader, counted)
    collect.collect(study, finished, finished.root)
    expected = {"read_training": 4, "file_checksum": 3 * 2 + len(COLLECTED) - 1}
    assert set(read.values()) == {1}
    assert len(read) == expected.get(reader, 3)  # one for each network


def test_connections_of_all_networks_are_in_one_table(study, finished, dense_only, monkeypatch):
    monkeypatch.setattr(tables, "_MOST_WAITING", 5)  # the file is written in several parts
    expected = []
    for index, cell in enumerate(study.cells()):
        rewires = cell.method == "bcs"
        steps = pd.DataFrame({name: [index] * 4 for name in STEP_COLUMNS}).astype({"age": float})
        steps["layer"] = pd.Categorical(["0", "3"] * 2, ["0", "3"])
        ages = pd.DataFrame({name: [index] * 3 for name in LIFETIME_COLUMNS})
        steps[: 4 * rewires].to_parquet(finished.steps(cell))
        ages[: 3 * rewires].to_parquet(finished.lifetimes(cell))
        expected += [steps.astype({"layer": str}).assign(**vars(cell))] * rewires
    collect.collect(study, finished, finished.root)
    found = pd.read_parquet(finished.root / "steps.parquet")
    pd.testing.assert_frame_equal(found, pd.concat(expected, ignore_index=True))
    ages = pd.read_parquet(finished.root / "lifetimes.parquet")
    assert list(ages) == [*LIFETIME_COLUMNS, *vars(study.cells()[0])]
    assert len(ages) == 3 * len(expected)


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "whole": st.integers(-5, 5),
                "share": st.none() | st.floats(0, 1),
                "count": st.none() | st.integers(0, 9),
                "text": st.none() | st.text(max_size=3),
            },
        ),
        max_size=12,
    )
)
def test_rows_in_parts_are_the_same_table_as_all_rows_at_once(rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_MOST_ROWS", 3)
        parts = tables.Rows()
        for start in range(0, len(rows), 2):
            parts.add(rows[start : start + 2])
        found, expected = parts.table(), pd.DataFrame(rows)
    assert found.to_csv(index=False) == expected.to_csv(index=False)
    assert list(found.dtypes.items()) == list(expected.dtypes.items())


def test_outcomes_of_all_networks_are_in_one_table(study, finished, dense_only):
    collect.collect(study, finished, finished.root)
    table = pd.read_parquet(finished.root / "outcomes.parquet")
    assert len(table) == len(MODELS) * 3  # attacks
    for row in table.itertuples():
        [cell] = [c for c in study.cells() if (c.method, c.seed) == (row.method, row.seed)]
        with np.load(finished.flags(cell, "last")) as flags:
            seen = np.unpackbits(np.frombuffer(row.correct, np.uint8), count=row.n_examples)
            assert seen.tolist() == flags[f"{row.attack}.all"].tolist()


def test_weights_with_one_changed_byte_are_refused(study, finished, dense_only):
    path = finished.model(study.cells()[0], "last")
    path.write_bytes(b"weightt")
    refused(study, finished, str(path), "not the weights that were attacked")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"\xff" * 90])
@pytest.mark.parametrize("known", [True, False])  # an older record has no checksum of the table
def test_damaged_history_of_connections_is_refused(content, known, study, finished, dense_only):
    cell = study.cells()[0]
    path, training = finished.steps(cell), finished.training(cell)
    if known:
        saved = {"tables": {path.name: file_checksum(path)}}
        write_json(training, read_json(training) | saved)
    path.write_bytes(content)
    refused(study, finished, f"{path}: damaged", "delete it and train this network again")


def test_history_of_connections_of_another_training_is_refused(study, finished, dense_only):
    cell = study.cells()[0]
    path, training = finished.steps(cell), finished.training(cell)
    write_json(training, read_json(training) | {"tables": {path.name: "another"}})
    refused(study, finished, f"{path}: damaged or changed", "train this network again")


def test_reason_of_a_failure_that_is_not_text_is_refused(study, finished, dense_only):
    path = finished.failed(study.cells()[0])
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff\xfe")
    refused(study, finished, f"{path}: damaged, not text", "delete this file")


def test_damaged_weights_are_refused_if_the_overlap_reads_them(tmp_path):
    path = tmp_path / "last.safetensors"
    path.write_bytes(b"weights")
    with pytest.raises(UsageError, match=r"last\.safetensors: damaged, not a readable file"):
        overlap.read_masks(path)


def test_weights_that_training_did_not_save_are_refused(study, finished, dense_only):
    path = finished.training(study.cells()[0])
    write_json(path, read_json(path) | {"weights": {"last": "another"}})
    refused(study, finished, str(path), "the weights that training saved")


def test_network_that_was_trained_on_other_data_is_refused(study, finished, dense_only):
    path = finished.training(study.cells()[0])
    write_json(path, read_json(path) | {"data_checksum": "d"})
    refused(study, finished, str(path), "different data sets")


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_outcomes_of_another_evaluation_are_refused(damage, study, finished, dense_only):
    path = finished.flags(study.cells()[0], "last")
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b" ")
    refused(study, finished, str(path), "not the outcomes")


@pytest.mark.parametrize(("attack", "component"), [("pgd", "all"), ("autoattack", "square")])
def test_row_that_contradicts_the_outcomes_of_its_images_is_refused(
    attack, component, study, finished, dense_only
):
    path = finished.evaluation(study.cells()[0], "last")
    content = read_json(path)
    for row in content["rows"]:
        if (row["attack"], row["component"]) == (attack, component):
            row["n_correct"] -= 1
            row["accuracy"] = row["n_correct"] / 100
            row["ci_low"], row["ci_high"] = wilson_interval(row["n_correct"], 100)
    del content["checksum"]
    write_json(path, content)
    refused(study, finished, str(path), f"{attack} {component}: n_correct = ")


@pytest.mark.parametrize("what", ["training", "evaluation"])
def test_rows_made_by_other_code_are_collected_and_marked(what, study, finished, dense_only):
    cell = study.cells()[0]
    path = finished.training(cell) if what == "training" else finished.evaluation(cell, "last")
    content = read_json(path)
    for part in [content] if what == "training" else content["rows"]:
        part["code_digest"] = "old"
    content.pop("checksum", None)
    write_json(path, content)
    message = collect.collect(study, finished, finished.root)
    assert "5 rows were made by older or changed code: see the column other_code" in message
    rows = pd.read_csv(finished.root / "results.csv")
    assert rows.other_code.dropna().tolist() == [what] * 5


def test_manifest_has_the_checksum_of_every_file(study, finished, dense_only):
    collect.collect(study, finished, finished.root)
    manifest = read_json(finished.root / MANIFEST)
    assert set(manifest["tables"]) == {*COLLECTED} - {MANIFEST}
    assert len(manifest["outcomes"]) == len(MODELS)
    assert manifest["fingerprint"] == fingerprints.collected(study).plan
