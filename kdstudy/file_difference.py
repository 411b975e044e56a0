"""Where a file differs from what it should hold, in one line."""

import csv
from itertools import zip_longest
from pathlib import Path


def difference(path: Path, made: bytes | None) -> str:
    """How a file differs from what the records give; "" if it does not."""
    if made is None:
        return "the records give no such table"
    if not path.exists():
        return "it is missing"
    try:
        found = path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if found == made:
        return ""
    texts = [content.decode(errors="replace") for content in (found, made)]
    if path.suffix == ".csv" and (difference := _first_cell(*texts)):
        return difference
    return _first_line(*texts)


def _first_cell(found: str, made: str) -> str:
    """The first cell that differs between two tables as CSV; "" if it is not the cells."""
    try:
        tables = [list(csv.reader(text.splitlines())) for text in (found, made)]
    except csv.Error:
        return ""
    heads = tables[1][0]
    sizes = f"it has {len(tables[0]) - 1} rows, the records give {len(tables[1]) - 1}; " * (
        len(tables[0]) != len(tables[1])
    )
    for number, (row, wanted) in enumerate(zip_longest(*tables, fillvalue=[])):
        for column, (cell, right) in enumerate(zip_longest(row, wanted)):
            if cell != right:
                head = heads[column] if column < len(heads) else f"column {column + 1}"
                return f"{sizes}first in row {number}, {head}: it has {_shown(cell)}, the records give {_shown(right)}"
    return ""


def _first_line(found: str, made: str) -> str:
    pairs = enumerate(zip_longest(found.split("\n"), made.split("\n")), 1)
    number, (line, right) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
    return f"first in line {number}: it has {_shown(line)}, the records give {_shown(right)}"


def _shown(text: str | None) -> str:
    return "nothing" if text is None else f"{text!r:.100}"
