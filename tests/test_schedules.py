"""Schedules of the learning rate and of the weight of the divergence, as the authors' code has them."""

import pytest

from vdbench import schedules
from vdbench.config import DenseRecipe, VariationalRecipe


def test_learning_rate_falls_linearly_to_zero():
    recipe = DenseRecipe(epochs=200, learning_rate=1e-3)
    for epoch in range(200):
        assert schedules.learning_rate(recipe, epoch) == pytest.approx(1e-3 * (200 - epoch) / 200)


def test_learning_rate_is_constant_first():
    recipe = DenseRecipe(epochs=200, constant_epochs=100, learning_rate=1e-4)
    for epoch in range(200):
        assert schedules.learning_rate(recipe, epoch) == pytest.approx(1e-4 * min(2 - epoch / 100, 1))


def test_learning_rate_can_stay_constant():
    recipe = DenseRecipe(epochs=4, constant_epochs=4, learning_rate=0.5)
    assert [schedules.learning_rate(recipe, epoch) for epoch in range(4)] == [0.5] * 4


def test_kl_weight_is_zero_then_rises_linearly_then_stays_one():
    recipe = VariationalRecipe(epochs=200, kl_zero_epochs=5, kl_warmup_epochs=15)
    for epoch in range(200):
        authors = 0.0 if epoch < 5 else (epoch - 5) / 15 if epoch < 20 else 1.0
        assert schedules.kl_weight(recipe, epoch) == pytest.approx(authors)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (VariationalRecipe(epochs=4), [1, 1, 1, 1]),
        (VariationalRecipe(epochs=4, kl_zero_epochs=2), [0, 0, 1, 1]),
        (VariationalRecipe(epochs=4, kl_warmup_epochs=2), [0, 0.5, 1, 1]),
        (VariationalRecipe(epochs=4, kl_warmup_epochs=2, final_kl_weight=0.5), [0, 0.25, 0.5, 0.5]),
        (VariationalRecipe(epochs=3, kl_warmup_epochs=1, final_kl_weight=2.0), [0, 2, 2]),
        (DenseRecipe(epochs=2), [0, 0]),
    ],
)
def test_kl_weight_at_the_corners(recipe, expected):
    assert [schedules.kl_weight(recipe, epoch) for epoch in range(recipe.epochs)] == expected
