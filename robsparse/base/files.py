"""Files: one place that writes each kind atomically, one that reads it; locks and checksums.

Each error names the file. This module does not import torch; NumPy and pandas are imported when
they are needed, because planning the workflow starts sooner without them.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import filelock
from safetensors import safe_open

from robsparse.base.errors import RunError, UsageError, one_line

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa

T = TypeVar("T")
_TRIED = 1 << 16  # bytes that must be free before a long run
CHECKSUM = "checksum"  # the key of a record's own checksum
# The machine fails, and not the input: a full disk, a limit of file size or quota, a broken disk.
_FAILURES = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)


# ---------------------------------------------------------------- writing


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds.

    A reader sees the old file or the complete new file. The block only writes: an OSError inside
    it is an error of writing `path`.

    Raises:
        UsageError: if the folder cannot be written to, or `path` is a folder.
        RunError: if the disk is full or fails.
    """
    with _writing(path.parent, "cannot write results here"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
    temporary = Path(name)
    try:
        with _writing(path, "cannot write this file"):
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path, what: str) -> Iterator[None]:
    """Turn an OSError into a line that names the file or folder."""
    try:
        yield
    except OSError as error:
        line = f"{path}: {what} ({error.strerror or one_line(error)})"
        if error.errno in _FAILURES:
            raise RunError(
                f"{line}; no incomplete file is left: free some space, then run the same command "
                "again"
            ) from error
        raise UsageError(line) from error


def check_writable(folder: Path) -> None:
    """Write some bytes to a folder and remove them. Call this before a long run.

    Raises:
        UsageError: if the folder cannot be written to.
        RunError: if the disk is full or fails.
    """
    with _writing(folder, "cannot write results here"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIED))
            file.flush()


def is_full(folder: Path) -> bool:
    """Return whether the disk of a folder has no space left, or less than a small file needs."""
    with suppress(OSError):
        return shutil.disk_usage(folder).free < _TRIED
    return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder inside the block.

    Raises:
        UsageError: if another process is running the same job, or the folder is not writable.
        RunError: if the disk is full or fails.
    """
    lock = filelock.FileLock(folder / "lock")
    with _writing(folder, "cannot write results here"):
        folder.mkdir(parents=True, exist_ok=True)
    with _writing(folder / "lock", "cannot write this file"):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UsageError(f"{folder}: another process is running the same job") from None
    try:
        yield
    finally:
        lock.release()


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically. Raises as `atomic`."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) atomically. Raises as `atomic`."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically. Raises as `atomic`."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file with a checksum of its content. `read_record` compares it.

    Raises as `atomic`.
    """
    write_json(path, content | {CHECKSUM: _digest(content)})


def write_tensors(
    path: Path, arrays: "dict[str, np.ndarray]", metadata: dict[str, str] | None = None
) -> None:
    """Write NumPy arrays as safetensors, atomically. Raises as `atomic`."""
    import safetensors.numpy  # noqa: PLC0415

    write_bytes(path, safetensors.numpy.save(arrays, metadata))


def write_arrays(path: Path, arrays: dict[str, Any], *, compressed: bool = True) -> None:
    """Write arrays as npz, atomically. Raises as `atomic`."""
    import numpy as np  # noqa: PLC0415

    content = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(content, **arrays)
    write_bytes(path, content.getbuffer())


def write_table(path: Path, table: "pd.DataFrame", **options: Any) -> None:
    """Write a table as CSV or parquet (the suffix decides), atomically. Raises as `atomic`.

    options: those of DataFrame.to_csv or to_parquet.
    """
    if path.suffix == ".parquet":
        write_bytes(path, table.to_parquet(None, **options))
    else:
        with atomic(path) as temporary:
            table.to_csv(temporary, **options)


def write_parquet(path: Path, table: "pa.Table", **options: Any) -> None:
    """Write an Arrow table as parquet, atomically, without pandas. Raises as `atomic`.

    options: those of pyarrow.parquet.write_table.
    """
    import pyarrow.parquet as pq  # noqa: PLC0415

    content = io.BytesIO()
    pq.write_table(table, content, **options)
    write_bytes(path, content.getbuffer())


# ---------------------------------------------------------------- reading


@contextmanager
def _reading(path: Path, kind: str, remedy: str) -> Iterator[None]:
    """Turn each error into a line that names the file. A library raises many kinds of errors."""
    then = f"; {remedy}" if remedy else ""
    try:
        yield
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"{path}: cannot read (no such file){then}") from None
    except OSError as error:
        if error.errno is None:  # from a library: the content is wrong
            raise UsageError(f"{path}: damaged, not {kind} ({one_line(error)}){then}") from None
        raise UsageError(f"{path}: cannot read ({error.strerror}){then}") from None
    except Exception as error:
        raise UsageError(f"{path}: damaged, not {kind} ({one_line(error)}){then}") from None


def read_text(path: Path, remedy: str = "") -> str:
    """Read a text file (UTF-8).

    Args:
        path: the file.
        remedy: what to do if it is damaged; the end of the message. So in all these functions.

    Raises:
        UsageError: if the file is missing or damaged.
    """
    with _reading(path, "text", remedy):
        return path.read_text(encoding="utf-8")


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UsageError: if the file is missing or damaged.
    """
    with _reading(path, "valid JSON", remedy):
        content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        then = f"; {remedy}" if remedy else ""
        raise UsageError(f"{path}: damaged, expected an object with keys{then}")
    return content


def read_record(path: Path, parse: Callable[[dict[str, Any]], T], remedy: str = "") -> T:
    """Read a file that `write_record` wrote. Older files have no checksum.

    Args:
        path: the file.
        parse: makes the result from the content, or raises UsageError. It is called before the
            checksum is compared, so that a message can name a wrong value.
        remedy: what to do if the file is damaged.

    Raises:
        UsageError: if the file is missing, damaged or changed.
    """
    content = read_json(path, remedy)
    expected = content.pop(CHECKSUM, None)
    result = parse(content)
    if expected is not None and expected != _digest(content):
        then = f"; {remedy}" if remedy else ""
        raise UsageError(f"{path}: damaged or changed, its checksum does not fit its content{then}")
    return result


def read_tensors(
    path: Path, framework: Literal["np", "pt"] = "np", remedy: str = ""
) -> dict[str, Any]:
    """Return the tensors of a safetensors file by name.

    Args:
        path: the file.
        framework: "np" for NumPy arrays, "pt" for torch tensors.
        remedy: what to do if it is damaged.

    Raises:
        UsageError: if the file is missing or damaged, or if an older version of robsparse wrote it;
            it packed sparse tensors.
    """
    with (
        _reading(path, "a readable file of weights", remedy),
        safe_open(path, framework=framework) as stored,
    ):
        if "robsparse.packed" in (stored.metadata() or {}):
            raise UsageError(
                f"{path}: packed weights of an older version, expected plain safetensors; "
                "train this network again"
            )
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def read_arrays(
    path: Path, remedy: str = "", left_out: tuple[str, ...] = ()
) -> "dict[str, np.ndarray]":
    """Return the arrays of an npz file by name. Nothing is unpickled.

    left_out: ends of the names of arrays that are not read.

    Raises:
        UsageError: if the file is missing or damaged.
    """
    import numpy as np  # noqa: PLC0415

    with (
        _reading(path, "a readable npz file", remedy),
        np.load(path, allow_pickle=False) as stored,
    ):
        return {name: stored[name] for name in stored.files if not name.endswith(left_out)}


def read_table(path: Path, remedy: str = "", **options: Any) -> "pd.DataFrame":
    """Read a table from CSV or parquet; the suffix decides.

    options: those of pandas.read_csv or read_parquet.

    Raises:
        UsageError: if the file is missing or damaged.
    """
    import pandas as pd  # noqa: PLC0415

    read = pd.read_parquet if path.suffix == ".parquet" else pd.read_csv
    with _reading(path, "a readable table", remedy), path.open("rb") as handle:
        return read(handle, **options)


def count_rows(path: Path, remedy: str = "") -> int:
    """Return the number of rows of a parquet file without reading them.

    Raises:
        UsageError: if the file is missing or damaged.
    """
    import pyarrow.parquet as pq  # noqa: PLC0415

    with _reading(path, "a readable table", remedy):
        return int(pq.read_metadata(path).num_rows)


# ---------------------------------------------------------------- checksums


def file_checksum(path: Path) -> str:
    """Return the first 16 hex digits of the SHA-256 of a file.

    Raises:
        UsageError: if the file cannot be read.
    """
    with _reading(path, "a file", ""), path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


def _digest(content: dict[str, Any]) -> str:
    """Return the first 16 hex digits of the SHA-256 of a JSON value, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
