"""Configurations: what a bad one is told, and what a good one means."""

import datetime
from pathlib import Path

import pytest
import yaml

from robsparse import config
from robsparse.cells import Cell
from robsparse.config import Fit, starting_cell
from robsparse.errors import UsageError, nearest
from robsparse.staleness import evaluation_digest, training_digest


@pytest.fixture
def refusal(tmp_path):
    """refusal(data or text) -> the message of a config that is refused, without its path."""

    def load(content):
        path = tmp_path / "bad.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        with pytest.raises(UsageError) as caught:
            config.load(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        return message.removeprefix(f"{path}: ")

    return load


def put(data, path, value):
    *parents, last = path.split(".")
    for name in parents:
        data = data.setdefault(name, {})
    data[last] = value


# ---------------------------------------------------------------- bad input

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
        ['grid.objectives.0 = "trade"', "expected 'natural', 'at' or 'trades'"],
        "'trades'",
    ),
    "unknown selection": (
        "evaluation.selections.best",
        ["clean"],
        ["evaluation.selections.best", "'best_val' or 'last'"],
        "",
    ),
    "eps in 8-bit units": ("threat.eps", 8, ["threat.eps = 8", "(0, 1]"], "'8/255'"),
    "eps of zero": ("threat.eps", 0, ["threat.eps = 0", "(0, 1]"], ""),
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
    "sparsity of five decimals": ("grid.sparsities", [0.99999], ["four decimals"], ""),
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
        ["evaluation.n_examples = 801", "test_examples"],
        "800",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_fault_is_one_line_with_key_value_expectation_and_nearest_match(fault, refusal, study_data):
    path, value, parts, match = BAD[fault]
    put(study_data, path, value)
    message = refusal(study_data)
    assert "\n" not in message
    assert len(message) < 700
    for part in parts:
        assert part in message
    assert "expected" in message or "should match" in message
    assert ("nearest match" in message) == bool(match), message
    assert message.endswith(f"nearest match: {match}") or not match or match in message


def test_each_of_several_faults_gets_its_line(refusal, study_data):
    study_data["threat"]["eps"] = 8
    study_data["grid"]["seeds"] = [-1]
    lines = refusal(study_data).splitlines()
    assert len(lines) == 2
    assert any("threat.eps = 8" in line for line in lines)
    assert any("grid.seeds.0 = -1" in line for line in lines)


@pytest.mark.parametrize("key", ["study", "title", "grid", "threat", "training", "evaluation"])
def test_missing_section_is_named(key, refusal, study_data):
    del study_data[key]
    assert refusal(study_data) == f"{key}: missing, expected a value"


@pytest.mark.parametrize(
    "path", ["threat.eps", "training.crafting", "training.crafting.step_size", "grid.seeds"]
)
def test_missing_key_is_named_with_its_section(path, refusal, study_data):
    section, *rest = path.split(".")
    found = study_data[section]
    for name in rest[:-1]:
        found = found[name]
    del found[rest[-1]]
    assert refusal(study_data) == f"{path}: missing, expected a value"


TEXTS = {
    "empty": ("", "expected a mapping of sections, found NoneType"),
    "list": ("- study", "expected a mapping of sections, found list"),
    "open bracket": ("study: [a, b", "not valid YAML"),
    "tab": ("study:\n\tx: 1", "not valid YAML"),
    "duplicate key": ("study: a\ntitle: b\nstudy: c\n", "the key 'study' stands twice"),
    "nested duplicate": ("a:\n  b:\n    c: 1\n    c: 2\n", "the key 'c' stands twice"),
    "list as key": ("? [a, b]\n: 1\n", "not valid YAML"),
    "mapping as key": ("? {a: b}\n: 1\n", "not valid YAML"),
    "python object": ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    "date as key": ("2020-01-01: 1\n", "2020-01-01"),
    "number as key": ("7: 1\n", "7 = 1: unknown key"),
    "contains itself": ("a: &a [*a]\n", "a"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_is_no_study_is_one_line(text, refusal):
    content, expected = TEXTS[text]
    message = refusal(content)
    assert expected in message
    assert "\n" not in message


def test_duplicate_key_tells_its_line(refusal):
    assert "line 3" in refusal("study: a\ntitle: b\nstudy: c\n")


def test_missing_file_and_folder_are_one_line(tmp_path):
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(UsageError, match="cannot read the config") as caught:
            config.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_file_that_is_not_text_is_one_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"study: \xff\xfe")
    with pytest.raises(UsageError, match="not valid YAML"):
        config.load(path)


def test_nearest_match_is_silent_when_nothing_is_near():
    assert nearest("bsc", ["bcs", "lwm"]) == "; nearest match: 'bcs'"
    assert nearest("zzz", ["bcs", "lwm"]) == ""
    assert nearest("BCS", ["bcs"]) == "; nearest match: 'bcs'"


# ---------------------------------------------------------------- good input


@pytest.mark.parametrize(
    ("written", "meant"), [("8/255", 8 / 255), ("1/3", 1 / 3), (0.15, 0.15), ("0.1", 0.1), (1, 1.0)]
)
def test_radius_is_read_exactly(written, meant, study_data, load_study):
    study_data["threat"]["eps"] = written
    assert load_study(study_data).threat.eps == meant


def test_number_that_yaml_takes_for_a_word_is_a_number(study_data, tmp_path):
    assert yaml.safe_load("5e-4") == "5e-4"
    study_data["methods"]["dense"]["pretrain"]["weight_decay"] = "@"
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study_data).replace("'@'", "5e-4"))
    assert config.load(path).methods["dense"].pretrain.weight_decay == 0.0005


def test_parameters_left_out_are_the_defaults(study_data, load_study):
    del study_data["methods"]
    study = load_study(study_data)
    assert study.methods["bcs"].train.epochs == 200
    assert study.methods["lwm"].finetune.lr == 0.01
    assert study.evaluation.attacks["pgd"].restarts == 2
    study_data["methods"] = {"bcs": None}
    assert load_study(study_data).methods["bcs"] == study.methods["bcs"]


def test_starting_methods_and_clean_get_their_parameters_too(study_data, load_study):
    study_data["evaluation"]["selections"] = {"last": ["pgd"]}
    study = load_study(study_data)
    assert "dense" not in study.grid.methods
    assert study.methods["dense"].pretrain.epochs == 1
    assert "clean" in study.evaluation.attacks


def test_settings_cannot_be_changed(study_data, load_study):
    with pytest.raises(ValueError, match="frozen"):
        load_study(study_data).threat.eps = 0.5


@pytest.mark.parametrize("name", ["quick.yaml", "tiny.yaml"])
def test_studies_of_the_repository_are_valid(name, repository):
    study = config.load(repository / "config" / name)
    assert study.study == Path(name).stem
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


def test_dense_is_trained_once_a_seed_and_objective(study_data, load_study):
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


def test_dense_is_left_out_where_nothing_starts_from_it(study_data, load_study):
    study_data["grid"]["methods"] = ["bcs"]
    assert {cell.method for cell in load_study(study_data).cells()} == {"bcs"}


def test_starting_cell_differs_in_method_and_sparsity_alone():
    assert starting_cell(Cell("digits", "small_cnn", "hydra", "trades", 0.99, 7)) == Cell(
        "digits", "small_cnn", "dense", "trades", 0.0, 7
    )
    assert starting_cell(Cell("digits", "small_cnn", "bcs", "at", 0.9, 0)) is None
    assert starting_cell(Cell("digits", "small_cnn", "dense", "at", 0.0, 0)) is None


# ---------------------------------------------------------------- digests

CELLS = {
    "dense": Cell("digits", "small_cnn", "dense", "at", 0.0, 0),
    "lwm": Cell("digits", "small_cnn", "lwm", "at", 0.9, 0),
    "bcs": Cell("digits", "small_cnn", "bcs", "at", 0.9, 0),
}
ALL = set(CELLS)

# what changes -> the cells whose training, and whose evaluation, is another one then
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
    "machine.threads": (2, set(), set()),
    "machine.memory_mb": (1, set(), set()),
    "machine.minutes": (1, set(), set()),
}


def digests(study):
    return (
        {name: training_digest(study, cell) for name, cell in CELLS.items()},
        {name: evaluation_digest(study, cell, "last") for name, cell in CELLS.items()},
    )


@pytest.mark.parametrize("path", CHANGES)
def test_digest_changes_when_and_only_when_a_setting_matters(path, study_data, load_study):
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
    found = [training_digest(study, cell) for cell in CELLS.values()]
    for selection in ("best_val", "last"):
        found += [evaluation_digest(study, cell, selection) for cell in CELLS.values()]
    assert len(set(found)) == 9


def test_digest_is_the_hash_of_sorted_json():
    assert config.digest({"b": 1, "a": [1.5, None]}) == config.digest({"a": [1.5, None], "b": 1})
    assert config.digest({"a": 1}) == "f9d86028c6e0d64e"
    assert config.digest({"a": 1}) != config.digest({"a": 1.5})


def test_optimiser_defaults_are_those_of_the_authors(load_study, study_data):
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
