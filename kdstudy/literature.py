"""Tables of other publications beside our runs: a survey's, that of "A Gift from KD", and online methods."""

from pathlib import Path

import numpy as np
import pandas as pd

from kdstudy.companions import networks
from kdstudy.results import Ledger
from kdstudy.statistics import mean_interval, paired_difference
from kdstudy.tables import BASELINE_STAGE, write_table

PUBLISHED = Path(__file__).parent / "published"
GIFT_SETTING = "cifar100_gift"
SURVEY_TITLE = "Survey, table 5. Offline methods on CIFAR-10"
GIFT_TITLE = "A Gift from KD, table 1. Three ResNet-32 on CIFAR-100, one by one and together"
ONLINE_TITLE = "Online methods on CIFAR-100, as others quote or re-implement them"


def survey_table(results: pd.DataFrame) -> pd.DataFrame:
    """Offline rows of table 5 of Gou, Yu, Maybank, Tao 2021 (IJCV 129) beside our runs; accuracies in percent.

    Columns: source, teacher_arch, student_arch; published_student, published, published_gain (distilled - student);
    ours (mean over seeds), ci_low, ci_high (95 %), n; gain (paired, to our CE student), gain_low, gain_high; diverged.
    What was not run is NaN with n = 0. The survey collects each pair of numbers from the paper that it names.
    """
    published = pd.read_csv(PUBLISHED / "survey_table5.csv")
    rows = [(*_survey_published(row), *_survey_ours(results, row)) for row in published.itertuples()]
    names = ("source", "teacher_arch", "student_arch", "published_student", "published", "published_gain")
    measured = ("ours", "ci_low", "ci_high", "n", "gain", "gain_low", "gain_high", "diverged")
    return pd.DataFrame(rows, columns=[*names, *measured])


def _survey_published(row) -> tuple:
    gain = row.distilled - row.student
    return row.source, row.teacher_arch, row.student_arch, row.student, row.distilled, gain


def _survey_ours(results: pd.DataFrame, row) -> tuple:
    distilled = _finals(results, row.setting, row.stage, row.method)
    alone = _finals(results, row.setting, BASELINE_STAGE, "ce")
    gain, _ = paired_difference(distilled.test_accuracy, alone.test_accuracy)
    diverged = int((distilled.status == "diverged").sum())
    return (*mean_interval(distilled.test_accuracy), gain.mean, gain.low, gain.high, diverged)


def _finals(results: pd.DataFrame, setting: str, stage: str, method: str) -> pd.DataFrame:
    wanted = (results.setting == setting) & (results.stage == stage) & (results.method == method)
    final = results[wanted & (results.purpose == "final")].set_index("seed").sort_index()
    return final.astype({"test_accuracy": np.float64})


def gift_table(ledger: Ledger, results: pd.DataFrame) -> pd.DataFrame:
    """Table 1 of Yim et al. 2017 (CVPR) beside our runs: networks of three seeds and their ensemble, percent.

    Columns: source; published_average, published_ensemble; ours (mean over seeds), ci_low, ci_high (95 %), n;
    ensemble (mean of our networks' probabilities, NaN unless scored); diverged. What was not run is NaN with n = 0.
    """
    published = pd.read_csv(PUBLISHED / "gift_table1.csv")
    rows = [_gift_row(ledger, results, row) for row in published.itertuples()]
    names = ("source", "published_average", "published_ensemble")
    return pd.DataFrame(rows, columns=[*names, "ours", "ci_low", "ci_high", "n", "ensemble", "diverged"])


def _gift_row(ledger: Ledger, results: pd.DataFrame, row) -> tuple:
    final = _finals(results, GIFT_SETTING, row.stage, row.method)
    together = ledger.store.ensemble(ledger.planner.setting(GIFT_SETTING).profile, row.stage, GIFT_SETTING, row.method)
    current = together is not None and together["runs"] == list(final.run)
    score = together["test_accuracy"] if current else np.nan
    diverged = int((final.status == "diverged").sum())
    return (row.source, row.average, row.ensemble, *mean_interval(final.test_accuracy), score, diverged)


def online_table(results: pd.DataFrame) -> pd.DataFrame:
    """Networks that were trained at the same time, from two publications, beside ours; accuracies in percent.

    Columns: source, quoted_from, networks; published and its deviation over runs (NaN where none is printed); ours
    (mean over seeds), ci_low, ci_high (95 %), n; difference (ours - published); diverged. A row is about the deployed
    network, or about one that learned beside it. What was not run is NaN with n = 0.
    """
    published = pd.read_csv(PUBLISHED / "online.csv")
    rows = [_online_row(results, row) for row in published.itertuples()]
    names = ("source", "quoted_from", "networks", "published", "deviation")
    return pd.DataFrame(rows, columns=[*names, "ours", "ci_low", "ci_high", "n", "difference", "diverged"])


def online_places() -> list[str]:
    """The settings that published numbers of online methods are about."""
    return list(pd.read_csv(PUBLISHED / "online.csv").setting.unique())


def _online_row(results: pd.DataFrame, row) -> tuple:
    wanted = (results.setting == row.setting) & (results.stage == row.stage) & (results.method == row.method)
    final = results[wanted & (results.purpose == "final")]
    found = networks(final)
    ours = mean_interval(found.test_accuracy[found.network == row.network])
    diverged = int((final.status == "diverged").sum())
    printed = row.source, row.quoted_from, row.networks, row.published, row.deviation
    return (*printed, *ours, ours.mean - row.published, diverged)


def write_tables(ledger: Ledger, results: pd.DataFrame, profile: str, folder: Path) -> list[str]:
    """Write those of the tables whose settings belong to the profile; returns their names, without suffix."""
    settings = ledger.planner.params.settings_of(profile)
    written = []
    if set(pd.read_csv(PUBLISHED / "survey_table5.csv").setting) & set(settings):
        write_table(survey_table(results), folder / "literature_survey", SURVEY_TITLE)
        written.append("survey")
    if GIFT_SETTING in settings:
        write_table(gift_table(ledger, results), folder / "literature_gift", GIFT_TITLE)
        written.append("gift")
    if set(online_places()) & set(settings):
        write_table(online_table(results), folder / "literature_online", ONLINE_TITLE)
        written.append("online")
    return written
