"""Tables as the benchmark writes them, for the tests of the page on speed."""

from pathlib import Path

import pandas as pd

from kdstudy.bench import COLUMNS, PAIRS

CPU, GPU = "AMD EPYC, 2 threads", "NVIDIA H100"
USUAL = {
    **{"student": "wrn_16_1", "variant": "one run", "precision": "bf16", "students": 1, "batch": 128, "threads": 2},
    **{"workers": None, "way": "in_turn", "graph": False, "images_per_second": 100.0, "ratio": 1.0},
    **{"roofline_share": 0.5, "outside_kernels": 0.1, "peak_megabytes": 64.0, "startup_seconds": 2.0, "device": CPU},
    **{"clock": "2000 MHz", "copy_gigabytes_per_second": 20.0, "product_teraflops": 0.2},
    **{"torch": "2.15.0", "python": "3.11.7"},
}


def row(**values) -> dict:
    """A row of the benchmark's table: one run on a CPU, but for these values."""
    found = USUAL | values
    return {"teacher": PAIRS[found["student"]]} | found


def naive(**values) -> dict:
    """A row of the naive loop."""
    return row(variant="naive", precision="fp32", workers=8, **values)


def cohort(students: int, **values) -> dict:
    """A row of a cohort of so many."""
    return row(**({"variant": f"cohort of {students}", "students": students} | values))


def table(*rows: dict, file: str = "device") -> pd.DataFrame:
    """These rows as `speed.read_bench` reads them, or `speed.read_growth` if they have a series."""
    heads = [*(["series"] if rows and "series" in rows[0] else []), *COLUMNS]
    return pd.DataFrame(rows, columns=heads).assign(file=file)


def write(folder: Path, name: str, *rows: dict) -> None:
    """These rows in a file, as the command writes them."""
    table(*rows).drop(columns="file").to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")


def cells(text: str) -> list[dict[str, str]]:
    """The rows of the only Markdown table of a text, by its heads."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
