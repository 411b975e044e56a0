"""Which tables a profile has, and their files; rows on fewer images beside the same rows on all of them."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from kdstudy.results import Ledger
from kdstudy.study import Planner, RunSpec
from kdstudy.tables import (
    comparison_table,
    published_results,
    share_table,
    thesis_table,
    thesis_title,
    tuning_table,
    write_table,
)

FEW_DATA = "few_data"  # the stage whose rows are trained on a share of the images


def results_text(results: pd.DataFrame) -> str:
    """results.csv, to the byte."""
    return results.to_csv(index=False, lineterminator="\n")


def write_thesis_tables(results: pd.DataFrame, planner: Planner, profile: str, folder: Path) -> dict[int, pd.DataFrame]:
    """Write and return, by number, the thesis's tables whose setting belongs to the profile: thesis_table_<n>.*."""
    published, settings = published_results(), planner.params.settings_of(profile)
    numbers = published.table[published.setting.isin(settings)].unique()
    tables = {int(number): thesis_table(number, results) for number in numbers}
    for number, frame in tables.items():
        write_table(frame, folder / f"thesis_table_{number}", thesis_title(number))
    return tables


def write_comparisons(results: pd.DataFrame, folder: Path) -> dict[str, pd.DataFrame]:
    """Write and return, by setting, the comparisons of the settings that have students: comparison_<setting>.*."""
    students = results[results.stage != "teacher"]
    tables = {setting: comparison_table(results, setting) for setting in students.setting.unique()}
    for setting, frame in tables.items():
        write_table(frame, folder / f"comparison_{setting}", f"Students on {setting}")
    return tables


def write_shares(ledger: Ledger, profile: str, folder: Path) -> list[str]:
    """Write the tables of the settings that have runs on fewer images: shares_<setting>.*; returns the settings."""
    written = []
    for setting in ledger.planner.params.settings_of(profile):
        specs = ledger.runs(setting, FEW_DATA) + on_all_images(ledger, setting, FEW_DATA)
        results = by_share(ledger.frame(specs), specs)
        if (results.share < 100).any():
            write_table(share_table(results, setting), folder / f"shares_{setting}", f"Fewer images on {setting}")
            written.append(setting)
    return written


def write_tunings(results: pd.DataFrame, folder: Path) -> dict[str, pd.DataFrame]:
    """Write and return, by setting, the grids of the settings that have run cells of one: tuning_<setting>.*."""
    cells = results[(results.stage != "teacher") & (results.purpose == "tuning")]
    tables = {setting: tuning_table(results, setting) for setting in cells.setting.unique()}
    for setting, frame in tables.items():
        write_table(frame, folder / f"tuning_{setting}", f"Grid cells on {setting}")
    return tables


def on_all_images(ledger: Ledger, setting: str, stage: str) -> list[RunSpec]:
    """The final runs, in other stages, of the rows that this stage has on fewer images under the name rowpercent."""
    planner = ledger.planner
    tried = {_without_share(spec.row, spec.images) for spec in first_specs(planner, setting, stage)}
    others = [other for other in planner.params.methods if other != stage]
    rows = [(other, row) for other in others for row in planner.rows(setting, other) if row in tried]
    return [spec for other, row in rows for spec in ledger.final(setting, other, row)]


def by_share(frame: pd.DataFrame, specs: Iterable[RunSpec]) -> pd.DataFrame:
    """Runs or epochs of these specs with the `share` of the training images (percent) out of the method's name."""
    if frame.empty:
        return frame.assign(share=[])
    images = frame.run.map({spec.id: spec.images for spec in specs})
    methods = [_without_share(*pair) for pair in zip(frame.method, images, strict=True)]
    return frame.assign(method=methods, share=[percent(share) for share in images])


def _without_share(row: str, images: float) -> str:
    return row.removesuffix(f"_{percent(images):g}")


def percent(share: float) -> float:
    """A share as it is called in names and tables."""
    return round(100 * share, 6)


def first_specs(planner: Planner, setting: str, stage: str) -> list[RunSpec]:
    """One run of each row, as it is before anything is chosen."""
    return [planner.final(setting, stage, row, {})[0] for row in planner.rows(setting, stage)]
