"""Records of training: read them, and refuse those of another version."""

import pytest

from robsparse.base.errors import UsageError
from robsparse.base.files import write_json
from robsparse.records.training_record import read_training

POINT = {"epoch": 1, "active_weights": 5}


@pytest.mark.parametrize(
    "content",
    [
        {"cost": {"epochs": 1, "peak_active_weights": 5}, "curve": [POINT]},
        {"cost": None, "curve": []},  # an external model
    ],
)
def test_record_is_read(content, tmp_path):
    write_json(tmp_path / "training.json", content)
    assert read_training(tmp_path / "training.json") == content


@pytest.mark.parametrize(
    "content",
    [
        {"cost": {"epochs": 1, "peak_live_weights": 5}, "curve": []},
        {"cost": None, "curve": [POINT, {"epoch": 2, "live_weights": 5}]},
    ],
)
def test_record_of_another_version_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "training.json"
    write_json(path, content)
    with pytest.raises(UsageError) as caught:
        read_training(path)
    assert str(caught.value) == (
        f"{path}: no column 'active_weights': another version of robsparse trained this network; "
        "train it again"
    )
