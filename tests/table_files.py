"""Rows and numbers of the tables that were written into a folder."""

from pathlib import Path

import pandas as pd


def numbers(folder: Path, name: str = "table1") -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv")


def row(frame: pd.DataFrame, **wanted: object) -> pd.Series:
    found = frame[(frame[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    assert len(found) == 1, found
    return found.iloc[0]
