"""The engine as a module, against the masked dense net it stands for."""

import copy
import pickle

import pytest
import torch
from torch import nn

from vdbench.conversion import to_plain, to_variational_dropout
from vdbench.sparse import SparseModule, compile_sparse, to_cpu_sparse
from vdbench.sparse.module import layer_by_layer
from vdbench.variational import VariationalDropoutConv2d, VariationalDropoutLinear, variational_layers

IMAGES = torch.linspace(-1, 1, 6 * 2 * 25).view(6, 2, 5, 5)


def network() -> nn.Sequential:
    """Convolutions and linear layers, variational and plain, about half of the former's weights removed."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="circular", groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Sequential(nn.Flatten(), nn.Linear(36, 20, bias=False)),
        nn.ReLU(),
        nn.Linear(20, 7),
        nn.Linear(7, 5),
    )
    to_variational_dropout(net, skip=["3", "7"])
    with torch.no_grad():
        for layer in (net[0], net[4][1], net[6]):
            layer.log_sigma2.copy_(torch.log(layer.weight**2) + 3 + torch.randn_like(layer.weight))
    return net


def test_sparse_is_masked_dense():
    net = network().train()
    net(IMAGES)  # batch statistics that are not those a new net has
    sparse = to_cpu_sparse(net)
    expected = net.eval()(IMAGES).detach()
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(sparse(IMAGES), expected, rtol=0, atol=1e-6)
    graph = sparse.nets[IMAGES.shape[1:]].graph
    assert 0 < graph["6"].weight_count <= net[6].mask.sum() < 0.7 * net[6].weight.numel()
    assert graph["7"].weight_count <= 35


def test_the_original_is_untouched():
    net = network().train()
    state = copy.deepcopy(net.state_dict())
    sparse = to_cpu_sparse(net)
    assert not sparse.training and net.training
    assert isinstance(net[0], VariationalDropoutConv2d) and isinstance(net[6], VariationalDropoutLinear)
    before = sparse(IMAGES)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(sparse(IMAGES), before)  # no memory is shared
    assert set(state) == set(net.state_dict())
    for parameter in sparse.parameters():
        nn.init.ones_(parameter)
    assert not any(p.any() for p in net.parameters())


@pytest.mark.parametrize("make", [nn.Linear, VariationalDropoutLinear])
def test_a_model_may_itself_be_a_linear_layer(make):
    layer = make(6, 3).eval()
    sparse = to_cpu_sparse(layer)
    for shape in ((6,), (4, 6), (2, 3, 6)):
        x = torch.randn(shape)
        torch.testing.assert_close(sparse(x), layer(x).detach(), rtol=0, atol=1e-6)


def test_a_model_may_itself_be_a_convolution():
    layer = VariationalDropoutConv2d(2, 3, 3, initial_log_sigma2=-1.0).eval()
    torch.testing.assert_close(to_cpu_sparse(layer)(IMAGES), layer(IMAGES).detach(), rtol=0, atol=1e-6)


def test_inputs_of_any_layout_that_may_require_gradients():
    layer = nn.Linear(6, 3)
    sparse = to_cpu_sparse(layer)
    x = torch.randn(6, 4).t().requires_grad_()
    torch.testing.assert_close(sparse(x), layer(x).detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sparse(x[::2]), layer(x[::2]).detach(), rtol=0, atol=1e-6)


def test_a_layer_without_weights_left_gives_its_bias():
    layer = VariationalDropoutLinear(6, 3, initial_log_sigma2=20.0)
    sparse = to_cpu_sparse(layer)
    torch.testing.assert_close(sparse(torch.randn(4, 6)), layer.bias.detach().expand(4, 3))
    assert sum(op.weight_count for op in sparse.nets[(6,)].graph.ops) == 0


class Siamese(nn.Module):
    """One layer under two names of different parents."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.right = nn.Sequential(self.left[0], nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x)


def test_a_shared_layer_stays_shared():
    model = to_variational_dropout(Siamese(), initial_log_sigma2=-1.0).eval()
    sparse = layer_by_layer(to_plain(copy.deepcopy(model)), 1)
    assert isinstance(sparse.left[0], SparseModule) and sparse.left[0] is sparse.right[0]
    x = torch.randn(5, 4)
    torch.testing.assert_close(sparse(x), model(x).detach(), rtol=0, atol=1e-6)


def test_a_layer_with_two_names_in_one_parent_is_replaced_under_both():
    shared = nn.Linear(4, 4)
    model = to_variational_dropout(nn.Sequential(shared, nn.ReLU(), shared))
    x = torch.randn(5, 4)
    expected = model.eval()(x).detach()
    torch.testing.assert_close(to_cpu_sparse(model)(x), expected, rtol=0, atol=1e-6)
    sparse = layer_by_layer(to_plain(model), 1)
    assert isinstance(sparse[0], SparseModule) and sparse[2] is sparse[0]
    torch.testing.assert_close(sparse(x), expected, rtol=0, atol=1e-6)


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_subclasses_of_the_layers_are_left_alone():
    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 2))
    x = torch.randn(5, 4)
    torch.testing.assert_close(to_cpu_sparse(model)(x), model(x).detach())
    assert type(layer_by_layer(model, 1)[0]) is Doubled


def test_multi_head_attention_still_works():
    model = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(to_cpu_sparse(model)(x, x, x)[0], model(x, x, x)[0])


def test_a_recurrent_model_of_the_users_own():
    """Words as numbers cannot be traced: the layers that can are compiled, the others plain and masked."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 12, padding_idx=0)
            self.lstm = nn.LSTM(12, 10, batch_first=True, bidirectional=True)
            self.output = nn.Linear(20, 7)

        def forward(self, sentences):
            return self.output(self.lstm(self.embedding(sentences))[0])

    torch.manual_seed(0)
    model = to_variational_dropout(Tagger(), initial_log_sigma2=-3.0).eval()
    fast, sentences = to_cpu_sparse(model), torch.randint(50, (4, 9))
    with torch.no_grad():
        torch.testing.assert_close(fast(sentences), model(sentences), rtol=1e-5, atol=1e-6)
    assert type(fast.model.lstm) is nn.LSTM and type(fast.model.embedding) is nn.Embedding
    assert list(variational_layers(model))


def test_an_empty_batch_and_empty_texts():
    assert to_cpu_sparse(nn.Linear(6, 3))(torch.empty(0, 6)).shape == (0, 3)
    assert to_cpu_sparse(nn.Sequential(nn.Linear(6, 3), nn.ReLU()))(torch.empty(2, 0, 6)).shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.float64)), r"1\.weight is torch\.float64 on cpu"),
        (nn.Sequential(nn.Linear(2, 2, dtype=torch.bfloat16)), r"0\.weight is torch\.bfloat16.*\.float\(\)"),
        (nn.Linear(2, 2, device="meta"), r"weight is torch\.float32 on meta.*\.cpu\(\)"),
    ],
)
def test_other_types_and_devices_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        to_cpu_sparse(model)


def test_what_is_no_model_or_has_no_weights_yet_is_refused():
    for refused in (to_cpu_sparse, lambda model: compile_sparse(model, torch.zeros(1, 6))):
        with pytest.raises(TypeError, match=r"the model is a int: give an nn\.Module"):
            refused(3)
        with pytest.raises(ValueError, match=r"0\.weight has no numbers yet: run one batch through the model first"):
            refused(nn.Sequential(nn.LazyLinear(3)).eval())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(clone):
    sparse = to_cpu_sparse(network())
    torch.testing.assert_close(clone(sparse)(IMAGES), sparse(IMAGES), rtol=0, atol=1e-6)  # sums in another order


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, first: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return scale * self.layer(first)


def test_a_call_by_name_is_one_by_position_and_one_with_more_changes_nothing_for_later_ones(caplog):
    model, x = Named().eval(), torch.randn(4, 6)
    sparse = to_cpu_sparse(model)
    state = {*sparse.state_dict()}
    for call in (lambda m: m(x), lambda m: m(first=x), lambda m: m(x, scale=2.0), lambda m: m(x[0])):
        torch.testing.assert_close(call(sparse), call(model).detach(), rtol=0, atol=1e-6)
    assert [*sparse.nets] == [(6,)] and {*sparse.state_dict()} == state and not caplog.text
    with pytest.raises(TypeError, match="third"):
        sparse(x, third=1)


def test_loaded_weights_are_computed_with():
    sparse, other = to_cpu_sparse(network()), to_cpu_sparse(network())
    expected = other(IMAGES) * 0
    sparse(IMAGES)
    sparse.load_state_dict({name: torch.zeros_like(value) for name, value in other.state_dict().items()}, strict=True)
    torch.testing.assert_close(sparse(IMAGES), expected)


def test_layers_with_hooks_keep_them():
    def doubled(module, inputs, output):
        return 2 * output

    layer, x = nn.Linear(6, 3), torch.randn(4, 6)
    expected = 2 * layer(x).detach()
    layer.register_forward_hook(doubled)
    for model in (layer, nn.Sequential(layer), nn.Sequential(nn.Sequential(layer), nn.Identity())):
        torch.testing.assert_close(to_cpu_sparse(model)(x), expected, rtol=0, atol=1e-6)


def test_a_model_reads_its_layers_weights():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + other @ self.layer.weight.t() + self.layer.in_features

    model, x = Model(), torch.randn(4, 6)
    torch.testing.assert_close(to_cpu_sparse(model)(x, x), model(x, x).detach(), rtol=0, atol=2e-6)
    with pytest.raises(AttributeError, match="nothing"):
        to_cpu_sparse(model).nothing  # noqa: B018


def test_transformers_are_compiled_layer_by_layer(caplog):
    """PyTorch's fast path would read the weights past the layers that are compiled."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 1).eval(), torch.randn(2, 5, 16)
    fast, hidden = to_cpu_sparse(model), torch.arange(5) >= torch.tensor([[5], [3]])
    for options in ({}, {"src_key_padding_mask": hidden}):
        found, expected = fast(x, **options), model(x, **options).detach()
        torch.testing.assert_close(found[~hidden], expected[~hidden], rtol=0, atol=2e-6)
    inner = fast._parts[0].layers[0]
    assert inner.linear1.nets and inner.linear2.nets
    assert model.layers[0].activation_relu_or_gelu and model.use_nested_tensor  # the caller's own
    assert "to_cpu_sparse" not in caplog.text
    compile_sparse(model, x[:1])
    assert "; vdbench.to_cpu_sparse(model) compiles it layer by layer" in caplog.text


def test_linear_layers_on_sequences_are_compiled_by_themselves(caplog):
    layer = VariationalDropoutLinear(16, 12, initial_log_sigma2=-2.0)
    model, x = nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(2, 5, 16)
    sparse = to_cpu_sparse(model)
    torch.testing.assert_close(sparse(x), model(x).detach(), rtol=0, atol=1e-6)
    assert "layer by layer: as a whole, 0 would be compiled anew for every length" in caplog.text
    assert sparse._parts[0][0].nets and type(sparse.model[0]) is nn.Linear


def test_what_pytorch_runs_is_masked_and_said(caplog):
    layer = VariationalDropoutConv2d(2, 3, 3, padding=1, padding_mode="reflect", initial_log_sigma2=-2.0).eval()
    net = compile_sparse(layer, IMAGES[:1])
    assert "PyTorch runs" in caplog.text and "to_cpu_sparse" not in caplog.text  # which leaves it to PyTorch too
    torch.testing.assert_close(net(IMAGES), layer(IMAGES).detach(), rtol=0, atol=1e-6)
    assert not any(list(variational_layers(m)) for op in net.graph.ops[1:] for m in op.function.modules.values())
