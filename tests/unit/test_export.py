"""What is AutoAttack, what is called so, and what leaves the project under that name."""

import pytest
import torch

from robsparse.base.errors import UsageError
from robsparse.base.files import read_json
from robsparse.eval.autoattack import Params
from robsparse.evaluation import record
from robsparse.networks import weights
from robsparse.records.evaluation_record import Record, write_record
from robsparse.records.rows import Row
from robsparse.study.cells import Layout
from robsparse.tools import export

SUBSET = ["apgd-ce", "apgd-t"]


@pytest.mark.parametrize(
    ("settings", "described", "qualifier"),
    [
        ({}, "standard", ""),
        ({"components": ["apgd-ce", "apgd-t", "fab-t", "square"]}, "standard", ""),
        ({"components": SUBSET}, "standard, apgd-ce, apgd-t only", "apgd-ce, apgd-t only"),
        (
            {"components": ["square", "apgd-ce", "apgd-t", "fab-t"]},
            "standard, square, apgd-ce, apgd-t, fab-t in this order",
            "square, apgd-ce, apgd-t, fab-t in this order",
        ),
        ({"version": "rand"}, "rand", "rand"),
        ({"version": "plus"}, "plus", "plus"),
        (
            {"version": "rand", "components": ["apgd-ce"]},
            "rand, apgd-ce only",
            "rand, apgd-ce only",
        ),
    ],
)
def test_autoattack_is_the_whole_standard_version_alone(settings, described, qualifier):
    params = Params(**settings)
    assert (params.described, params.qualifier) == (described, qualifier)


def test_a_label_says_what_was_left_out_whatever_it_is_called(study_data, load_study):
    study_data["evaluation"]["attacks"] = {
        "pgd": {"steps": 2},
        "quick": {"base": "autoattack", "label": "AutoAttack", "components": SUBSET},
        "again": {"base": "autoattack", "version": "rand"},
        "autoattack": {},
    }
    study_data["evaluation"]["selections"] = {"last": ["pgd", "quick", "again", "autoattack"]}
    study = load_study(study_data)
    names = ("pgd", "quick", "again", "autoattack")
    assert [study.label("attack", name) for name in names] == [
        "PGD",
        "AutoAttack (apgd-ce, apgd-t only)",
        "again (rand)",
        "AutoAttack",
    ]


def row(cell, attack, version=None):
    return Row(
        **vars(cell),
        selection="last",
        attack=attack,
        component="all",
        accuracy=0.5,
        n_correct=5,
        n_examples=10,
        ci_low=0,
        ci_high=1,
        norm="Linf",
        eps=8 / 255,
        version=version,
        sparsity_reached=0,
        nonzero=10,
        prunable=10,
        layers=1,
        dense_macs=1,
        sparse_macs=1,
        model_bytes=1,
        settings_digest="0",
        code_digest="0",
        code_version="1",
        code_dirty=False,
        libraries="",
        data_checksum="0",
        model_checksum="0",
    )


@pytest.fixture
def recorded(study_data, load_study, tmp_path):
    """recorded(version) -> study, cell and layout with a record of AutoAttack of that version."""
    study, layout = load_study(study_data), Layout(tmp_path / "results")
    cell = study.cells()[0]

    def write(version):
        rows = [row(cell, "clean"), row(cell, "autoattack", version)]
        path = layout.evaluation(cell, "last")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, Record(rows, [], [], {}, "f"))
        return study, cell, layout

    return write


@pytest.mark.parametrize("version", ["standard, apgd-ce, apgd-t only", "rand", "plus", None])
def test_only_the_standard_version_is_exported_as_autoattack(recorded, version):
    study, cell, layout = recorded(version)
    with pytest.raises(UsageError, match=r"version = .*expected standard"):
        export.model_info(study, cell, "last", layout)
    assert not (layout.root / "export").exists()


def test_the_standard_version_is_exported(recorded):
    study, cell, layout = recorded("standard")
    info = read_json(export.model_info(study, cell, "last", layout))
    assert info["autoattack_acc"] == "50.00"


def test_the_accuracies_of_a_record_say_what_ran(recorded):
    _, cell, layout = recorded("standard, apgd-ce only")
    text = record.summary(layout.evaluation(cell, "last"))
    assert "autoattack    50.00 % (version standard, apgd-ce only)" in text
    _, cell, layout = recorded("standard")
    assert "version" not in record.summary(layout.evaluation(cell, "last"))


def test_weights_are_copied_beside_the_model_info(recorded):
    _, cell, layout = recorded("standard")
    weights.save(layout.model(cell, "last"), {"w": torch.eye(3)})
    path = export.copy_weights(cell, "last", layout)
    assert path.parent == layout.root / "export" / cell.key
    assert path.read_bytes() == layout.model(cell, "last").read_bytes()
