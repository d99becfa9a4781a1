"""Refusal detection with each model's answers left out once."""

from pathlib import Path

import numpy as np
import pytest

from services.contracts.errors import DataError
from services.safety.embedded.weights import SHIPPED
from services.safety.training.held_out import XSTEST_ANSWERS
from services.safety.training.leave_one_out import Fold, leave_one_out, table


def fold(model: str, labels: list[int], shipped: list[int], trained: list[int]) -> Fold:
    return Fold(model, *(np.array(flags, bool) for flags in (labels, shipped, trained)))


def test_table_has_both_encoders_for_each_model_and_for_all() -> None:
    found = table([fold("a", [1, 1, 0], [1, 0, 0], [1, 1, 0]), fold("b", [1, 0, 0], [0, 0, 1], [1, 0, 1])])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        [model, encoder, counts]
        for model, counts in (("a", "2+1"), ("b", "1+2"), ("all models", "3+3"))
        for encoder in ("as shipped", "trained on the others")
    ]
    assert [row[3][:5] for row in rows] == ["0.500", "1.000", "0.000", "1.000", "0.333", "1.000"], "recall"


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"xstest_v2_completions_gpt4\.csv"):
        leave_one_out(tmp_path, SHIPPED / "encoder", 1.0, 0)


@pytest.mark.long
def test_every_model_is_left_out_once(data_dir: Path) -> None:
    folds = leave_one_out(data_dir, SHIPPED / "encoder", 0.02, 0)
    assert [fold.model for fold in folds] == list(XSTEST_ANSWERS)
    assert all(len(fold.labels) == len(fold.shipped) == len(fold.trained) > 400 for fold in folds)
    assert all((fold.shipped == fold.labels).mean() > 0.6 for fold in folds)
