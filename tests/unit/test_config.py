"""Configs: messages about invalid ones, and the meaning of valid ones."""

import dataclasses
import datetime
from pathlib import Path

import pytest
import yaml

from robsparse.base import registry
from robsparse.base.errors import UsageError, nearest_match
from robsparse.schema.training import Fit
from robsparse.study import fingerprints, loading
from robsparse.study.cells import Cell

STUDIES = Path(__file__).parents[2] / "config"


def put(data, path, value):
    *parents, last = path.split(".")
    for name in parents:
        data = data.setdefault(name, {})
    data[last] = value


# ---------------------------------------------------------------- invalid input

BAD = {
    "misspelt section": ("trainig", {}, ["trainig = {}: unknown key"], "'training'"),
    "misspelt nested key": ("training.batchsize", 3, ["training.batchsize = 3"], "'batch_size'"),
    "misspelt deep key": (
        "training.crafting.stepsize",
        0.1,
        ["training.crafting.stepsize = 0.1", "steps, step_size, bn_mode"],
        "'step_size'",
    ),
    "misspelt method key": (
        "methods.bcs.noise_scal",
        0,
        ["methods.bcs.noise_scal = 0", "regrown_theta"],
        "'noise_scale'",
    ),
    "misspelt stage key": ("methods.bcs.train.epoch", 1, ["methods.bcs.train.epoch = 1"], "epochs"),
    "misspelt attack key": (
        "evaluation.attacks.pgd.step",
        1,
        ["evaluation.attacks.pgd.step = 1"],
        "'steps'",
    ),
    "unknown method": ("grid.methods", ["bsc"], ["grid.methods", "'bsc'", "admm, bcs"], "'bcs'"),
    "params of an unknown method": ("methods.hidra", {}, ["methods", "'hidra'"], "'hydra'"),
    "unknown attack": (
        "evaluation.selections.last",
        ["clean", "pdg"],
        ["evaluation.selections", "'pdg'"],
        "'pgd'",
    ),
    "params of an unknown attack": (
        "evaluation.attacks.autoatack",
        {},
        ["evaluation.attacks", "'autoatack'"],
        "'autoattack'",
    ),
    "unknown dataset": ("grid.datasets", ["digit"], ["grid.datasets", "'digit'"], "'digits'"),
    "unknown arch": ("grid.archs", ["smal_cnn"], ["grid.archs", "'smal_cnn'"], "'small_cnn'"),
    "unknown objective": (
        "grid.objectives",
        ["trade"],
        ['grid.objectives.0 = "trade"', "expected 'natural', 'at', 'mat'"],
        "'trades'",
    ),
    "unknown selection": (
        "evaluation.selections.best",
        ["clean"],
        ["evaluation.selections.best", "'best_val', 'best_clean' or 'last'"],
        "'best_clean'",
    ),
    "eps in 8-bit units": ("threat.eps", 8, ["threat.eps = 8", "(0, 1]"], "'8/255'"),
    "eps of zero": ("threat.eps", 0, ["threat.eps = 0", "above 0"], ""),
    "eps below zero": ("threat.eps", -0.1, ["threat.eps = -0.1"], ""),
    "eps that is NaN": ("threat.eps", float("nan"), ["threat.eps = NaN"], ""),
    "eps divided by zero": ("threat.eps", "8/0", ['threat.eps = "8/0"'], ""),
    "eps that is no ratio": ("threat.eps", "8/255/3", ['threat.eps = "8/255/3"'], ""),
    "eps that is a word": ("threat.eps", "small", ['threat.eps = "small"'], ""),
    "eps that is true": ("threat.eps", True, ["threat.eps = true"], ""),
    "batch size that is true": (
        "training.batch_size",
        True,
        ["training.batch_size = true"],
        "",
    ),
    "eps too large for a float": ("threat.eps", 10**400, ["threat.eps = 1000"], ""),
    "eps that is a ratio too large for a float": ("threat.eps", f"{10**400}/1", ["threat.eps"], ""),
    "eps that is a mapping": ("threat.eps", {datetime.date(2020, 1, 1): 1}, ["threat.eps = "], ""),
    "step size in 8-bit units": (
        "training.crafting.step_size",
        2,
        ["training.crafting.step_size = 2"],
        "'2/255'",
    ),
    "sparsity in percent": ("grid.sparsities", [99], ["grid.sparsities.0 = 99", "(0, 1)"], "0.99"),
    "sparsity of one": ("grid.sparsities", [0.9, 1.0], ["grid.sparsities.1 = 1.0", "(0, 1)"], ""),
    "sparsity of zero": ("grid.sparsities", [0.0], ["grid.sparsities.0 = 0.0", "'dense'"], ""),
    "sparsity of five decimals": ("grid.sparsities", [0.99999], ["four decimals"], "0.9999"),
    "negative width": ("archs.small_cnn.width", -3, ["archs.small_cnn.width = -3"], "1"),
    "broken width": ("archs.small_cnn.width", 2.5, ["archs.small_cnn.width = 2.5", "integer"], ""),
    "no methods": ("grid.methods", [], ["grid.methods = []", "at least one entry"], ""),
    "no seeds": ("grid.seeds", [], ["grid.seeds = []", "at least one entry"], ""),
    "repeated seed": ("grid.seeds", [0, 1, 0], ["grid.seeds = [0, 1, 0]", "each entry once"], ""),
    "repeated method": ("grid.methods", ["bcs", "bcs"], ["grid.methods", "each entry once"], ""),
    "repeated sparsity": ("grid.sparsities", [0.9, "0.90"], ["grid.sparsities", "once"], ""),
    "repeated attack": ("evaluation.selections.last", ["pgd", "pgd"], ["last", "once"], ""),
    "negative seed": ("grid.seeds", [-1], ["grid.seeds.0 = -1"], "0"),
    "seed that is true": ("grid.seeds", [True], ["grid.seeds.0 = true"], ""),
    "word for a list": ("grid.methods", "bcs", ['grid.methods = "bcs"', "list"], ""),
    "learning rate of zero": (
        "methods.dense.pretrain.lr",
        0,
        ["methods.dense.pretrain.lr = 0", "greater than 0"],
        "",
    ),
    "learning rate that is infinite": (
        "methods.dense.pretrain.lr",
        float("inf"),
        ["methods.dense.pretrain.lr", "finite"],
        "",
    ),
    "momentum of one": (
        "methods.bcs.train.momentum",
        1.0,
        ["methods.bcs.train.momentum = 1.0"],
        "",
    ),
    "milestone of one": ("methods.bcs.train.milestones", [0.5, 1.0], ["milestones.1 = 1.0"], ""),
    "misspelt choice": ("methods.bcs.init", "strikt", ['methods.bcs.init = "strikt"'], "'strict'"),
    "params that are no mapping": ("methods.bcs", [1], ["methods.bcs = [1]"], ""),
    "params that are false": ("methods.bcs", False, ["methods.bcs = false"], ""),
    "section that is null": ("threat", None, ["threat = null"], ""),
    "study with a slash": ("study", "a/b", ['study = "a/b"'], ""),
    "more images than there are": (
        "evaluation.n_examples",
        801,
        ["evaluation.n_examples = 801", "test images of 'digits'"],
        "800",
    ),
}


@pytest.mark.parametrize("error", BAD)
def test_error_is_one_line_with_key_value_expectation_and_nearest_match(error, refused, study_data):
    path, value, parts, match = BAD[error]
    put(study_data, path, value)
    message = refused(study_data)
    assert "\n" not in message
    assert len(message) < 700
    for part in parts:
        assert part in message
    assert "expected" in message
    assert ("nearest match" in message) == bool(match), message
    assert message.endswith(f"nearest match: {match}") or not match or match in message


def test_each_error_has_a_line(refused, study_data):
    study_data["threat"]["eps"] = 8
    study_data["grid"]["seeds"] = [-1]
    lines = refused(study_data).splitlines()
    assert len(lines) == 2
    assert any("threat.eps = 8" in line for line in lines)
    assert any("grid.seeds.0 = -1" in line for line in lines)


@pytest.mark.parametrize("key", ["study", "title", "threat", "training", "evaluation"])
def test_message_names_the_missing_section(key, refused, study_data):
    del study_data[key]
    assert refused(study_data) == f"{key}: missing, expected a value"


def test_a_study_needs_a_grid_or_models(refused, study_data):
    del study_data["grid"]
    assert refused(study_data) == "grid: expected a block, or models"


@pytest.mark.parametrize(
    "path", ["threat.eps", "training.crafting", "training.crafting.step_size", "grid.seeds"]
)
def test_message_names_the_missing_key_with_its_section(path, refused, study_data):
    section, *rest = path.split(".")
    found = study_data[section]
    for name in rest[:-1]:
        found = found[name]
    del found[rest[-1]]
    assert refused(study_data) == f"{path}: missing, expected a value"


TEXTS = {
    "empty": ("", "expected a mapping of sections, found NoneType"),
    "list": ("- study", "expected a mapping of sections, found list"),
    "open bracket": ("study: [a, b", "not valid YAML"),
    "tab": ("study:\n\tx: 1", "not valid YAML"),
    "duplicate key": ("study: a\ntitle: b\nstudy: c\n", 'the key "study" appears twice'),
    "nested duplicate": ("a:\n  b:\n    c: 1\n    c: 2\n", 'the key "c" appears twice'),
    "list as key": ("? [a, b]\n: 1\n", "not valid YAML"),
    "mapping as key": ("? {a: b}\n: 1\n", "not valid YAML"),
    "python object": ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    "date as key": ("2020-01-01: 1\n", "2020-01-01"),
    "number as key": ("7: 1\n", "7 = 1: unknown key"),
    "contains itself": ("a: &a [*a]\n", "a"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_error_about_text_that_is_no_study_is_one_line(text, refused):
    content, expected = TEXTS[text]
    message = refused(content)
    assert expected in message
    assert "\n" not in message


def test_message_names_the_line_of_a_duplicate_key(refused):
    assert "line 3" in refused("study: a\ntitle: b\nstudy: c\n")


def test_error_about_a_missing_file_is_one_line(tmp_path):
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(UsageError, match="cannot read the config") as caught:
            loading.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_error_about_a_binary_file_is_one_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"study: \xff\xfe")
    with pytest.raises(UsageError, match="not valid YAML"):
        loading.load(path)


def test_message_has_no_nearest_match_if_nothing_is_similar():
    assert nearest_match("bsc", ["bcs", "lwm"]) == "; nearest match: 'bcs'"
    assert nearest_match("zzz", ["bcs", "lwm"]) == ""
    assert nearest_match("BCS", ["bcs"]) == "; nearest match: 'bcs'"


# ---------------------------------------------------------------- valid input


@pytest.mark.parametrize(
    ("written", "meant"), [("8/255", 8 / 255), ("1/3", 1 / 3), (0.15, 0.15), ("0.1", 0.1), (1, 1.0)]
)
def test_ratio_is_read_exactly(written, meant, study_data, load_study):
    study_data["threat"]["eps"] = written
    study_data["training"]["crafting"]["step_size"] = 0.01
    assert load_study(study_data).threat.eps == meant


def test_number_that_yaml_reads_as_text_is_a_number(study_data, tmp_path):
    assert yaml.safe_load("5e-4") == "5e-4"
    study_data["methods"]["dense"]["pretrain"]["weight_decay"] = "@"
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study_data).replace("'@'", "5e-4"))
    assert loading.load(path).methods["dense"].pretrain.weight_decay == 0.0005


def test_missing_parameters_have_their_defaults(study_data, load_study):
    del study_data["methods"]
    study = load_study(study_data)
    assert study.methods["bcs"].train.epochs == 200
    assert study.methods["lwm"].finetune.lr == 0.01
    assert study.attacks["pgd"].params.restarts == 2
    study_data["methods"] = {"bcs": None}
    assert load_study(study_data).methods["bcs"] == study.methods["bcs"]


def test_start_methods_and_clean_have_parameters_too(study_data, load_study):
    study_data["evaluation"]["selections"] = {"last": ["pgd"]}
    study = load_study(study_data)
    assert "dense" not in study.grid[0].methods
    assert study.methods["dense"].pretrain.epochs == 1
    assert "clean" in study.attacks


def test_settings_cannot_be_changed(study_data, load_study):
    with pytest.raises(ValueError, match="frozen"):
        load_study(study_data).threat.eps = 0.5


@pytest.mark.parametrize("name", sorted(path.name for path in STUDIES.glob("*.yaml")))
def test_studies_of_the_repository_are_valid(name, repository):
    study = loading.load(repository / "config" / name)
    assert study.study == Path(name).stem.removesuffix("_more")  # a second part of the same study
    assert study.cells()


# ---------------------------------------------------------------- cells


def test_cells_by_hand(study_data, load_study):
    study_data["grid"] |= {"methods": ["lwm", "bcs"], "sparsities": [0.9, 0.99], "seeds": [0, 3]}
    found = [(cell.method, cell.sparsity, cell.seed) for cell in load_study(study_data).cells()]
    expected = []
    for seed in (0, 3):
        expected += [("dense", 0.0, seed), ("lwm", 0.9, seed), ("lwm", 0.99, seed)]
        expected += [("bcs", 0.9, seed), ("bcs", 0.99, seed)]
    assert found == expected


def test_dense_is_trained_once_for_each_seed_and_objective(study_data, load_study):
    study_data["grid"] |= {
        "methods": ["dense", "lwm", "hydra", "admm"],
        "sparsities": [0.9, 0.95, 0.99],
        "objectives": ["at", "trades"],
        "seeds": [0, 1],
    }
    cells = load_study(study_data).cells()
    assert len(cells) == len(set(cells)) == 4 * (1 + 3 * 3)
    assert sum(cell.method == "dense" for cell in cells) == 4
    assert all((cell.sparsity == 0) == (cell.method == "dense") for cell in cells)


def test_dense_is_not_trained_if_nothing_starts_from_it(study_data, load_study):
    study_data["grid"]["methods"] = ["bcs"]
    assert {cell.method for cell in load_study(study_data).cells()} == {"bcs"}


def test_starting_cell_differs_only_in_method_and_sparsity(study_data, load_study):
    start = load_study(study_data).starting_cell
    assert start(Cell("digits", "small_cnn", "hydra", "trades", 0.99, 7)) == Cell(
        "digits", "small_cnn", "dense", "trades", 0.0, 7
    )
    assert start(Cell("digits", "small_cnn", "bcs", "at", 0.9, 0)) is None
    assert start(Cell("digits", "small_cnn", "dense", "at", 0.0, 0)) is None


# ---------------------------------------------------------------- blocks and variants


def two_blocks(data):
    """A block at 0.9 with BCS and LWM, and a block at 0.99 with only BCS."""
    data["grid"] = [data["grid"], data["grid"] | {"methods": ["bcs"], "sparsities": [0.99]}]
    return data["grid"]


def test_a_cell_in_two_blocks_is_trained_once(study_data, load_study):
    blocks = two_blocks(study_data)
    alone = load_study(study_data).cells()
    assert [(c.method, c.sparsity) for c in alone] == [
        ("bcs", 0.9),
        ("dense", 0.0),
        ("lwm", 0.9),
        ("bcs", 0.99),
    ]
    blocks[1]["sparsities"] = [0.9, 0.99]
    assert load_study(study_data).cells() == alone


def test_hyperparameters_of_a_block_override_those_of_the_study(study_data, load_study):
    blocks = two_blocks(study_data)
    study_data["methods"]["bcs"] = {"train": {"epochs": 3, "lr": 0.2}, "momentum": "reset"}
    blocks[1]["params"] = {"bcs": {"train": {"lr": 0.3}}}
    study = load_study(study_data)
    found = {c.sparsity: p.params for c, p in study.planned.items() if c.method == "bcs"}
    assert [(p.train.epochs, p.train.lr, p.momentum) for p in found.values()] == [
        (3, 0.2, "reset"),
        (3, 0.3, "reset"),
    ]
    digests = {fingerprints.training(study, cell).plan for cell in study.cells()}
    assert len(digests) == len(study.cells())


def test_message_has_the_index_of_a_block_only_if_the_grid_is_a_list(study_data, refused):
    study_data["grid"]["params"] = {"bsc": {}}
    assert refused(study_data).startswith("grid.params.bsc: ")
    study_data["grid"] = [study_data["grid"]]
    assert refused(study_data).startswith("grid.0.params.bsc: ")


def test_a_study_cannot_be_changed(study_data, load_study):
    study = load_study(study_data)
    cell = study.cells()[0]
    for change in (
        lambda: study.__setattr__("title", "another"),
        lambda: study.planned[cell].__setattr__("training", None),
        lambda: study.methods.update(bcs=None),
        lambda: study.planned.pop(cell),
        lambda: study.attacks.pop("pgd"),
    ):
        with pytest.raises((AttributeError, dataclasses.FrozenInstanceError)):
            change()


def test_a_cell_cannot_have_two_sets_of_hyperparameters(study_data, refused):
    blocks = two_blocks(study_data)
    blocks[1] |= {"sparsities": [0.9], "params": {"bcs": {"noise_scale": 0.5}}}
    assert "is in two blocks" in refused(study_data)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"bsc": {}}, ["grid.1.params.bsc", "nearest match: 'bcs'"]),
        ({"bcs": {"noise_scal": 1}}, ["grid.1.params.bcs.noise_scal = 1", "'noise_scale'"]),
        ({"bcs": {"train": {"warmup": 9}}}, ["grid.1.params.bcs.train.warmup", "fewer epochs"]),
        ({"bcs": 3}, ["grid.1.params.bcs = 3", "mapping"]),
    ],
)
def test_errors_in_the_hyperparameters_of_a_block(params, expected, study_data, refused):
    two_blocks(study_data)[1]["params"] = params
    message = refused(study_data)
    assert all(part in message for part in expected), message


def test_a_block_is_left_out_if_its_file_is_missing(study_data, load_study, refused, tmp_path):
    blocks = two_blocks(study_data)
    blocks[1]["where_exists"] = str(tmp_path / "there")
    study = load_study(study_data)
    assert {c.sparsity for c in study.cells()} == {0.0, 0.9}
    assert study.left_out() == [
        f"left out: digits, small_cnn, at (there is no {tmp_path / 'there'})"
    ]
    (tmp_path / "there").touch()
    assert {c.sparsity for c in load_study(study_data).cells()} == {0.0, 0.9, 0.99}
    study_data["grid"] = [blocks[0] | {"where_exists": str(tmp_path / "not")}]
    assert "every block is left out" in refused(study_data)


def test_errors_in_a_block_name_the_block(study_data, refused):
    two_blocks(study_data)[1]["sparsities"] = [90]
    assert "grid.1.sparsities.0 = 90" in refused(study_data)


def test_a_variant_has_a_base_method_and_other_hyperparameters(study_data, load_study):
    study_data["methods"]["quiet"] = {"base": "bcs", "label": "Quiet BCS", "noise_scale": 0}
    study_data["methods"]["pruned"] = {"base": "lwm"}
    study_data["grid"]["methods"] = ["bcs", "quiet", "pruned"]
    study = load_study(study_data)
    assert [c.method for c in study.cells()] == ["bcs", "quiet", "dense", "pruned"]
    assert study.methods["quiet"].noise_scale == 0
    assert study.methods["quiet"].train.epochs == 200
    assert study.base("method", "quiet") == study.base("method", "bcs") == "bcs"
    assert study.label("method", "quiet") == "Quiet BCS"
    assert (study.label("method", "pruned"), study.label("method", "bcs")) == ("pruned", "BCS")
    assert study.is_dense("dense")
    assert not study.is_dense("quiet")
    found = {fingerprints.training(study, cell).plan for cell in study.cells()}
    study_data["methods"]["quiet"]["label"] = "Another label"
    again = load_study(study_data)
    assert {fingerprints.training(again, cell).plan for cell in again.cells()} == found


def test_data_sets_archs_and_attacks_may_have_variants(study_data, load_study):
    study_data["datasets"]["mine"] = {"base": "digits", "test_examples": 100}
    study_data["archs"]["wide"] = {"base": "small_cnn", "width": 6}
    study_data["evaluation"]["attacks"]["weak"] = {"base": "pgd", "steps": 1}
    study_data["evaluation"]["selections"] = {"last": ["clean", "pgd", "weak"]}
    study_data["grid"] |= {"datasets": ["digits", "mine"], "archs": ["wide"]}
    study = load_study(study_data)
    assert {(c.dataset, c.arch) for c in study.cells()} == {("digits", "wide"), ("mine", "wide")}
    assert study.base("dataset", "mine") == "digits"
    assert study.archs["wide"].width == 6
    assert study.attacks["weak"].params.steps == 1


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("bcs", {"base": "lwm"}, ["methods.bcs", "another name"]),
        ("a/b", {"base": "bcs"}, ["methods.a/b: expected a name of at most 64 letters"]),
        ("a\n", {"base": "bcs"}, ["expected text of one line"]),
        ("mine", {"base": "bsc"}, ["methods.mine.base", "nearest match: 'bcs'"]),
        ("mine", {"base": "bcs", "noise": 1}, ["methods.mine.noise", "'noise_scale'"]),
        ("mine", {"noise_scale": 1}, ["methods: unknown method 'mine'"]),
    ],
)
def test_errors_of_variants(name, values, expected, study_data, refused):
    study_data["methods"][name] = values
    message = refused(study_data)
    assert all(part in message for part in expected), message


def test_message_about_a_misspelt_variant_has_the_nearest_match(study_data, refused):
    study_data["methods"]["bcs_quiet"] = {"base": "bcs"}
    study_data["grid"]["methods"] = ["bcs_quite"]
    assert "nearest match: 'bcs_quiet'" in refused(study_data)


# ---------------------------------------------------------------- tables


TABLE = {
    "name": "table4",
    "title": "Table 4",
    "rows": ["arch", "sparsity"],
    "columns": ["method"],
    "attacks": ["clean"],
}


def test_a_table_shows_best_val_by_default(study_data, load_study):
    study_data["tables"] = [TABLE]
    study_data["evaluation"]["selections"]["best_val"] = ["clean"]
    assert load_study(study_data).tables[0].selection == "best_val"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("methods", ["bsc"], ['tables.0.methods = "bsc"', "'bcs'"]),
        ("archs", ["small_cn"], ['tables.0.archs = "small_cn"', "'small_cnn'"]),
        ("attacks", ["pdg"], ['tables.0.attacks = "pdg"', "'pgd'"]),
        ("rows", ["archs"], ['tables.0.rows.0 = "archs"', "'arch'"]),
        ("rows", [], ["tables.0.rows = []", "at least one entry"]),
        ("name", "a b", ['tables.0.name = "a b"']),
        ("colums", [], ["tables.0.colums = []", "'columns'"]),
    ],
)
def test_errors_of_tables(key, value, expected, study_data, refused):
    study_data["tables"] = [TABLE | {key: value}]
    message = refused(study_data)
    assert all(part in message for part in expected), message


# ---------------------------------------------------------------- objectives


def test_error_of_self_training_without_images_describes_the_images(study_data, refused, tmp_path):
    study_data["grid"]["objectives"] = ["rst"]
    for value in (None, str(tmp_path / "missing.npz")):
        study_data["training"]["rst_file"] = value
        message = refused(study_data)
        assert message.startswith("training.rst_file = ")
        assert all(w in message for w in ("npz", "'images'", "'labels'", "TinyImages", "withdrawn"))


def test_self_training_of_a_block_uses_the_images_of_the_block(
    study_data, refused, load_study, tmp_path
):
    (tmp_path / "extra.npz").touch()
    blocks = two_blocks(study_data)
    blocks[1] |= {"objectives": ["rst"], "training": {"rst_file": str(tmp_path / "extra.npz")}}
    study = load_study(study_data)
    [rst] = {study.planned[c].training.rst_file for c in study.cells() if c.objective == "rst"}
    assert rst == str(tmp_path / "extra.npz")
    study_data["training"]["rst_file"] = str(tmp_path / "extra.npz")
    blocks[1]["training"] = {"rst_file": "none.npz"}
    assert refused(study_data).startswith('grid.1.training.rst_file = "none.npz": the objective')
    blocks[1] |= {"objectives": ["at"], "where_exists": None}
    assert load_study(study_data)


@pytest.mark.parametrize("share", [-0.1, 1, 1.5])
def test_share_of_pseudo_labelled_images_is_below_one(share, study_data, refused):
    study_data["training"]["rst_fraction"] = share
    assert f"training.rst_fraction = {share}" in refused(study_data)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"temperature": 1e-8, "noise_scale": 1e-6}, "noise_scale or temperature, not both"),
        ({"rewiring": "until_last_drop", "train": {"schedule": "cosine"}}, "'step'"),
        ({"rewiring": "until_last_drop", "train": {"milestones": []}}, "one of train.milestones"),
        ({"rewiring": "never", "init": "authors"}, "init that meets the budget"),
        ({"init": "strickt"}, "nearest match: 'strict'"),
    ],
)
def test_settings_of_bcs_that_contradict_each_other(params, expected, study_data, refused):
    study_data["methods"]["bcs"] = params
    message = refused(study_data)
    assert message.startswith("methods.bcs")
    assert expected in message


# ---------------------------------------------------------------- digests

CELLS = {
    "dense": Cell("digits", "small_cnn", "dense", "at", 0.0, 0),
    "lwm": Cell("digits", "small_cnn", "lwm", "at", 0.9, 0),
    "bcs": Cell("digits", "small_cnn", "bcs", "at", 0.9, 0),
}
ALL = set(CELLS)

# change -> cells with another fingerprint of training, cells with another one of evaluation
CHANGES = {
    "methods.bcs.noise_scale": (0.5, {"bcs"}, {"bcs"}),
    "methods.bcs.train.lr": (0.7, {"bcs"}, {"bcs"}),
    "methods.lwm.finetune.epochs": (9, {"lwm"}, {"lwm"}),
    "methods.dense.pretrain.lr": (0.7, {"dense", "lwm"}, {"dense", "lwm"}),
    "methods.hydra.prune.lr": (0.7, set(), set()),
    "archs.small_cnn.width": (6, ALL, ALL),
    "datasets.digits.split_seed": (1, ALL, ALL),
    "threat.eps": (0.2, ALL, ALL),
    "training.batch_size": (32, ALL, ALL),
    "training.crafting.steps": (3, ALL, ALL),
    "training.crafting.bn_mode": ("train", ALL, ALL),
    "training.crafting.precision": ("bf16", ALL, ALL),
    "training.precision": ("bf16", ALL, ALL),
    "training.beta": (3, set(), set()),
    "training.label_smoothing": (0.2, ALL, ALL),
    "training.awp": ({"gamma": 0.01}, ALL, ALL),
    "training.ema": ({"decay": 0.9}, ALL, ALL),
    "training.rst_fraction": (0.25, set(), set()),
    "training.rst_file": ("extra.npz", set(), set()),
    "training.synthetic_fraction": (0.25, set(), set()),
    "training.collapse_after": (3, ALL, ALL),
    "training.log_every": (10, ALL, ALL),
    "training.validation.steps": (3, ALL, ALL),
    "training.validation.every": (2, ALL, ALL),
    "evaluation.n_examples": (30, set(), ALL),
    "evaluation.batch_size": (7, set(), ALL),
    "evaluation.seed": (1, set(), ALL),
    "evaluation.attacks.pgd.steps": (11, set(), ALL),
    "evaluation.attacks.autoattack.version": ("plus", set(), set()),
    "evaluation.selections.best_val": (["clean"], set(), set()),
    "grid.methods": (["dense", "lwm", "bcs", "hydra"], set(), set()),
    "grid.sparsities": ([0.5, 0.9, 0.99], set(), set()),
    "grid.seeds": ([0, 1], set(), set()),
    "grid.objectives": (["natural", "at"], set(), set()),
    "title": ("Another", set(), set()),
    "study": ("another", set(), set()),
    "small": (False, set(), set()),
    "machine.device": ("cpu", set(), set()),
    "machine.jobs_per_gpu": (2, set(), set()),
    "machine.threads": (2, set(), set()),
    "machine.memory_mb": (1, set(), set()),
    "machine.minutes": (1, set(), set()),
}


def digests(study):
    return (
        {name: fingerprints.training(study, cell).plan for name, cell in CELLS.items()},
        {name: fingerprints.evaluation(study, cell, "last").plan for name, cell in CELLS.items()},
    )


@pytest.mark.parametrize("path", CHANGES)
def test_digest_changes_only_if_a_setting_matters(path, study_data, load_study):
    before = digests(load_study(study_data))
    value, *expected = CHANGES[path]
    put(study_data, path, value)
    after = digests(load_study(study_data))
    for old, new, changed in zip(before, after, expected, strict=True):
        assert {name for name in old if old[name] != new[name]} == changed


def test_digest_does_not_depend_on_the_order_or_the_spelling_of_keys(study_data, load_study):
    before = digests(load_study(study_data))
    study_data["threat"]["eps"] = "3/20"
    study_data["methods"] = dict(reversed(study_data["methods"].items()))
    study_data["methods"]["bcs"]["noise_scale"] = "1e-6"  # its default
    study_data["grid"]["methods"].reverse()
    assert digests(load_study(study_data)) == before


def test_digests_of_cells_and_selections_differ(study_data, load_study):
    study_data["evaluation"]["selections"] = {"best_val": ["clean"], "last": ["clean"]}
    study = load_study(study_data)
    found = [fingerprints.training(study, cell).plan for cell in CELLS.values()]
    for selection in ("best_val", "last"):
        found += [fingerprints.evaluation(study, cell, selection).plan for cell in CELLS.values()]
    assert len(set(found)) == 9


def test_digest_is_the_hash_of_sorted_json():
    digest = fingerprints.digest
    assert digest({"b": 1, "a": [1.5, None]}) == digest({"a": [1.5, None], "b": 1})
    assert digest({"a": 1}) == "f9d86028c6e0d64e"
    assert digest({"a": 1}) != digest({"a": 1.5})


def test_defaults_of_the_optimiser_are_those_of_the_authors(load_study, study_data):
    del study_data["methods"]
    study_data["grid"]["methods"] = ["bcs", "hydra", "admm", "lwm"]
    methods = load_study(study_data).methods

    def numbers(fit: Fit):
        return fit.epochs, fit.lr, fit.schedule, fit.weight_decay, fit.decay, fit.momentum

    assert numbers(methods["bcs"].train) == (200, 0.1, "step", 5e-4, "sgdw", 0.9)
    assert methods["bcs"].train.milestones == (0.5, 0.75)
    assert (methods["bcs"].noise_scale, methods["bcs"].regrown_theta) == (1e-6, 1e-12)
    assert numbers(methods["dense"].pretrain) == (100, 0.1, "cosine", 1e-4, "coupled", 0.9)
    assert numbers(methods["hydra"].prune) == (20, 0.1, "cosine", 1e-4, "coupled", 0.9)
    assert numbers(methods["hydra"].finetune) == (100, 0.01, "cosine", 1e-4, "coupled", 0.9)
    assert numbers(methods["lwm"].finetune) == (100, 0.01, "cosine", 1e-4, "coupled", 0.9)
    assert numbers(methods["admm"].retrain) == (200, 0.01, "step", 1e-4, "coupled", 0.9)
    assert (methods["admm"].rho, methods["admm"].rho_growth) == (1e-3, 1.3)
    assert methods["admm"].update_every == 20


# ---------------------------------------------------------------- budgets


def epochs_of(study, method):
    [found] = [p.params for c, p in study.planned.items() if c.method == method]
    return {name: value.epochs for name, value in found if hasattr(value, "epochs")}


@pytest.mark.parametrize(
    ("budget", "objective"),
    [
        (("epochs", 12), "at"),
        (("passes", 6 * 12), "at"),  # two crafting steps and a training pass, both ways
        (("passes", 6 * 12 + 5), "at"),
        (("passes", 9 * 12), "trades"),
        (("passes", 2 * 12), "natural"),
    ],
)
def test_a_budget_scales_the_stages_to_the_same_cost(budget, objective, study_data, load_study):
    (unit, total), epochs = budget, 12
    study_data["grid"] |= {"methods": ["bcs", "lwm", "hydra"], "objectives": [objective]}
    study_data["grid"]["budget"] = {"unit": unit, "total": total}
    study_data["methods"]["dense"] = {"pretrain": {"epochs": 3}}
    study_data["methods"]["hydra"] = {"prune": {"epochs": 20}, "finetune": {"epochs": 100}}
    study = load_study(study_data)
    assert epochs_of(study, "dense") == {"pretrain": 3}
    assert epochs_of(study, "bcs") == {"train": epochs}
    assert epochs_of(study, "lwm") == {"finetune": epochs - 3}
    assert epochs_of(study, "hydra") == {"prune": 2, "finetune": 7}


def test_message_about_a_too_small_budget_has_the_smallest_valid_one(study_data, refused):
    study_data["grid"]["methods"] = ["hydra"]
    study_data["methods"]["dense"] = {"pretrain": {"epochs": 3}}
    study_data["grid"]["budget"] = {"unit": "epochs", "total": 4}
    assert refused(study_data) == (
        "grid.budget.total = 4: allows 4 epochs, expected at least 5 for 'hydra'"
    )


def test_smallest_valid_budget_gives_each_stage_one_epoch(study_data, load_study):
    study_data["grid"] |= {"methods": ["dense", "hydra"], "seeds": [0], "sparsities": [0.9]}
    study_data["methods"]["dense"] = {"pretrain": {"epochs": 3, "lr": 0.1}}
    study_data["grid"]["budget"] = {"unit": "epochs", "total": 5}
    study = load_study(study_data)
    [planned] = [p for cell, p in study.planned.items() if cell.method == "hydra"]
    assert [fit.epochs for fit in planned.stages.values()] == [1, 1]


def test_stages_are_validated_after_a_budget_has_scaled_them(study_data, refused, load_study):
    """For example, a warm-up must not be longer than its stage."""
    study_data["grid"]["methods"] = ["bcs"]
    study_data["methods"]["bcs"] = {"train": {"epochs": 10, "warmup": 5}, "temperature": 1e-8}
    study_data["grid"]["budget"] = {"unit": "epochs", "total": 6}
    study = load_study(study_data)  # what was left out stays so: noise_scale beside temperature
    assert epochs_of(study, "bcs") == {"train": 6}
    study_data["grid"]["budget"]["total"] = 3
    reported = (
        "budget.total = 3: does not fit 'bcs': train.warmup = 5: expected fewer epochs of warm-up "
        "than the 3 of the stage"
    )
    assert refused(study_data) == f"grid.{reported}"
    other = study_data["grid"] | {"methods": ["lwm"], "budget": None}
    study_data["grid"] = [other, study_data["grid"]]
    assert refused(study_data) == f"grid.1.{reported}"


@pytest.mark.parametrize("name", registry.names("method"))
def test_a_budget_changes_only_the_lengths_of_stages(name, study_data, load_study):
    study_data["grid"]["methods"], study_data["methods"] = [name], {"dense": {}}
    study_data["methods"]["dense"]["pretrain"] = {"epochs": 1}
    study_data["grid"]["budget"] = {"unit": "epochs", "total": 50}
    study = load_study(study_data)
    [cell] = [c for c in study.cells() if c.method == name]
    found, plain = study.planned[cell].params.model_dump(), study.methods[name].model_dump()
    for stage in (found, plain):
        for values in stage.values():
            if isinstance(values, dict):
                values.pop("epochs", None)
    assert found == plain


# ---------------------------------------------------------------- training settings of a block


def test_training_of_a_block_overrides_that_of_the_study(study_data, load_study):
    blocks = two_blocks(study_data)
    blocks[1]["training"] = {"eps": 0.1, "crafting": {"bn_mode": "train"}}
    study = load_study(study_data)
    found = {c.sparsity: study.planned[c].training for c in study.cells() if c.method == "bcs"}
    one, two = found.values()
    assert (one.eps, one.crafting.bn_mode) == (None, "eval")
    assert (two.eps, two.crafting.bn_mode) == (0.1, "train")
    assert two.crafting.steps == one.crafting.steps
    digests = {fingerprints.training(study, cell).plan for cell in study.cells()}
    assert len(digests) == len(study.cells())


@pytest.mark.parametrize(
    ("training", "reported"),
    [
        ({"epss": 0.1}, "grid.1.training.epss = 0.1: unknown key"),
        ({"crafting": {"steps": 0}}, "grid.1.training.crafting.steps = 0: "),
        ([1], "grid.1.training = [1]: expected a mapping of settings"),
    ],
)
def test_errors_in_the_training_of_a_block_name_their_key(training, reported, study_data, refused):
    two_blocks(study_data)[1]["training"] = training
    assert refused(study_data).startswith(reported)


def test_a_variant_may_start_from_a_variant(study_data, load_study, refused):
    study_data["grid"]["methods"] = ["short", "lwm_short"]
    study_data["methods"] |= {
        "short": {"base": "dense", "pretrain": {"epochs": 1}},
        "lwm_short": {"base": "lwm", "starts_from": "short"},
    }
    study = load_study(study_data)
    [cell] = [c for c in study.cells() if c.method == "lwm_short"]
    assert study.starting_cell(cell).method == "short"
    assert {c.method for c in study.cells()} == {"short", "lwm_short"}
    study_data["methods"]["lwm_short"]["starts_from"] = "shrot"
    assert refused(study_data).startswith('methods.lwm_short.starts_from = "shrot": expected short')
    study_data["methods"]["lwm_short"] = {"base": "bcs", "starts_from": "short"}
    assert refused(study_data) == ('methods.lwm_short.starts_from = "short": expected nothing')


# ---------------------------------------------------------------- external models


@pytest.fixture
def given(study_data, tmp_path):
    """An entry of the section models, which a test may change."""
    (tmp_path / "w.pt").write_bytes(b"")
    model = {"file": str(tmp_path / "w.pt"), "arch": "small_cnn", "dataset": "digits"}
    study_data["models"] = {"mine": model | {"objective": "at"}}
    return study_data["models"]["mine"]


def test_an_external_model_is_a_cell(study_data, given, load_study):
    given |= {"sparsity": 0.75, "label": "My own", "mean": [0.5], "std": [0.2]}
    study = load_study(study_data)
    [cell] = [c for c in study.cells() if c.method == "mine"]
    assert cell.key == "digits/small_cnn/mine/at/s0.7500/seed0"
    assert study.label("method", "mine") == "My own"
    assert study.starting_cell(cell) is None
    assert not study.is_dense("mine")
    del study_data["grid"]
    assert load_study(study_data).cells() == [cell]


MODEL_ERRORS = {
    "no source": (
        {"file": None},
        "models.mine.file = null: expected one of file, zoo and callable",
    ),
    "two sources": ({"zoo": "X"}, "expected one of file, zoo and callable"),
    "callable": (
        {"file": None, "arch": None, "callable": "nets"},
        'models.mine.callable = "nets": expected module:function, like mynets:resnet',
    ),
    "no arch": ({"arch": None}, "models.mine.arch = null: expected the arch of the file"),
    "no such file": ({"file": "none.pt"}, 'models.mine.file = "none.pt": no such file'),
    "mean alone": ({"mean": [0.5]}, "models.mine.mean = [0.5]: expected std too"),
    "objective": ({"objective": "att"}, "nearest match: 'at'"),
    "arch": ({"arch": "smal_cnn"}, "nearest match: 'small_cnn'"),
    "data": ({"dataset": "digit"}, "nearest match: 'digits'"),
    "sparsity": ({"sparsity": 1}, "models.mine.sparsity = 1"),
    "key": ({"fil": "x"}, "nearest match: 'file'"),
}


@pytest.mark.parametrize("error", MODEL_ERRORS)
def test_errors_of_an_external_model_name_their_key(error, study_data, given, refused):
    change, reported = MODEL_ERRORS[error]
    given |= change
    assert reported in refused(study_data)


@pytest.mark.parametrize("name", ["bcs", "lwm", "a/b", "rigl"])
def test_an_external_model_needs_an_unused_name(name, study_data, given, refused):
    study_data["models"] = {name: given}
    assert refused(study_data).startswith(f"models.{name}: expected a name")
