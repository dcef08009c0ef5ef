"""Records of training: read them, and refuse those of another version."""

import pytest

from robsparse.base.errors import UsageError
from robsparse.base.files import file_checksum, write_json
from robsparse.records.training_record import check_weights, read_training

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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cost": {"peak_active_weights": 5, "seconds": "many"}}, "cost.seconds = 'many'"),
        ({"cost": "many"}, "cost = 'many'"),
        ({"curve": [POINT | {"loss": "many"}]}, "curve.0.loss = 'many'"),
        ({"curve": [POINT | {"epoch": "many"}]}, "curve.0.epoch = 'many'"),
        ({"curve": "many"}, "curve = 'many'"),
        ({"weights": {"last": 3}}, "weights.last = 3"),
        ({"selected": {"last": 3}}, "selected.last = 3"),
        ({"failure": 3}, "failure = 3"),
    ],
)
def test_word_in_the_place_of_a_number_is_named(change, named, tmp_path):
    path = tmp_path / "training.json"
    write_json(path, {"cost": None, "curve": []} | change)
    with pytest.raises(UsageError) as caught:
        read_training(path)
    assert str(caught.value).startswith(f"{path}: {named}: ")
    assert str(caught.value).endswith("; train this network again")
    assert "\n" not in str(caught.value)


def test_weights_with_a_changed_bit_are_not_those_of_the_training(tmp_path):
    weights, training = tmp_path / "last.safetensors", tmp_path / "training.json"
    weights.write_bytes(b"abc")
    check_weights(training, "last", weights)  # no record, e.g. of weights from elsewhere
    saved = {"last": file_checksum(weights)}
    write_json(training, {"cost": None, "curve": [], "weights": saved})
    check_weights(training, "last", weights)
    weights.write_bytes(b"abb")
    with pytest.raises(UsageError, match=r"last\.safetensors: damaged or changed"):
        check_weights(training, "last", weights)
