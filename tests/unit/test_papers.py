"""Tables of papers, and the published numbers in them."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.figures.data import published
from robsparse.figures.data.summary import Material
from robsparse.figures.data.tidy import Outcomes, Tidy
from robsparse.figures.tables import papers
from robsparse.schema.grid import Table
from robsparse.study import loading

REFERENCE = Path(__file__).parents[2] / "results" / "reference"
HEADER = ",".join(published.COLUMNS)
# Methods with published numbers that this suite does not train; docs/baselines.md has the reasons.
NOT_TRAINED = ("eed", "li20", "mad", "pwoa")
LINE = "digits,small_cnn,bcs,at,0.9,clean,best,0.75,0.1,1000,none,Table 4,BCS-P,"


@pytest.fixture
def source(tmp_path):
    """source(*lines) writes a file of published numbers and returns its path."""

    def write(*lines):
        path = tmp_path / "paper.csv"
        path.write_text("\n".join(["# instructions", HEADER, *lines]) + "\n")
        return path

    return write


@pytest.fixture
def material(study_data, load_study, tmp_path):
    """A study with one accuracy in the summary: 0.7 for BCS at 0.9."""
    study_data["grid"] |= {"methods": ["bcs", "lwm"], "sparsities": [0.9, 0.99]}
    study = load_study(study_data)
    keys = ["dataset", "arch", "objective", "method", "sparsity", "selection"]
    line = ["digits", "small_cnn", "at", "bcs", 0.9, "best_val", "fine", 0.7]
    summary = pd.DataFrame([line], columns=[*keys, "reliability", "clean_accuracy"])
    nothing = pd.DataFrame()
    return Material(study, Tidy(*[nothing] * 10), Outcomes(tmp_path), summary)


def spec(*files, **changes):
    values = {
        "name": "table4",
        "title": "Table 4",
        "methods": ["bcs", "lwm"],
        "rows": ["sparsity"],
        "columns": ["method"],
        "attacks": ["clean"],
        "published": [str(path) for path in files],
    }
    return Table(**values | changes)


# ------------------------------------------------------------------ committed files


@pytest.mark.parametrize("path", sorted(REFERENCE.glob("*.csv")), ids=lambda path: path.stem)
def test_committed_numbers_are_valid_and_use_our_names(path):
    table = published.read(path)
    assert set(table.dataset) <= {*registry.names("dataset")}
    assert set(table.arch) <= {*registry.names("arch")}
    assert set(table.attack) <= {*registry.names("attack")}
    assert set(table.method) <= {*registry.names("method"), *NOT_TRAINED}
    assert not table.duplicated(published.KEYS).any()
    assert (table["where"] != "").all()


def test_numbers_of_the_bcs_paper_are_unknown():
    path = REFERENCE / "bcs_icml2021.csv"
    assert published.read(path).empty
    assert path.read_text().startswith("# ")


def test_some_committed_numbers_equal_the_printed_ones():
    hydra = published.read(REFERENCE / "hydra_neurips2020.csv")
    key = (hydra.dataset == "svhn") & (hydra.arch == "wrn28_4") & (hydra.sparsity == 0.99)
    found = hydra[key].set_index("method").accuracy.to_dict()
    assert found == {"lwm": 0.453, "hydra": 0.524}
    board = published.read(REFERENCE / "ap_leaderboard.csv")
    row = board[
        (board.printed_as == "HARP") & (board.arch == "resnet18") & (board.sparsity == 0.95)
    ]
    accuracies = row[row.dataset == "cifar10"].set_index("attack").accuracy.to_dict()
    assert accuracies == {"clean": 0.8338, "autoattack": 0.4569}
    assert "bcs" not in set(board.method)
    birds = published.read(REFERENCE / "sparsity_winning_twice.csv")
    row = birds[(birds.method == "robust_bird") & (birds.dataset == "cifar10")]
    found = row.set_index(["attack", "selection"]).accuracy.to_dict()
    assert found == {
        ("clean", "best"): 0.7846,
        ("clean", "last"): 0.8242,
        ("pgd", "best"): 0.5018,
        ("pgd", "last"): 0.461,
    }
    row = birds[(birds.method == "flyingbird_plus") & (birds.selection == "last")]
    found = row.set_index(["dataset", "attack"]).accuracy.to_dict()
    assert found == {
        ("cifar10", "clean"): 0.8316,
        ("cifar10", "pgd"): 0.4751,
        ("cifar100", "pgd"): 0.2337,
    }
    eed = published.read(REFERENCE / "eed_cvpr2025.csv")
    row = eed[(eed.method == "harp")].set_index("attack").accuracy.to_dict()
    assert row == {"clean": 0.8384, "autoattack": 0.4536}


def test_the_leaderboard_study_trains_every_method_that_can_be_trained(repository):
    """Everywhere on the leaderboard; the config and the documents name the other methods."""
    study = loading.load(repository / "config" / "ap_leaderboard.yaml")
    trained = {
        (cell.dataset, cell.arch, cell.sparsity, study.base("method", cell.method))
        for cell in study.cells()
    }
    board = published.read(REFERENCE / "ap_leaderboard.csv")
    places = board[["dataset", "arch", "sparsity", "method"]].drop_duplicates()
    missing = set(places.itertuples(index=False, name=None)) - trained
    assert {method for *_, method in missing} == {"li20", "mad", "pwoa"}
    assert {method for *_, method in missing} <= {*NOT_TRAINED}
    for name in ("config/ap_leaderboard.yaml", "docs/baselines.md"):
        text = (repository / name).read_text(encoding="utf-8")
        assert [printed for printed in ("PwoA", "MAD", "Li20") if printed not in text] == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (LINE.replace("0.75", "75"), "row 1: accuracy = '75': expected a number in"),
        (LINE.replace("0.75", "n/a"), "row 1: accuracy = 'n/a'"),
        (LINE.replace("0.9,clean", "90,clean"), "row 1: sparsity = '90'"),
        (LINE.replace(",best,", ",final,"), "row 1: selection = 'final': expected 'best', 'last'"),
    ],
)
def test_message_names_the_invalid_published_number(line, expected, source):
    with pytest.raises(UsageError, match=expected):
        published.read(source(line))


def test_columns_are_checked(tmp_path):
    path = tmp_path / "paper.csv"
    path.write_text(HEADER.replace("accuracy", "acuracy") + "\n")
    with pytest.raises(UsageError, match="unknown column 'acuracy'; nearest match: 'accuracy'"):
        published.read(path)
    path.write_text(HEADER.replace("accuracy,", "") + "\n")
    with pytest.raises(UsageError, match="no column 'accuracy'"):
        published.read(path)
    with pytest.raises(UsageError, match=r"missing\.csv"):
        published.read(tmp_path / "missing.csv")


# ------------------------------------------------------------------ tables


def test_ours_published_and_difference(material, source):
    table = papers.values(material, spec(source(LINE)))
    found = {
        (r.method, r.sparsity): (r.ours, r.published, r.difference) for r in table.itertuples()
    }
    assert found["bcs", 0.9] == pytest.approx((0.7, 0.75, -0.05))
    assert np.isnan(found["lwm", 0.99]).all()
    text = papers.contents(material, spec(source(LINE)))
    assert "70.0 / 75.0(a) / −5.0" in text[".md"]
    assert "n/a / n/a / n/a" in text[".md"]
    assert "(a) paper: Table 4; as BCS-P; eps 0.1; 1000 test images" in text[".md"]
    assert text[".tex"].count("begin{tabular}") == 1
    assert text[".csv"].startswith("dataset,arch,method,objective,sparsity,attack,selection,ours")


def test_numbers_of_several_publications_are_in_one_field(material, source, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text(source(LINE.replace("0.75", "0.6")).read_text())
    text = papers.contents(material, spec(source(LINE), other))[".md"]
    assert "70.0 / 75.0(a), 60.0(b) / −5.0, +10.0" in text


def test_variants_are_in_the_line_of_their_base(study_data, load_study, source, tmp_path):
    """Another method on a variant of data set and architecture, beside the plain one."""
    study_data["grid"] = [
        study_data["grid"] | {"methods": ["bcs"], "sparsities": [0.9]},
        study_data["grid"]
        | {"archs": ["wide"], "datasets": ["few"], "methods": ["mine"], "sparsities": [0.9]},
    ]
    study_data["archs"] = {"wide": {"base": "small_cnn", "width": 6, "label": "Wide"}}
    study_data["datasets"]["few"] = study_data["datasets"]["digits"] | {
        "base": "digits",
        "label": "Few",
    }
    study_data["methods"]["mine"] = study_data["methods"]["bcs"] | {"base": "bcs", "label": "Mine"}
    study = load_study(study_data)
    keys = ["dataset", "arch", "objective", "method", "sparsity", "selection"]
    lines = [
        ["digits", "small_cnn", "at", "bcs", 0.9, "best_val", "fine", 0.7],
        ["few", "wide", "at", "mine", 0.9, "best_val", "fine", 0.8],
    ]
    summary = pd.DataFrame(lines, columns=[*keys, "reliability", "clean_accuracy"])
    made = Material(study, Tidy(*[pd.DataFrame()] * 10), Outcomes(tmp_path), summary)
    values = {"methods": [], "rows": ["dataset", "arch", "sparsity"]}
    together = spec(source(LINE), **values, as_base=["dataset", "arch"])
    text = papers.contents(made, together)[".md"]
    [line] = [row for row in text.splitlines() if "90 %" in row]
    assert "70.0 / 75.0(a) / −5.0" in line
    assert "80.0 / 75.0(a) / +5.0" in line
    assert "Mine is trained with Few, Wide." in text
    apart = papers.contents(made, spec(source(LINE), **values))[".md"]
    assert len([row for row in apart.splitlines() if "90 %" in row]) == 2
    assert "80.0 / n/a / n/a" in apart
    two = spec(source(LINE), methods=[], rows=["arch"], columns=["objective"], as_base=["arch"])
    with pytest.raises(UsageError, match=r"rows and columns put .* in one field"):
        papers.values(made, two)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [("best_val", [0.75, 0.5]), ("best_clean", [0.75, 0.5]), ("last", [0.6, 0.5])],
)
def test_the_best_and_the_last_epoch_are_two_numbers(selection, expected, material, source):
    """A number of an epoch that is not stated is compared with every selection."""
    material.summary["selection"] = selection
    lines = [LINE, LINE.replace("0.75", "0.6").replace("best", "last")]
    lines.append(LINE.replace("0.75", "0.5").replace("best", ""))
    chosen = spec(source(*lines), methods=["bcs"], selection=selection)
    rows = papers.values(material, chosen)
    rows = rows[rows.sparsity == 0.9]
    assert rows.published.tolist() == expected
    assert set(rows.selection) == {selection}
    text = papers.contents(material, chosen)[".md"]
    assert f"selection: {'last' if selection == 'last' else 'best'} epoch of its authors" in text


def test_a_number_of_another_network_is_never_used(material, source):
    for one, two in (
        ("bcs", "hydra"),
        ("0.9,", "0.95,"),
        ("digits", "svhn"),
        (",at,", ",trades,"),
        ("clean", "pgd"),
    ):
        table = papers.values(material, spec(source(LINE.replace(one, two, 1))))
        assert table.published.isna().all()
    table = papers.values(material, spec(source(LINE.replace(",at,", ",,"))))  # any objective
    assert table.published.notna().sum() == 1


def test_without_a_published_number_the_table_has_a_message(material, source):
    text = papers.contents(material, spec(source()))[".md"]
    assert "No published number of these networks was found in" in text
    assert "paper.csv" in text


def test_two_networks_in_one_field_are_an_error(material, source):
    with pytest.raises(UsageError, match=r"'table4': rows and columns put .* in one field"):
        papers.values(material, spec(source(), columns=["arch"]))


def test_the_tables_of_the_paper_can_be_drawn_before_anything_is_measured(repository, tmp_path):
    from robsparse.figures.data.summary import summarise  # noqa: PLC0415
    from robsparse.records.rows import Row  # noqa: PLC0415

    study = loading.load(repository / "config" / "paper.yaml")
    empty = pd.DataFrame(columns=[*Row.model_fields, "budget"])
    tidy = Tidy(empty, *[pd.DataFrame()] * 9)
    material = Material(study, tidy, Outcomes(tmp_path), summarise(study, tidy, Outcomes(tmp_path)))
    drawn = {}
    for each in study.tables:
        local = [str(repository / name) for name in each.published]
        local_spec = each.model_copy(update={"published": local})
        drawn[each.name] = papers.contents(material, local_spec)
    # Ours is not measured yet. HYDRA, VGG16 at 99 % of the public leaderboard:
    assert "n/a / 35.6(a) / n/a" in drawn["at_cifar10"][".md"]
    # BCS as published is a column beside ours, in the line of the plain architecture.
    lines = [row for row in drawn["as_published"][".md"].splitlines() if row.startswith("|")]
    assert re.search(r"\| +BCS Clean \|.*\| +BCS \(as published\) Clean \|", lines[0])
    assert len([row for row in lines if "resnet50" in row]) == 2  # dense, 99 %
    # Its cells need a file that is not here.
    assert "No network of this table" in drawn["self_training"][".md"]
    assert "pseudo_labelled.npz" in drawn["self_training"][".md"]


def test_a_part_of_autoattack_is_compared_with_no_published_number(
    study_data, load_study, source, tmp_path
):
    attacks = {"autoattack": {"components": ["apgd-ce"]}, "pgd": {"steps": 1}}
    study_data["evaluation"] |= {"attacks": attacks, "selections": {"last": ["autoattack"]}}
    line = LINE.replace("clean,best", "autoattack,last")
    found = {}
    for part in (True, False):
        if not part:
            attacks["autoattack"] = {}
        study = load_study(study_data)
        table = pd.DataFrame(
            [["digits", "small_cnn", "at", "bcs", 0.9, "last", "fine", 0.7]],
            columns=[
                *("dataset", "arch", "objective", "method", "sparsity", "selection"),
                *("reliability", "autoattack_accuracy"),
            ],
        )
        material = Material(study, Tidy(*[pd.DataFrame()] * 10), Outcomes(tmp_path), table)
        chosen = spec(source(line), attacks=["autoattack"], selection="last")
        found[part] = papers.contents(material, chosen)[".md"]
    assert "70.0 / n/a / n/a" in found[True]
    assert "AutoAttack (apgd-ce only)" in found[True]
    assert "Not compared with published numbers: AutoAttack (apgd-ce only)." in found[True]
    assert "70.0 / 75.0(a) / −5.0" in found[False]
