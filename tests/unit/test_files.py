"""Files that are whole or not there, errors that name their file, JSON and checksums."""

import errno
import random
import resource
import stat

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from robsparse.base import files
from robsparse.base.errors import RunError, UsageError
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


ARRAY = np.arange(5000.0)
# Kind of file -> (its name, how it is written, how it is read).
KINDS = {
    "text": ("a.txt", lambda path: files.write_text(path, "é" * 5000), files.read_text),
    "JSON": ("a.json", lambda path: write_json(path, {"a": [0] * 5000}), read_json),
    "record": (
        "a.json",
        lambda path: files.write_record(path, {"a": [0] * 5000}),
        lambda path, remedy: files.read_record(path, dict, remedy),
    ),
    "weights": (
        "a.safetensors",
        lambda path: files.write_tensors(path, {"w": ARRAY}),
        lambda path, remedy: files.read_tensors(path, remedy=remedy),
    ),
    "arrays": (
        "a.npz",
        lambda path: files.write_arrays(path, {"w": ARRAY}, compressed=False),
        files.read_arrays,
    ),
    "CSV": (
        "a.csv",
        lambda path: files.write_table(path, pd.DataFrame({"w": ARRAY}), index=False),
        files.read_table,
    ),
    "parquet": (
        "a.parquet",
        lambda path: files.write_table(path, pd.DataFrame({"w": ARRAY})),
        files.read_table,
    ),
    "Arrow": (
        "a.parquet",
        lambda path: files.write_parquet(path, pa.table({"w": ARRAY})),
        files.read_table,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_file_that_is_too_large_is_an_error_with_its_name_and_leaves_nothing(kind, tmp_path):
    name, write, _ = KINDS[kind]
    path = tmp_path / name
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RunError) as caught:
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value) == (
        f"{path}: cannot write this file (File too large); no incomplete file is left: free some "
        "space, then run the same command again"
    )
    assert not list(tmp_path.iterdir())
    write(path)  # now there is space


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_full_or_broken_disk_is_a_failure_of_the_machine(number, tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(RunError, match=r"a\.txt: cannot write this file"), atomic(path):
        raise OSError(number, "no")
    assert not list(tmp_path.iterdir())


def test_full_disk_is_found_before_a_long_run(tmp_path):
    files.check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write results here \(File too large\)"):
            files.check_writable(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_folder_in_the_place_of_a_file_is_not_replaced(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UsageError, match=r"a\.txt: cannot write this file \(Is a directory\)"):
        files.write_text(tmp_path / "a.txt", "x")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


def test_lock_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(UsageError, match="lock: cannot write"), files.locked(tmp_path):
        pass


def damaged(content, draw):
    yield b""
    yield content[: len(content) // 2]
    for _ in range(20):
        yield draw.randbytes(draw.randrange(1, 500))
        changed = bytearray(content)
        for _ in range(50):  # near its ends, where headers are
            place = draw.randrange(300)
            changed[draw.choice([place, -1 - place])] = draw.randrange(256)
        yield bytes(changed)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("text", "CSV")])
def test_damaged_file_is_one_line_with_its_name_and_what_to_do(kind, tmp_path):
    name, write, read = KINDS[kind]
    path = tmp_path / name
    write(path)
    for content in damaged(path.read_bytes(), random.Random(0)):
        path.write_bytes(content)
        with pytest.raises(UsageError) as caught:
            read(path, "make it again")
        assert str(caught.value).startswith(f"{path}: ")
        assert str(caught.value).endswith("; make it again")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_file_that_is_missing_or_a_folder_is_one_line(kind, tmp_path):
    name, _, read = KINDS[kind]
    with pytest.raises(UsageError, match=r"cannot read \(no such file\); make it again"):
        read(tmp_path / name, "make it again")
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError) as caught:
        read(tmp_path / name, "make it again")
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(kind, tmp_path):
    name, write, read = KINDS[kind]
    write(tmp_path / name)
    found = read(tmp_path / name, "")
    if kind in ("text", "JSON", "record"):
        assert found == ("é" * 5000 if kind == "text" else {"a": [0] * 5000})
    else:
        np.testing.assert_array_equal(found["w"], ARRAY)


def test_record_with_one_changed_digit_is_refused_and_one_without_checksum_is_read(tmp_path):
    path = tmp_path / "a.json"
    files.write_record(path, {"seconds": 12.5, "b": [1, None]})
    path.write_text(path.read_text().replace("12.5", "13.5"))
    with pytest.raises(UsageError, match="its checksum does not fit its content; again"):
        files.read_record(path, dict, "again")
    write_json(path, {"seconds": 13.5, "b": [1, None]})
    assert files.read_record(path, dict) == {"seconds": 13.5, "b": [1, None]}


def test_checksum_is_of_the_content_alone(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"abc")
    two.write_bytes(b"abc")
    assert file_checksum(one) == file_checksum(two) == "ba7816bf8f01cfea"
    two.write_bytes(b"abd")
    assert file_checksum(one) != file_checksum(two)
