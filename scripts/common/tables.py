"""CSV files that spreadsheets open and do not execute."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_whole

_DECIMALS = 6


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table, whole or not at all.

    Args:
        path: of the file.
        columns: in order; a row that lacks one has an empty cell.
        rows: column -> value; see `csv_cell`.
    """

    def write(unfinished: Path) -> None:
        # Text that UTF-8 cannot encode must not lose the other rows.
        with unfinished.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(map(csv_cell, columns))
            for row in rows:
                writer.writerow([csv_cell(row.get(column)) for column in columns])

    write_whole(path, write)


def csv_cell(value: Any) -> Any:
    """A value as CSV takes it.

    A spreadsheet takes text that begins with `=`, `+`, `-`, `@`, a tab or a carriage return for a
    formula, and anyone may have chosen the name of a file or class: such text is prefixed with an
    apostrophe, as OWASP recommends. Numbers have six decimals at most.
    """
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return round(value, _DECIMALS) if isinstance(value, float) else value
