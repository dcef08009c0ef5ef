"""Result rows, their intervals, and files that are whole or not there."""

import json
import stat
import subprocess

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import binomtest

from robsparse import records
from robsparse.errors import UsageError
from robsparse.records import (
    Record,
    Row,
    atomic,
    read_json,
    read_record,
    wilson_interval,
    write_record,
)


@pytest.fixture
def values():
    """A valid row as plain values."""
    return {
        "dataset": "digits",
        "arch": "small_cnn",
        "method": "bcs",
        "objective": "at",
        "sparsity": 0.9,
        "seed": 0,
        "selection": "last",
        "attack": "pgd",
        "component": "all",
        "accuracy": 0.75,
        "n_correct": 15,
        "n_examples": 20,
        "ci_low": 0.531,
        "ci_high": 0.888,
        "norm": "Linf",
        "eps": 8 / 255,
        "sparsity_reached": 0.9,
        "nonzero": 100,
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


# ---------------------------------------------------------------- Wilson's interval


@pytest.mark.parametrize("n", [1, 2, 3, 10, 37, 200, 1000, 10_000])
def test_interval_equals_that_of_scipy(n):
    for successes in sorted({0, 1, n // 3, n // 2, (9 * n) // 10, n - 1, n}):
        expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
        assert wilson_interval(successes, n) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("n", range(1, 60))
def test_interval_holds_the_share_and_stays_in_the_unit_interval(n):
    for successes in range(n + 1):
        low, high = wilson_interval(successes, n)
        assert 0 <= low <= successes / n <= high <= 1
        assert low < high
    assert wilson_interval(0, n)[0] == 0.0
    assert wilson_interval(n, n)[1] == 1.0


def test_interval_by_hand():
    # z = 2, 8 of 16: centre (1/2 + 2/16) / (5/4) = 1/2, spread 2 sqrt(1/64 + 1/256) / (5/4)
    low, high = wilson_interval(8, 16, z=2.0)
    assert low == pytest.approx(0.5 - 1.6 * 5**0.5 / 16)
    assert high == pytest.approx(0.5 + 1.6 * 5**0.5 / 16)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (1, 0), (-1, 5), (6, 5), (0, -1)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ValueError, match="expected 0 <= successes <= n"):
        wilson_interval(successes, n)


# ---------------------------------------------------------------- whole files


def test_file_appears_when_the_block_is_left_and_not_before(tmp_path):
    path = tmp_path / "new" / "result.json"
    with atomic(path) as temporary:
        temporary.write_text("done")
        assert not path.exists()
        assert temporary.parent == path.parent  # renaming across file systems is not atomic
    assert path.read_text() == "done"
    assert list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_failure_leaves_the_old_content_and_no_temporary_file(error, tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def write_half():
        with atomic(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_failure_of_a_new_file_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic(tmp_path / "result.json"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path):
    path = tmp_path / "result.json"
    with atomic(path) as one, atomic(path) as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")
    assert path.read_text() == "1"  # the outer block ends last
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match="cannot write results here"),
        atomic(tmp_path / "file" / "result.json"),
    ):
        pass


def test_number_that_is_not_finite_is_not_written(tmp_path):
    path = tmp_path / "result.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.write_json(path, {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- rows


def test_rows_come_back_equal(tmp_path, values):
    rows = [Row(**values), Row(**values | {"attack": "clean", "max_perturbation": 0.1 + 0.2})]
    layers = [{"layer": "0", "size": 10, "nonzero": 1, "positions": 4}]
    record = Record(rows, layers, [{"low": 0.1, "high": 0.2, "count": 3}], {"examined": 5.0}, "f")
    write_record(tmp_path / "r.json", record)
    assert read_record(tmp_path / "r.json") == record


def test_key_is_the_first_nine_fields():
    assert records.KEY == [
        "dataset",
        "arch",
        "method",
        "objective",
        "sparsity",
        "seed",
        "selection",
        "attack",
        "component",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", 1.5),
        ("accuracy", -0.1),
        ("accuracy", float("nan")),
        ("ci_high", 1.01),
        ("n_correct", -1),
        ("n_examples", 0),
        ("eps", 8),
        ("sparsity", 1.0),
        ("sparsity_reached", 1.01),
        ("nan_count", -1),
        ("prunable", -1),
        ("max_perturbation", -1e-9),
        ("seed", 0.5),
        ("accurracy", 0.5),
    ],
)
def test_impossible_value_is_refused(name, value, values):
    with pytest.raises(ValidationError, match=name):
        Row(**values | {name: value})


def test_row_cannot_be_changed(values):
    row = Row(**values)
    with pytest.raises(ValidationError, match="frozen"):
        row.accuracy = 1.0


DAMAGES = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "list": lambda text: "[]",
    "number": lambda text: "3",
    "no rows": lambda text: '{"layers": []}',
    "no layers": lambda text: '{"rows": []}',
    "rows of words": lambda text: '{"rows": ["x"], "layers": []}',
    "rows is null": lambda text: '{"rows": null, "layers": []}',
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_record_is_one_line_with_its_path(damage, tmp_path, values):
    path = tmp_path / "r.json"
    write_record(path, Record([Row(**values)], [], [], {}, "f"))
    path.write_text(DAMAGES[damage](path.read_text()))
    with pytest.raises(UsageError) as caught:
        read_record(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_record_that_is_not_text_is_one_line(tmp_path):
    path = tmp_path / "r.json"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UsageError, match="damaged, not valid JSON"):
        read_json(path)


def test_missing_record_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        read_json(tmp_path / "missing.json")


def test_wrong_field_is_named(tmp_path, values):
    path = tmp_path / "r.json"
    write_record(path, Record([Row(**values)], [], [], {}, "f"))
    content = json.loads(path.read_text())
    content["rows"][0]["accuracy"] = 75
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"accuracy = 75: .*less than or equal to 1"):
        read_record(path)


def test_checksum_is_of_the_content_alone(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"abc")
    two.write_bytes(b"abc")
    assert records.file_checksum(one) == records.file_checksum(two) == "ba7816bf8f01cfea"
    two.write_bytes(b"abd")
    assert records.file_checksum(one) != records.file_checksum(two)


def test_provenance_fills_its_columns(values):
    found = records.provenance()
    assert Row(**values | found).code_version.startswith("0.")
    assert "torch=" in found["libraries"]
    assert "pyautoattack=0.2.0" in found["libraries"]


# ---------------------------------------------------------------- the commit


def git(folder, *words):
    done = subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@y.z", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of a package of two folders; provenance is asked of them."""
    folders = [tmp_path / "robsparse", tmp_path / "baselines"]
    for folder in folders:
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "start")
    monkeypatch.setattr(records, "_code_folders", lambda: folders)
    records.provenance.cache_clear()
    yield tmp_path
    records.provenance.cache_clear()


def test_commit_of_the_code_is_recorded_and_is_clean(checkout):
    (checkout / "notes.txt").write_text("not code")
    (checkout / "results.py").write_text("not in a folder of the package")
    found = records.provenance()
    assert found["code_version"].endswith("+" + git(checkout, "rev-parse", "--short=12", "HEAD"))
    assert not found["code_dirty"]


@pytest.mark.parametrize(
    "name",
    ["robsparse/__init__.py", "baselines/mine.py", "robsparse/new.py", "baselines/ignored.py"],
)
def test_changed_code_and_files_that_git_does_not_know_are_dirty(name, checkout):
    (checkout / name).write_text("x = 1\n")
    assert records.provenance()["code_dirty"]


def test_commit_of_another_project_around_the_installed_package_is_not_ours(checkout):
    folder = checkout / ".venv" / "robsparse"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    assert records._git_state([folder]) == ("", False)
    assert records._git_state([checkout / "robsparse"])[0]


def test_repository_of_a_hook_that_runs_us_is_not_asked(checkout, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert records._git_state([checkout / "robsparse"])[0]


def test_code_of_every_package_counts(repository):
    found = {folder.relative_to(repository).as_posix() for folder in records._code_folders()}
    assert found == {"robsparse", "method", "baselines", "eval", "figures"}


# ---------------------------------------------------------------- rows and outcomes


WRONG = {
    "accuracy": {"accuracy": 0.99},
    "ci_low": {"ci_low": 0.1},
    "ci_high": {"ci_high": 1.0},
    "n_correct": {
        "n_correct": 2,
        "accuracy": 0.5,
        "ci_low": wilson_interval(2, 4)[0],
        "ci_high": wilson_interval(2, 4)[1],
    },
    "n_examples": {
        "n_examples": 3,
        "n_correct": 3,
        "accuracy": 1.0,
        "ci_low": wilson_interval(3, 3)[0],
        "ci_high": 1.0,
    },
}


@pytest.mark.parametrize("column", ["", *WRONG])
def test_row_that_its_images_contradict_names_the_column(column, values):
    low, high = wilson_interval(3, 4)
    right = {"accuracy": 0.75, "n_correct": 3, "n_examples": 4, "ci_low": low, "ci_high": high}
    right |= {"attack": "pgd", "component": "all"}
    row = Row(**values | right | WRONG.get(column, {}))
    flags = {"pgd.all": np.array([True, False, True, True]), "clean.all": np.ones(4, dtype=bool)}
    assert records.contradiction(row, flags).partition(" = ")[0] == column
    assert records.contradiction(row, {"clean.all": flags["clean.all"]}) != ""
