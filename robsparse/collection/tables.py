"""Collected tables while they grow: a large study has millions of rows."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

_MOST_ROWS = 20_000  # as mappings; more rows become a data frame, which takes much less memory
_MOST_WAITING = 100_000  # rows of a Parquet file that are not written yet


class Rows:
    """Rows of a table, in data frames of many rows."""

    def __init__(self) -> None:
        self._frames: list[pd.DataFrame] = []
        self._waiting: list[dict[str, Any]] = []

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows: mappings from columns to values."""
        self._waiting += rows
        if len(self._waiting) >= _MOST_ROWS:
            self._pack()

    def _pack(self) -> None:
        self._frames.append(pd.DataFrame(self._waiting))
        self._waiting = []

    def table(self, columns: Iterable[str] | None = None) -> pd.DataFrame:
        """All rows, the same as `pandas.DataFrame(rows)`.

        columns: the columns of a table without rows.
        """
        if self._waiting or not self._frames:
            self._pack()
        if len(self._frames) == 1:
            [table] = self._frames
            return table if len(table) else pd.DataFrame(columns=columns and list(columns))
        table = pd.concat(self._frames, ignore_index=True)
        for name in [n for n in table if table[n].dtype == "object"]:  # e.g. None in one part
            table[name] = pd.Series(table[name].tolist(), index=table.index)
        return table


class Streamed:
    """A Parquet file that is written while its rows are read, so that memory does not hold them.

    columns: the columns of a file without rows.
    """

    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        self._path, self._columns = path, list(columns)
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pd.DataFrame] = []

    def add(self, rows: pd.DataFrame) -> None:
        """Add rows; all of them have the same columns."""
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= _MOST_WAITING:
            self._write()

    def _write(self) -> None:
        rows = pd.concat(self._waiting or [pd.DataFrame(columns=self._columns)])
        table = pa.Table.from_pandas(rows, preserve_index=False)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table.cast(self._writer.schema))
        self._waiting = []

    def close(self) -> None:
        """Write the remaining rows and the end of the file."""
        if self._waiting or self._writer is None:
            self._write()
        assert self._writer is not None
        self._writer.close()
