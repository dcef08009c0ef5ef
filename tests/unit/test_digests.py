"""The digests that show that a change of the code moved no number."""

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file


@pytest.fixture(scope="module")
def tool(load_benchmark):
    return load_benchmark("digests")


@pytest.fixture
def study(tmp_path):
    folder = tmp_path / "study"
    (folder / "models").mkdir(parents=True)
    save_file({"w": np.array([0.0, 1.0], np.float32)}, folder / "models" / "last.safetensors")
    np.savez(folder / "last.flags.npz", labels=np.arange(3), clean=np.array([True, False, True]))
    table = pd.DataFrame({"accuracy": [0.5, 0.25], "train_seconds": [1.0, 2.0]})
    table.to_csv(folder / "results.csv", index=False)
    table.to_parquet(folder / "results.parquet")
    return folder


def compared(tool, study, change):
    before = tool.digests(study)
    change(study)
    return tool.differences(before, tool.digests(study))


def test_same_content_has_the_same_digests(tool, study):
    def sign_of_zero(folder):
        path = folder / "models" / "last.safetensors"
        save_file({"w": np.array([-0.0, 1.0], np.float32)}, path)

    assert compared(tool, study, sign_of_zero) == []


CHANGES = {
    "a weight": (
        lambda folder: save_file(
            {"w": np.array([0.0, 2.0], np.float32)}, folder / "models" / "last.safetensors"
        ),
        ["differs: models/last.safetensors"],
    ),
    "an outcome": (
        lambda folder: np.savez(
            folder / "last.flags.npz", labels=np.arange(3), clean=np.array([True, True, True])
        ),
        ["differs: last.flags.npz clean"],
    ),
    "a cell of a table": (
        lambda folder: pd.DataFrame({"accuracy": [0.5, 0.26], "train_seconds": [1.0, 2.0]}).to_csv(
            folder / "results.csv", index=False
        ),
        ["differs: results.csv accuracy"],
    ),
    "time": (
        lambda folder: pd.DataFrame({"accuracy": [0.5, 0.25], "train_seconds": [9.0, 2.0]}).to_csv(
            folder / "results.csv", index=False
        ),
        [],
    ),
    "a name of a column": (
        lambda folder: (
            pd.read_csv(folder / "results.csv")
            .rename(columns={"accuracy": "robust"})
            .to_csv(folder / "results.csv", index=False)
        ),
        ["gone: results.csv accuracy (same content: results.csv robust)"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_is_named(change, tool, study):
    edit, expected = CHANGES[change]
    assert compared(tool, study, edit) == expected


def test_command_writes_compares_and_says_where_nothing_is(tool, study, tmp_path, capsys):
    before = tmp_path / "before.json"
    assert tool.main([str(study), str(before)]) == 0
    assert tool.main([str(study), "--against", str(before)]) == 0
    (study / "last.flags.npz").unlink()
    assert tool.main([str(study), "--against", str(before)]) == 1
    assert "gone: last.flags.npz labels" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path / "empty")])
