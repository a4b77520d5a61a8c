"""Statistics of batch normalisation, estimated anew for the net that is evaluated."""

import torch
from torch import nn

from vdbench.data import Dataset
from vdbench.metrics import EVALUATION_BATCH, evaluating
from vdbench.text import Text

EXAMPLES = 10_000  # of the training set, or all of a smaller one
_SEED = 20170806  # never a run's own: the same images for every run of every method


def normalised_by_averages(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The layers that compute with running means and variances in eval mode."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [layer for layer in layers if layer.track_running_stats]


@torch.no_grad()
def reestimate(model: nn.Module, data: Dataset | Text) -> None:
    """Replace the running means and variances by those of training images under the weights of eval mode.

    The running averages are of training mode: of noisy outputs, where evaluation has none, and of a net with weights
    and dropout that evaluation does not have. The images are not augmented. A net without such layers is left alone,
    and training is not affected, for it does not use these statistics.
    """
    layers = normalised_by_averages(model)
    if not layers or isinstance(data, Text):
        return
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(_SEED))[:EXAMPLES]
    # of one size, or nearly: every batch counts as much as any other
    batches = order.to(data.train_labels.device).tensor_split(-(-len(order) // EVALUATION_BATCH))
    momenta = [layer.momentum for layer in layers]
    try:
        with evaluating(model):
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # the plain average over batches
                layer.train()
            for batch in batches:
                model(data.train_batch(batch)[0])
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
