"""What changes from epoch to epoch of a run: learning rate, KL weight and randomness."""

import numpy as np

from vdbench.config import DenseRecipe, VariationalRecipe

_STREAMS = {"initial": 0, "order": 1, "noise": 2, "scores": 3, "augmentation": 5}


def derived_seed(seed: int, stream: str, epoch: int = 0) -> int:
    """A seed for one purpose and epoch of a run, so that an epoch's randomness needs no state from the one before."""
    return int(np.random.SeedSequence([seed, _STREAMS[stream], epoch]).generate_state(1, np.uint64)[0] >> 1)


def learning_rate(recipe: DenseRecipe, epoch: int) -> float:
    """Constant for `constant_epochs`, then linear to zero at the end; `epoch` counts from 0."""
    falling = max(recipe.epochs - recipe.constant_epochs, 1)
    return recipe.learning_rate * min(1.0, (recipe.epochs - epoch) / falling)


def kl_weight(recipe: DenseRecipe, epoch: int) -> float:
    """0 for `kl_zero_epochs`, then linear to the final one over `kl_warmup_epochs`; `epoch` counts from 0."""
    if not isinstance(recipe, VariationalRecipe):
        return 0.0
    since = epoch - recipe.kl_zero_epochs
    if since < 0:
        return 0.0
    final = recipe.final_kl_weight or 1.0
    return final if since >= recipe.kl_warmup_epochs else final * since / recipe.kl_warmup_epochs
