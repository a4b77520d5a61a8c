"""Making the layers of an existing model variational."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from vdbench.recurrent import VariationalDropoutEmbedding, VariationalDropoutLSTM, VariationalDropoutTanhRNN
from vdbench.variational import (
    INITIAL_LOG_SIGMA2,
    LOGA_THRESHOLD,
    P_THRESHOLD,
    SingleWeight,
    VariationalDropout,
    VariationalDropoutConv2d,
    VariationalDropoutLinear,
    check_options,
    variational_layers,
)

KINDS: dict[type[nn.Module], type[VariationalDropout]] = {
    nn.Linear: VariationalDropoutLinear,
    nn.Conv2d: VariationalDropoutConv2d,
    nn.Embedding: VariationalDropoutEmbedding,
    nn.RNN: VariationalDropoutTanhRNN,
    nn.LSTM: VariationalDropoutLSTM,
}


def to_variational_dropout(
    model: nn.Module,
    *,
    skip: Collection[str] = (),
    shared_noise: bool | None = None,
    p_threshold: float = P_THRESHOLD,
    loga_threshold: float = LOGA_THRESHOLD,
    initial_log_sigma2: float = INITIAL_LOG_SIGMA2,
) -> nn.Module:
    """Make every `nn.Linear`, `nn.Conv2d`, `nn.Embedding`, `nn.RNN` and `nn.LSTM` of a model variational, in place,
    and return the model.

    The layers stay the same objects: weights, device, dtype, training mode, hooks and sharing are kept. Subclasses of
    these are left alone, since they compute something else. An optimizer must be made afterwards, so that it knows
    the log variances.

    Args:
        model: any module; it may itself be a layer.
        skip: names, as in `model.named_modules()`, of layers (or modules and all within them) to leave as they are.
        shared_noise: that of the linear and convolutional layers, see `VariationalDropoutLinear`; by default, true
            for a model with recurrent layers and false for any other.
        p_threshold, loga_threshold, initial_log_sigma2: as in `VariationalDropoutLinear`.

    Raises:
        TypeError: not a module. ValueError: a name in `skip` that the model does not have, no layer to convert, layers
            that learn their shape from their first batch, which they have not seen, a layer with a setting that its
            variational counterpart cannot have, a parameter with several names, or an option out of range; the model is
            then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}: give an nn.Module")
    skip = [skip] if isinstance(skip, str) else skip
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if unknown := set(skip) - names:
        raise ValueError(f"skip names {sorted(unknown)}, which this model does not have; it has {sorted(names - {''})}")
    spared = {id(inner) for name in skip for inner in model.get_submodule(name).modules()}
    layers = {name: m for name, m in model.named_modules() if type(m) in KINDS and id(m) not in spared}
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has layers without weights yet: run one batch through it first")
    if not layers:
        already = ", ".join(name or "itself" for name, _ in variational_layers(model))
        why = f"; it is variational already: {already}" if already else ""
        known = ", ".join(f"nn.{kind.__name__}" for kind in KINDS)
        raise ValueError(f"{type(model).__name__} has no {known} layer to make variational{why}")
    check_options(p_threshold, loga_threshold, initial_log_sigma2)
    for name, layer in layers.items():
        if refusal := KINDS[type(layer)].refuses(layer):
            raise ValueError(f"{name or type(layer).__name__}: {refusal}; change it or name it in skip")
    if tied := _tied(model, list(layers.values())):
        raise ValueError(
            f"{' and '.join(tied)} are one parameter, for which each would have a posterior of its own; untie them or "
            "name their layers in skip"
        )
    if shared_noise is None:
        shared_noise = any(isinstance(module, nn.RNNBase | nn.RNNCellBase) for module in model.modules())
    for layer in layers.values():
        layer.__class__ = KINDS[type(layer)]
        assert isinstance(layer, VariationalDropout)
        layer._init_variational(p_threshold, loga_threshold, initial_log_sigma2)
        if isinstance(layer, SingleWeight):
            layer.shared_noise = shared_noise
    call_every_layer(model)
    return model


def call_every_layer(model: nn.Module) -> None:
    """Keep PyTorch from the fast path of transformers, which reads the weights past the layers they belong to."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which that path alone takes


def _tied(model: nn.Module, layers: list[nn.Module]) -> tuple[str, str] | None:
    """Two names of one parameter, where it is one of `layers`'."""
    owners: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(name, recurse=False, remove_duplicate=False):
            other, owner = owners.setdefault(id(parameter), (own, module))
            if other != own and any(layer is owner or layer is module for layer in layers):
                return other, own
    return None


def to_plain(model: nn.Module) -> nn.Module:
    """Make every variational layer of a model the plain layer it was made from, in place, and return the model: the
    weights are those of eval mode, removed ones zero. Without variational layers a model is left as it is.

    Raises:
        ValueError: a weight is computed from other parameters; the model is then as it was.
    """
    for name, layer in variational_layers(model):
        if computed := [matrix.name for matrix in layer.matrices() if matrix.name not in layer._parameters]:
            raise ValueError(
                f"{name or type(layer).__name__}: {', '.join(computed)} is computed from other parameters, as by "
                "spectral_norm: take that off first (torch.nn.utils.parametrize.remove_parametrizations)"
            )
    for _, layer in list(variational_layers(model)):
        with torch.no_grad():
            for matrix in layer.matrices():
                matrix.weight.copy_(matrix.masked(layer.loga_threshold))
        for name, _ in list(layer.named_parameters(recurse=False)):
            if name.endswith("log_sigma2"):
                delattr(layer, name)
        kind: Any = next(kind for kind, variational in KINDS.items() if isinstance(layer, variational))
        layer.__class__ = kind
    return model
