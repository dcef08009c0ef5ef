"""Checks of a whole study: settings that are wrong together, sizes, and files that are no study."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from robsparse import datasets, figures
from robsparse.base import registry
from robsparse.base.names import LONGEST_NAME
from robsparse.cli.main import main
from robsparse.schema.fields import LARGEST
from robsparse.schema.grid import OWN_TABLES
from robsparse.schema.imagesets import Description
from robsparse.schema.training import Fit
from robsparse.study import loading

TABLE = {
    "name": "table4",
    "title": "Table 4",
    "rows": ["arch", "sparsity"],
    "columns": ["method"],
    "attacks": ["clean"],
    "selection": "last",
}


def merge(data, change):
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            merge(data[key], value)
        else:
            data[key] = value


LONG = "n" * 10_000
BCS = {"base": "bcs"}
# change of the study -> start of the message
NONSENSE = {
    "epochs": ({"methods": {"bcs": {"train": {"epochs": 1e18}}}}, "methods.bcs.train.epochs = 1"),
    "some epochs": (
        {"methods": {"bcs": {"train": {"epochs": 100_001}}}},
        "methods.bcs.train.epochs = 100001: expected at most 100000 epochs",
    ),
    "lr": ({"methods": {"bcs": {"train": {"lr": 1e300}}}}, "methods.bcs.train.lr = 1e+300: "),
    "lr of 2000": (
        {"methods": {"lwm": {"finetune": {"lr": 2000}}}},
        "methods.lwm.finetune.lr = 2000: expected a learning rate of at most 1000",
    ),
    "sgdw": (
        {"methods": {"bcs": {"train": {"decay": "sgdw", "weight_decay": 2}}}},
        "methods.bcs.train.weight_decay = 2: expected less than 1",
    ),
    "coupled": (
        {"methods": {"lwm": {"finetune": {"decay": "coupled", "weight_decay": 1}}}},
        "methods.lwm.finetune.weight_decay = 1: expected less than 1",
    ),
    "nesterov without momentum": (
        {"methods": {"lwm": {"finetune": {"nesterov": True, "momentum": 0}}}},
        "methods.lwm.finetune.nesterov = true: expected false, because momentum is 0",
    ),
    "descending milestones": (
        {"methods": {"bcs": {"train": {"milestones": [0.75, 0.5]}}}},
        "methods.bcs.train.milestones = [0.75, 0.5]: expected ascending shares, like [0.5, 0.75]",
    ),
    "equal milestones": (
        {"methods": {"bcs": {"train": {"milestones": [0.5, 0.5]}}}},
        "methods.bcs.train.milestones = [0.5, 0.5]: expected ascending shares",
    ),
    "a pattern without quotation marks": (
        {"methods": {"lwm": {"pattern": 2 * 60 + 4}}},
        "methods.lwm.pattern = 124: expected 'N:M' with 0 < N < M < 1000, like '2:4', in quotation",
    ),
    "a pattern that keeps all": (
        {"methods": {"hydra": {"pattern": "4:4"}}},
        "methods.hydra.pattern = \"4:4\": expected 'N:M' with 0 < N < M < 1000",
    ),
    "a pattern with fewer weights than the grid": (
        {"grid": {"sparsities": [0.9, 0.95]}, "methods": {"lwm": {"pattern": "1:16"}}},
        "grid.sparsities = [0.9, 0.95]: expected at least 0.9375 for 'lwm' with the pattern 1:16",
    ),
    "warm-up of eps": (
        {"grid": {"methods": ["bcs"]}, "training": {"crafting": {"eps_warmup": 2}}},
        "training.crafting.eps_warmup = 2: expected at most the 1 epochs of the first stage of ",
    ),
    "empty selection": (
        {"evaluation": {"selections": {"last": []}}},
        "evaluation.selections.last = []: expected at least one entry",
    ),
    "no selection": (
        {"evaluation": {"selections": 0}},
        "evaluation.selections = 0: ",
    ),
    "width": (
        {"archs": {"small_cnn": {"width": 1_000_000}}},
        "archs.small_cnn.width = 1000000: expected to be less than or equal to 1024; nearest "
        "match: 1024",
    ),
    "threads": (
        {"machine": {"threads": 1_000_000}},
        "machine.threads = 1000000: expected to be less than or equal to 1024; nearest match: 1024",
    ),
    "steps": (
        {"training": {"crafting": {"steps": 10**12}}},
        "training.crafting.steps = 1000000000000: expected a number of at most 2147483648",
    ),
    "queries": (
        {"evaluation": {"attacks": {"pgd": {"restarts": 10**10}}}},
        "evaluation.attacks.pgd.restarts = 10000000000: expected a number of at most 2147483648",
    ),
    "synthetic images that are not there": (
        {"training": {"synthetic_file": "none.npz"}},
        'training.synthetic_file = "none.npz": expected an npz file with the arrays',
    ),
    "synthetic images of rst": (
        {
            "grid": {"objectives": ["rst"]},
            "training": {"synthetic_file": __file__, "rst_file": __file__},
        },
        f"training.synthetic_file = \"{__file__}\": expected none for the objective 'rst'",
    ),
    "label smoothing of half": (
        {"training": {"label_smoothing": 0.5}},
        "training.label_smoothing = 0.5: expected to be less than 0.5",
    ),
    "label smoothing of mart": (
        {"grid": {"objectives": ["mart"]}, "training": {"label_smoothing": 0.1}},
        "training.label_smoothing = 0.1: expected 0 for the objective 'mart'",
    ),
    "one image of a mixed batch": (
        {"grid": {"objectives": ["mat"]}, "training": {"batch_size": 1}},
        "training.batch_size = 1: expected at least 2 for the objective 'mat', which attacks half "
        "of a batch; nearest match: 2",
    ),
    "one image of a block's mixed batch": (
        {"grid": {"objectives": ["mat"], "training": {"batch_size": 1}}},
        "grid.training.batch_size = 1: expected at least 2 for the objective 'mat'",
    ),
    "rows are columns": (
        {"tables": [TABLE | {"columns": ["method", "arch"]}]},
        'tables.0.columns = ["method", "arch"]: expected axes that are not in rows',
    ),
    "an axis twice": (
        {"tables": [TABLE | {"rows": ["arch", "arch"]}]},
        'tables.0.rows = ["arch", "arch"]: expected each entry once',
    ),
    "two tables of one name": (
        {"tables": [TABLE, TABLE]},
        "tables: 'table4' and 'table4': expected names that differ in lower case too",
    ),
    "two tables of nearly one name": (
        {"tables": [TABLE, TABLE | {"name": "Table4"}]},
        "tables: 'Table4' and 'table4': expected names that differ in lower case too",
    ),
    "a table named main": (
        {"tables": [TABLE | {"name": "main"}]},
        'tables.0.name = "main": expected a name other than main, main_notes, per_class, '
        "disagreements",
    ),
    "a table named Main": (
        {"tables": [TABLE | {"name": "Main"}]},
        'tables.0.name = "Main": expected a name other than main, main_notes, per_class, '
        "disagreements",
    ),
    "a table of weights that nobody evaluates": (
        {"tables": [TABLE | {"selection": "best_val"}]},
        'tables.0.selection = "best_val": expected one of the study\'s: last',
    ),
    "networks in one field of a table": (
        {"grid": {"sparsities": [0.9, 0.95]}, "tables": [TABLE | {"rows": ["arch"]}]},
        "tables.0: 'table4': rows and columns put digits/small_cnn/bcs/at/s0.9000/seed0 and ",
    ),
    "published": (
        {"tables": [TABLE | {"published": ["results/reference/none.csv"]}]},
        'tables.0.published = "results/reference/none.csv": no such file',
    ),
    "published folder": ({"tables": [TABLE | {"published": ["/"]}]}, "tables.0.published = "),
    "study named reference": (
        {"study": "reference"},
        'study = "reference": expected another name: the folder results/reference '
        "does not belong to a study",
    ),
    "study named Published": ({"study": "Published"}, 'study = "Published": expected another name'),
    "variants that differ in case": (
        {"methods": {"quiet": BCS, "Quiet": BCS | {"label": "Loud"}}},
        "methods: 'quiet' and 'Quiet': expected names that differ in lower case too",
    ),
    "a variant that differs from its base in case": (
        {"methods": {"BCS": BCS | {"label": "mine"}}},
        "methods: 'BCS' and 'bcs': expected names that differ in lower case too",
    ),
    "two variants of one label": (
        {"methods": {"one": BCS | {"label": "x"}, "two": BCS | {"label": "x"}}},
        "methods.two.label = \"x\": expected a label that differs from the label of 'one'",
    ),
    "a variant with the label of its base": (
        {"methods": {"one": BCS | {"label": "BCS"}}},
        "methods.",
    ),
    "two attacks of one label": (
        {"evaluation": {"attacks": {"weak": {"base": "pgd", "label": "PGD"}}}},
        "evaluation.attacks.",
    ),
    "long name of a study": ({"study": LONG}, f'study = "{"n" * 76}...: expected a name of at '),
    "long name of a method": ({"grid": {"methods": [LONG]}}, 'grid.methods.0 = "nnn'),
    "long name of a variant": ({"methods": {LONG: BCS}}, f"methods.{'n' * 77}...: expected a name"),
    "long name of a base": (
        {"methods": {"mine": {"base": LONG}}},
        f"methods.mine.base: unknown method '{'n' * 77}...', expected one of: ",
    ),
    "long name of a table": ({"tables": [TABLE | {"name": LONG}]}, 'tables.0.name = "nnn'),
    "long unknown key": ({LONG: 1}, f"{'n' * 77}... = 1: unknown key, expected one of: study"),
    "long value": ({"threat": {"norm": LONG}}, 'threat.norm = "nnn'),
    "number that is no number": ({"threat": {"eps": LONG}}, 'threat.eps = "nnn'),
    "key of two lines": ({"a\nb": 1}, "not valid YAML: "),
    "title of two lines": ({"title": "a\nb"}, "not valid YAML: "),
    "name with a null byte": ({"study": "a\0b"}, "not valid YAML: "),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_error_is_one_line(what, study_data, refused):
    change, message = NONSENSE[what]
    merge(study_data, change)
    lines = refused(study_data).splitlines()
    assert [line[: len(message)] for line in lines] == [message], lines
    assert len(lines[0]) < 500


def test_all_errors_of_a_study_are_reported_together(study_data, refused):
    study_data["evaluation"]["n_examples"] = 801
    study_data["training"]["crafting"]["step_size"] = 0.5
    study_data["tables"] = [TABLE | {"published": ["none.csv"], "methods": ["bsc"]}]
    lines = refused(study_data).splitlines()
    assert [line.split(" = ")[0] for line in lines] == [
        "training.crafting.step_size",
        "evaluation.n_examples",
        "tables.0.methods",
        "tables.0.published",
    ]


def test_large_valid_values_are_accepted(study_data, load_study):
    study_data["methods"]["bcs"]["train"] = {"epochs": 100_000, "lr": 1000, "weight_decay": 0.999}
    study_data["machine"]["threads"] = 1024
    study_data["study"] = "n" * LONGEST_NAME
    study_data["training"]["crafting"]["eps_warmup"] = 1
    study_data["tables"] = [TABLE, TABLE | {"name": "table5"}]
    study_data["tables"][0]["methods"] = ["bcs", "dense"]
    assert load_study(study_data).methods["bcs"].train.epochs == 100_000


@pytest.mark.parametrize("key", ["milestones", "warmup", "epochs", "lr", "weight_decay"])
def test_stages_are_also_checked_without_a_config(key):
    wrong = {"milestones": (0.5, 0.2), "warmup": 3, "epochs": 10**6, "lr": 1e4, "weight_decay": 1}
    with pytest.raises(ValueError, match=key if key in ("lr", "epochs") else "expected"):
        Fit(**({"epochs": 3, "lr": 0.1} | {key: wrong[key]}))


def test_config_knows_the_tables_of_every_study():
    assert {Path(name).stem for name in figures.TABLES} == set(OWN_TABLES)


# ---------------------------------------------------------------- sizes of data

DIGITS = {"validation_examples": 20, "test_examples": 800}  # of 1,797: 977 are left
DATA = {
    "batch": (
        {"training": {"batch_size": 978}},
        "training.batch_size = 978: expected at most the 977 training images of 'digits'; nearest "
        "match: 977",
    ),
    "batch of a block": (
        {"grid": {"training": {"batch_size": 2000}}},
        "grid.training.batch_size = 2000: expected at most the 977 training images of 'digits'",
    ),
    "images that are attacked": (
        {"evaluation": {"n_examples": 801}},
        "evaluation.n_examples = 801: expected at most the test images of 'digits'; nearest match: "
        "800",
    ),
    "images of a data set that is not there yet": (
        {"grid": {"datasets": ["cifar10"]}, "evaluation": {"n_examples": 10_001}},
        "evaluation.n_examples = 10001: expected at most the test images of 'cifar10'; nearest "
        "match: 10000",
    ),
    "images of a data set behind one of unknown size": (
        {
            "grid": {"datasets": ["imagefolder", "digits"]},
            "datasets": {"imagefolder": {"data_dir": "own"}},
            "evaluation": {"n_examples": 801},
        },
        "evaluation.n_examples = 801: expected at most the test images of 'digits'; nearest match: "
        "800",
    ),
    "held out of 100 classes": (
        {"grid": {"datasets": ["cifar100"]}, "datasets": {"cifar100": {"validation_examples": 99}}},
        "datasets.cifar100.validation_examples = 99: expected 100 to 49900 of the 50000 images "
        "that are not for tests",
    ),
    "held out of 100 classes, which are trained on too": (
        {
            "grid": {"datasets": ["cifar100"]},
            "datasets": {"cifar100": {"validation_examples": 99, "train_on_validation": True}},
        },
        "datasets.cifar100.validation_examples = 99: expected 100 to 49900 of the 50000 images "
        "that are not for tests",
    ),
    "more training images than there are": (
        {"grid": {"datasets": ["cifar100"]}, "datasets": {"cifar100": {"train_examples": 48_001}}},
        "datasets.cifar100.train_examples = 48001: expected at most the 48000 images that are not "
        "held out",
    ),
    "fewer training images than classes": (
        {"grid": {"datasets": ["cifar100"]}, "datasets": {"cifar100": {"train_examples": 99}}},
        "datasets.cifar100.train_examples = 99: expected at least one for each of the 100 classes",
    ),
    "small images": (
        {"grid": {"archs": ["vgg16"]}},
        "archs.vgg16: expected images of at least 16x16 pixels, but 'digits' has images of 8x8",
    ),
    "channels": (
        {"archs": {"small_cnn": {"mean": [0.5] * 3, "std": [0.2] * 3}}},
        "archs.small_cnn.mean = [0.5, 0.5, 0.5]: expected a value for each of the 1 channels of "
        "'digits'",
    ),
}


@pytest.mark.parametrize("what", DATA)
def test_too_small_data_is_an_error_before_it_is_read(what, study_data, refused):
    change, message = DATA[what]
    merge(study_data, change)
    assert refused(study_data).startswith(message)


def test_all_images_may_be_used(study_data, load_study):
    study_data["training"]["batch_size"] = 977
    study_data["evaluation"]["n_examples"] = 800
    assert load_study(study_data)
    study_data["grid"]["archs"] = ["resnet18", "small_resnet", "wrn28_2"]  # of 8x8 images
    assert load_study(study_data)


def npz(path, train=(40, 8, 8), test=(20, 8, 8), write=np.savez):
    labels = {n: np.arange(s[0]) % 2 for n, s in (("train_labels", train), ("test_labels", test))}
    images = {"train_images": np.zeros(train, np.uint8), "test_images": np.zeros(test, np.uint8)}
    write(path, **images, **labels)
    return str(path)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (3, 8, 8), (8, 8, 1), (1, 8, 8)])
def test_sizes_of_a_file_equal_those_of_the_loaded_data(shape, write, tmp_path):
    file = npz(tmp_path / "data.npz", (40, *shape), (20, *shape), write)
    params = registry.entry("dataset", "npz").params(file=file, validation_examples=10)
    splits, found = datasets.load("npz", params), params.description()
    parts = splits.train, splits.validation, splits.test
    assert found == Description(splits.image_shape, None, *map(len, parts))
    assert datasets.describe("npz", params) == Description(splits.image_shape, 2, *map(len, parts))


def test_sizes_of_the_digits_equal_those_of_the_loaded_data():
    params = registry.entry("dataset", "digits").params(**DIGITS)
    splits = datasets.load("digits", params)
    parts = splits.train, splits.validation, splits.test
    assert params.description() == Description(splits.image_shape, 10, *map(len, parts))


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "header"])
def test_sizes_of_a_damaged_file_are_unknown(damage, tmp_path):
    path = tmp_path / "data.npz"
    npz(path)
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "text": b"no archive",
            "empty": b"",
            "header": content.replace(b"'shape'", b"'shope'"),
        }[damage]
    )
    params = registry.entry("dataset", "npz").params(file=str(path), validation_examples=10)
    assert params.description() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datasets": {"npz": {"validation_examples": 50}}}, "datasets.npz.validation_examples = "),
        ({"evaluation": {"n_examples": 21}}, "evaluation.n_examples = 21: expected at most the "),
        ({"training": {"batch_size": 31}}, "training.batch_size = 31: expected at most the 30 "),
    ],
)
def test_sizes_of_a_file_of_the_user_are_checked_too(
    change, message, study_data, refused, tmp_path
):
    study_data["datasets"]["npz"] = {"file": npz(tmp_path / "a.npz"), "validation_examples": 10}
    study_data["grid"]["datasets"] = ["npz"]
    study_data["training"]["batch_size"] = 30
    merge(study_data, change)
    assert refused(study_data).startswith(message)


@pytest.mark.parametrize(
    ("name", "key"), [("npz", "file"), ("imagefolder", "data_dir"), ("cifar10", "data_dir")]
)
def test_missing_data_fails_only_the_command_check(name, key, study_data, tmp_path, capsys):
    """Results can be collected and drawn without the images."""
    value = tmp_path / "data"
    if name == "cifar10":
        value.touch()  # a file where a folder is meant; one that is missing is downloaded to
    study_data["datasets"][name] = {key: str(value)}
    study_data["grid"]["datasets"] = [name]
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study_data))
    assert loading.load(path)
    assert main(["check", str(path)]) == 2
    message = f"{path}: datasets.{name}.{key} = {json.dumps(str(value))}: expected an existing file"
    assert capsys.readouterr().err.startswith(f"robsparse: error: {message}")


def test_a_folder_that_the_user_names_must_exist_and_a_default_one_is_noted(
    study_data, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    study_data["grid"]["datasets"] = ["cifar10"]
    path = tmp_path / "study.yaml"
    study_data["datasets"]["cifar10"] = {"data_dir": "cifra"}
    path.write_text(yaml.safe_dump(study_data))
    assert main(["check", str(path)]) == 2
    assert 'datasets.cifar10.data_dir = "cifra": expected an existing' in capsys.readouterr().err
    study_data["datasets"]["cifar10"] = {"data_dir": "data"}  # the default: it is downloaded to it
    path.write_text(yaml.safe_dump(study_data))
    note = 'datasets.cifar10: its folder "data" is not there yet\n'
    assert main(["check", str(path)]) == 0
    assert note in capsys.readouterr().out
    (tmp_path / "data").mkdir()
    assert main(["check", str(path)]) == 0
    assert note not in capsys.readouterr().out


def test_test_images_alone_are_enough_for_models_and_not_for_a_grid(
    study_data, refused, load_study, tmp_path
):
    file = tmp_path / "test.npz"
    np.savez(file, test_images=np.zeros((20, 8, 8), np.uint8), test_labels=np.arange(20) % 2)
    study_data["datasets"]["npz"] = {"file": str(file)}
    (tmp_path / "w.pt").write_bytes(b"")
    model = {"file": str(tmp_path / "w.pt"), "arch": "small_cnn", "objective": "at"}
    study_data["models"] = {"theirs": model | {"dataset": "npz"}}
    assert len(load_study(study_data).cells()) > 1
    study_data["grid"]["datasets"] = ["npz"]
    assert refused(study_data).startswith("datasets.npz: no training images, expected some")


# ---------------------------------------------------------------- files that are no study

DEEP = "[" * 1000 + "]" * 1000
MANY = "".join(f"a{n + 1}: &x{n + 1} [{', '.join([f'*x{n}'] * 9)}]\n" for n in range(6))
TEXTS = {
    "1,000 levels": (DEEP, "expected at most 32 levels of nesting in"),
    "1,000 levels of a value": (f"threat: {DEEP}", "expected at most 32 levels of nesting"),
    "1,000 levels of mappings": ("{a: " * 1000 + "1" + "}" * 1000, "at most 32 levels of nesting"),
    "levels through aliases": (
        "a0: &x0 [1]\n" + "".join(f"a{n + 1}: &x{n + 1} [*x{n}]\n" for n in range(50)),
        "expected at most 32 levels of nesting",
    ),
    "contains itself": ("a: &a [*a]", "expected at most 32 levels of nesting"),
    "a million values": ("a0: &x0 [1, 2]\n" + MANY, "expected at most 100000 values with aliases"),
    "5,000 digits": (f"threat: {'5' * 5000}", '"5555'),
    "5,000 hexadecimal digits": (f"threat: 0x{'F' * 5000}", '"0xFFFF'),
    "5,000 digits as key": (f"? {'5' * 5000}\n: 1", '"5555'),
    "no date": ("study: 2020-13-45", '"2020-13-45" cannot be read as timestamp'),
    "no number": ("study: !!int abc", '"abc" cannot be read as int'),
    "no float": ("study: !!float abc", '"abc" cannot be read as float'),
    "no truth": ("study: !!bool maybe", '"maybe" cannot be read as bool'),
    "no timestamp": ("study: !!timestamp x", '"x" cannot be read as timestamp'),
    "no zone": ("study: 2001-12-14t21:59:43.10-99:00", "cannot be read as timestamp"),
    "digits and underscores": ("study: 0x_", '"0x_" cannot be read as int'),
    "mapping that is none": ("study: !!map 3", "expected a mapping node"),
    "set that is none": ("study: !!set [1]", "expected a mapping node"),
    "surrogate": (r'"\ud800": 1', "expected text of one line without control characters"),
    "null byte": (r'study: "a\0"', "expected text of one line without control characters"),
    "escape": (r'title: "\e[31m"', "expected text of one line without control characters"),
    "two documents": ("a: 1\n---\na: 2\n", "expected a single document"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_error_about_unreadable_yaml_is_one_line(what, refused):
    text, message = TEXTS[what]
    (line,) = refused(text).splitlines()
    assert line.startswith("not valid YAML: ")
    assert message in line
    assert len(line) < 500


def test_limits_allow_every_study_of_the_repository(repository):
    for path in sorted((repository / "config").glob("*.yaml")):
        assert loading.load(path)
    assert loading.DEEPEST >= 32
    assert LARGEST >= 2**31


def test_check_of_an_invalid_study_exits_with_2_and_one_line(study_data, tmp_path):
    """Runs the command, and checks that it does not import torch."""
    study_data["machine"]["threads"] = 10**6
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(study_data))
    code = (
        "import sys, json; from robsparse.cli.main import main\n"
        f"code = main(['check', {str(tmp_path / 'bad.yaml')!r}])\n"
        "print(json.dumps([code, 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [2, False]
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"robsparse: error: {tmp_path / 'bad.yaml'}: machine.threads = 1000000")
