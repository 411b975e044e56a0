"""Rows of results.csv, tiny data and printed tables for the tests of what notebooks say of several networks."""

import json

import pandas as pd
from toy import pictures

from kdstudy.image_set import ImageSet


def row(method: str, seed: int, accuracy: float, further: dict | None = None, **more) -> dict:
    """One run's row, as far as scores and costs go."""
    usual = {"purpose": "final", "status": "finished", "deployed": "first peer", "epochs": 5}
    spent = {"network_epochs": 5, "all_network_epochs": 5}
    scored = {"method": method, "seed": seed, "test_accuracy": accuracy, "further": json.dumps(further or {})}
    return usual | spent | scored | more


def results(*rows: dict) -> pd.DataFrame:
    return pd.DataFrame(rows)


def images() -> ImageSet:
    """Grey images of 8 x 8 pixels, three classes."""
    x, y = pictures(size=(8, 8), channels=1)
    return ImageSet("toy", x, y, x, y, ("0", "1", "2"))


def line(text: str, row: str) -> list[str]:
    """The cells of a Markdown table's line about a row."""
    (found,) = [each for each in text.splitlines() if f"`{row}`" in each]
    return [cell.strip() for cell in found.strip("|").split("|")]
