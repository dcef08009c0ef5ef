"""Records of evaluations: write, read, refuse."""

import json

import pytest

from robsparse.base.errors import UsageError
from robsparse.records.evaluation_record import Record, read_record, write_record
from robsparse.records.rows import Row


def test_rows_are_equal_after_reading(tmp_path, row_values):
    rows = [
        Row(**row_values),
        Row(**row_values | {"attack": "clean", "max_perturbation": 0.1 + 0.2}),
    ]
    layers = [{"layer": "0", "size": 10, "nonzero": 1, "positions": 4}]
    record = Record(rows, layers, [{"low": 0.1, "high": 0.2, "count": 3}], {"examined": 5.0}, "f")
    write_record(tmp_path / "r.json", record)
    assert read_record(tmp_path / "r.json") == record


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
def test_error_about_a_damaged_record_is_one_line_with_its_path(damage, tmp_path, row_values):
    path = tmp_path / "r.json"
    write_record(path, Record([Row(**row_values)], [], [], {}, "f"))
    path.write_text(DAMAGES[damage](path.read_text()))
    with pytest.raises(UsageError) as caught:
        read_record(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_record_of_another_version_is_refused_in_one_line(tmp_path, row_values):
    path = tmp_path / "r.json"
    write_record(path, Record([Row(**row_values)], [], [], {}, "f"))
    content = json.loads(path.read_text())
    content["rows"][0]["suspicious"] = content["rows"][0].pop("potentially_unreliable")
    content["doubts"] = content.pop("sanity_checks")
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError) as caught:
        read_record(path)
    assert str(caught.value).startswith(f"{path}: 'rows.0.suspicious': ")
    assert str(caught.value).endswith("evaluate this network again")
    assert "\n" not in str(caught.value)


def test_message_names_the_wrong_field(tmp_path, row_values):
    path = tmp_path / "r.json"
    write_record(path, Record([Row(**row_values)], [], [], {}, "f"))
    content = json.loads(path.read_text())
    content["rows"][0]["accuracy"] = 75
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"accuracy = 75: .*less than or equal to 1"):
        read_record(path)
