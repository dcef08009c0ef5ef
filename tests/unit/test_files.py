"""Files that are whole or not there, JSON and checksums."""

import stat

import pytest

from robsparse.base.errors import UsageError
from robsparse.base.files import atomic, file_checksum, read_json, write_json


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


def test_folder_that_cannot_be_created_gives_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match="cannot write results here"),
        atomic(tmp_path / "file" / "result.json"),
    ):
        pass


def test_number_that_is_not_finite_is_not_written(tmp_path):
    path = tmp_path / "result.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_json_that_is_not_text_is_one_line(tmp_path):
    path = tmp_path / "r.json"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UsageError, match="damaged, not valid JSON"):
        read_json(path)


def test_missing_json_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        read_json(tmp_path / "missing.json")


def test_checksum_is_of_the_content_alone(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"abc")
    two.write_bytes(b"abc")
    assert file_checksum(one) == file_checksum(two) == "ba7816bf8f01cfea"
    two.write_bytes(b"abd")
    assert file_checksum(one) != file_checksum(two)
