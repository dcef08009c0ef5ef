"""What leaves the project: what is called AutoAttack, compact files, ONNX."""

import pytest
import torch

from robsparse.base.errors import RunError, UsageError
from robsparse.base.files import file_checksum, read_json, read_tensors, write_json
from robsparse.cli import results
from robsparse.eval.autoattack import Params
from robsparse.evaluation import record
from robsparse.networks import compact, construct, weights
from robsparse.records.evaluation_record import Record, write_record
from robsparse.records.rows import Row
from robsparse.sparsity.layers import prunable
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
        export.model_info(export.Exported(study, cell, "last", layout))
    assert not (layout.root / "export").exists()


def test_the_standard_version_is_exported(recorded):
    study, cell, layout = recorded("standard")
    info = read_json(export.model_info(export.Exported(study, cell, "last", layout)))
    assert info["autoattack_acc"] == "50.00"


def test_the_accuracies_of_a_record_say_what_ran(recorded):
    _, cell, layout = recorded("standard, apgd-ce only")
    text = record.summary(layout.evaluation(cell, "last"))
    assert "autoattack    50.00 % (version standard, apgd-ce only)" in text
    _, cell, layout = recorded("standard")
    assert "version" not in record.summary(layout.evaluation(cell, "last"))


def test_weights_are_copied_beside_the_model_info(recorded):
    study, cell, layout = recorded("standard")
    weights.save(layout.model(cell, "last"), {"w": torch.eye(3)})
    path = export.copy_weights(export.Exported(study, cell, "last", layout))
    assert path.parent == layout.root / "export" / cell.key
    assert path.read_bytes() == layout.model(cell, "last").read_bytes()


# ---------------------------------------------------------------- compact files and ONNX


@pytest.fixture
def saved(study_data, load_study, tmp_path):
    """saved(arch, **params) -> a saved network of a study at sparsity 0.9, to be exported."""

    def save(arch="small_cnn", **params):
        study_data["grid"]["archs"] = [arch]
        study_data["archs"] = {arch: params}
        study, layout = load_study(study_data), Layout(tmp_path / "results")
        cell = next(cell for cell in study.cells() if cell.method == "lwm")
        network = construct.build(study, cell, (1, 8, 8), 10)
        network(torch.rand(16, 1, 8, 8))  # statistics of batch norm
        with torch.no_grad():
            for layer in prunable(network).values():
                layer.weight.mul_(torch.rand_like(layer.weight) < 0.1)
        path = layout.model(cell, "last")
        weights.save(path, network.state_dict())
        record = {"code_version": "1", "settings_digest": "d", "cost": None, "curve": []}
        write_json(layout.training(cell), record)
        return export.Exported(study, cell, "last", layout)

    return save


def test_compact_file_is_the_network_of_the_cell(saved):
    one = saved(width=4)
    [line] = export.export(one, ["compact"])
    path = one.path("compact.safetensors")
    assert path == one.layout.root / "export" / one.cell.key / "last.compact.safetensors"
    back, description = compact.read(path)
    state = read_tensors(one.layout.model(one.cell, "last"), "pt")
    assert all(torch.equal(back.state_dict()[name], value) for name, value in state.items())
    assert line.startswith(f"{path}: {compact.size(state):,} bytes of tensors, ")
    assert description.dataset == "digits"
    assert description.provenance == {
        "study": "tiny",
        "cell": one.cell.key,
        "selection": "last",
        "model_checksum": file_checksum(one.layout.model(one.cell, "last")),
        "code_version": "1",
        "settings_digest": "d",
    }


def test_network_of_foreign_code_has_no_compact_file(study_data, load_study, tmp_path):
    study_data["models"] = {
        "made": {"callable": "torch.nn:Identity", "dataset": "digits", "objective": "at"}
    }
    study = load_study(study_data)
    [cell] = [cell for cell in study.cells() if cell.method == "made"]
    one = export.Exported(study, cell, "last", Layout(tmp_path / "results"))
    with pytest.raises(UsageError, match="expected an arch of this suite for a compact file"):
        export.export(one, ["compact"])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arch", "params"),
    [
        ("small_cnn", {"width": 4, "mean": [0.4], "std": [0.3]}),
        ("small_resnet", {"width": 4, "activation": "silu"}),
        ("preactresnet18", {"padding": "tensorflow"}),
    ],
)
def test_onnx_gives_the_logits_of_the_network_for_any_number_of_images(saved, arch, params):
    onnx = pytest.importorskip("onnx")
    one = saved(arch, **params)
    [line] = export.export(one, ["onnx"])
    assert line.endswith("equal to the network on 8 test images in onnxruntime")
    network, splits = one.load()
    run = export.onnx_session(one.path("onnx"))
    for images in (splits.test.x_NCHW[:1], splits.test.x_NCHW[:33].contiguous()):
        expected = network(images)
        assert (run(images) - expected).abs().max() < 1e-5 * expected.abs().max()
    graph = onnx.load(one.path("onnx")).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["images", "logits"]
    kinds = {node.op_type for node in graph.node}
    assert ("BatchNormalization" in kinds) == (arch == "preactresnet18")
    assert sorted(path.name for path in one.path("onnx").parent.iterdir()) == ["last.onnx"]


def test_onnx_file_with_other_logits_is_not_left(saved, monkeypatch):
    pytest.importorskip("onnxruntime")
    one = saved(width=4)
    real = export.onnx_session
    monkeypatch.setattr(export, "onnx_session", lambda path: lambda x: real(path)(x) * 1.001)
    with pytest.raises(RunError, match="onnxruntime gives other logits than the network"):
        export.export(one, ["onnx"])
    assert list(one.path("onnx").parent.iterdir()) == []


def test_without_the_libraries_only_the_compact_file_is_written(saved, monkeypatch):
    one = saved(width=4)
    monkeypatch.setattr(export, "_ONNX", ("no_such_library",))
    lines = export.export(one, [])
    assert lines[-1] == (
        "no ONNX file: no_such_library not installed; pip install 'robsparse[onnx]'"
    )
    assert [path.name for path in one.path("onnx").parent.iterdir()] == ["last.compact.safetensors"]
    with pytest.raises(UsageError, match="not installed"):
        export.export(one, ["onnx"])


def test_both_files_are_written_where_the_libraries_are(saved):
    pytest.importorskip("onnxruntime")
    one = saved(width=4)
    assert len(export.export(one, [])) == 2
    names = {path.name for path in one.path("onnx").parent.iterdir()}
    assert names == {"last.compact.safetensors", "last.onnx"}


def test_formats_of_the_command_line_are_those_of_the_tool():
    assert set(results._FORMATS) == set(export.FORMATS)
