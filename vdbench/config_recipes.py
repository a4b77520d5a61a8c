"""The recipes of a suite file: how each method trains a net."""

from typing import Literal, Self

from pydantic import Field, model_validator

from vdbench.config_timing import Strict

Method = Literal["dense", "vd_finetune", "vd_warmup", "magnitude", "random"]

VARIATIONAL_METHODS: tuple[Method, ...] = ("vd_finetune", "vd_warmup")
BASELINE_METHODS: tuple[Method, ...] = ("magnitude", "random")


class DenseRecipe(Strict):
    """How a net is optimised: Adam, the learning rate constant at first, then linear to zero."""

    epochs: int = Field(gt=0, description="passes over the training set")
    batch_size: int = Field(
        100, gt=0, description="examples a step, the incomplete last batch dropped; of a text, the sequences a step"
    )
    learning_rate: float = Field(1e-3, gt=0, description="Adam's initial learning rate")
    constant_epochs: int = Field(0, ge=0, description="epochs before the learning rate falls linearly to zero")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty, never on log_sigma2")
    dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="rate of the net's dropout layers; without it that of the net, and in variational dropout 0",
    )
    gradient_clip: float | None = Field(None, gt=0, description="largest norm of a step's gradient, else any")
    matmul_precision: Literal["highest", "high", "medium"] | None = Field(
        None,
        description="torch's `float32_matmul_precision` in training: `medium` multiplies matrices in bfloat16 where a "
        "CPU can, in TF32 on a GPU. None is float32, but on a GPU, for images, bfloat16 under autocast",
    )
    sequence_length: int | None = Field(None, gt=0, description="words a step reads of each sequence, else 35")

    @model_validator(mode="after")
    def _decay_fits(self) -> Self:
        if self.constant_epochs > self.epochs:
            raise ValueError(f"constant_epochs ({self.constant_epochs}) exceeds epochs ({self.epochs})")
        return self


class VariationalRecipe(DenseRecipe):
    """Variational dropout: the KL weight is 0 for `kl_zero_epochs`, then rises linearly to `final_kl_weight`.

    With one below 1 less is removed, with one above 1 more; the loss is the negative evidence lower bound at 1 alone.
    """

    initial_log_sigma2: float = Field(-10.0, ge=-20, le=5, description="log variance every weight starts with")
    log_sigma2_learning_rate: float | None = Field(None, gt=0, description="own rate for log_sigma2, else the same")
    kl_zero_epochs: int = Field(0, ge=0, description="epochs with KL weight 0 before the one it rises from")
    kl_warmup_epochs: int = Field(0, ge=0, description="epochs over which the KL weight then rises to its last value")
    final_kl_weight: float | None = Field(None, gt=0, le=10, description="last value of the KL weight, else 1")
    mask_in_training: bool = Field(True, description="zero the mean of weights over the threshold in training too")

    @model_validator(mode="after")
    def _divergence_counts(self) -> Self:
        weightless = self.kl_zero_epochs + bool(self.kl_warmup_epochs)  # the weight rises from 0 in an epoch at 0
        if weightless >= self.epochs:
            raise ValueError(
                f"kl_zero_epochs ({self.kl_zero_epochs}) leaves none of epochs ({self.epochs}) with a KL weight; the "
                "first of kl_warmup_epochs has none"
            )
        return self


class GradualRecipe(DenseRecipe):
    """Gradual pruning (Zhu and Gupta 2017): sparsity rises as 1 - (1 - t)^3, then the net is fine-tuned."""

    prune_epochs: int = Field(gt=0, description="epochs over which sparsity rises to that of the net it is matched to")

    @model_validator(mode="after")
    def _pruning_fits(self) -> Self:
        if self.prune_epochs >= self.epochs:
            raise ValueError(f"prune_epochs ({self.prune_epochs}) leaves none of epochs ({self.epochs}) to fine-tune")
        return self


class Methods(Strict):
    """The recipe of every method; one left out is not run."""

    dense: DenseRecipe = Field(description="the ordinary net: control of the others and start of three of them")
    vd_finetune: VariationalRecipe | None = Field(None, description="variational dropout from the dense weights")
    vd_warmup: VariationalRecipe | None = Field(None, description="variational dropout from random initialisation")
    magnitude: GradualRecipe | None = Field(None, description="gradual pruning of the smallest dense weights")
    random: GradualRecipe | None = Field(None, description="the same with random masks in the same layer proportions")
