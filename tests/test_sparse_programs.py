"""Native programs: every kernel, layout and grouping computes what the graph means."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_graphs import Builder

from vdbench.sparse import lowering, program, tiles
from vdbench.sparse.graph import Add, Affine, AvgPool2d, Clip, Concat, Conv2d, Graph, LeakyReLU, MaxPool2d
from vdbench.sparse.jit import vector_lanes
from vdbench.sparse.lowering import candidates
from vdbench.sparse.plan import Network
from vdbench.sparse.program import Bound, Program, Segment
from vdbench.sparse.stencil import Stencil
from vdbench.sparse.threads import Pool

LANES = vector_lanes()
POOL = Pool(3)


def segment_of(network: Network) -> Segment:
    stencils = [item for item in network.items if isinstance(item, Stencil)]
    assert stencils == network.items, "an operation that should run natively does not"
    names = ["input", *(s.name for s in stencils)]
    return Segment(tuple(stencils), ("input",), (network.output,), {name: network.shapes[name] for name in names})


def every_way(graph: Graph, vectors: int, label: str, split: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What a native program computes, two groups one after the other, and what it should. Three threads that share
    every stencil compute the same."""
    network = Network(graph, single=not vectors)
    segment = segment_of(network)
    program = Program(segment, {s.name: label for s in segment.stencils}, vectors=vectors, split=split)
    batch = np.random.default_rng(1).standard_normal((2 * program.examples, *graph.input.shape), np.float32)
    out = np.full((len(batch), *graph.output.shape), np.nan, np.float32)
    bound = Bound(program)
    for _ in range(2):  # again, so that nothing depends on memory being fresh
        bound((batch.ctypes.data, out.ctypes.data), 2)
    shared = Bound(Program(segment, program.choices, vectors=vectors, split=split, threads=POOL.threads))
    by_three = np.full_like(out, np.nan)
    for _ in range(2):
        shared.point_to((batch.ctypes.data, by_three.ctypes.data), 2)
        POOL.run_together(shared)
    assert_close(by_three, out)
    return out, graph(torch.from_numpy(batch)).numpy()


def assert_close(out: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(out - expected).max() <= 1e-5 * max(1e-3, np.abs(expected).max())


def labels(graph: Graph, vectors: int) -> list[str]:
    items = Network(graph, single=not vectors).items
    found = [c.label for s in items if isinstance(s, Stencil) for c in candidates(s, vectors * LANES if vectors else 1)]
    return list(dict.fromkeys(found))


def convolutional() -> Graph:
    build = Builder((3, 13, 9))
    build.conv(8)
    build.add(Clip)
    build.conv(20, stride=(2, 2))
    build.add(LeakyReLU, slope=0.1)
    build.pool(MaxPool2d, 2)
    build.conv(6, kernel=(1, 3), padding=(0, 0, 2, 0), dilation=(1, 1))
    build.add(Clip, low=-0.5, high=0.5)
    build.linear(5)
    return build.graph()


def residual() -> Graph:
    build = Builder((4, 6, 6))
    before = build.conv(8)
    build.conv(8)
    build.add(Add, inputs=(build.last.name, before))
    before = build.add(Clip)
    build.conv(8, groups=4)
    build.add(Affine, scale=build.numbers(8), shift=build.numbers(8))
    build.add(Concat, (16, 6, 6), inputs=(before, build.last.name))
    build.pool(AvgPool2d, 6)
    build.linear(3)
    return build.graph()


def chain() -> Graph:
    build = Builder((1, 28, 28))
    build.linear(300, density=0.02)
    build.add(Clip)
    build.linear(70, density=0.05)
    build.add(Clip, low=0.0, high=6.0)
    build.linear(10)
    return build.graph()


GRAPHS = {"convolutional": convolutional, "residual": residual, "chain": chain}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("vectors", [0, 1, 2, 4])
def test_every_candidate_computes_the_graph(name, vectors):
    graph = GRAPHS[name]()
    assert labels(graph, vectors)
    for label in labels(graph, vectors):
        assert_close(*every_way(graph, vectors, label))


@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize("vectors", [0, 2])
def test_narrower_vectors(lanes, vectors, monkeypatch):
    for module in (lowering, tiles, program):
        monkeypatch.setattr(module, "vector_lanes", lambda: lanes)
    for graph in (convolutional(), chain()):
        first = segment_of(Network(graph, single=not vectors)).stencils[0]
        for way in candidates(first, vectors * lanes or 1):
            assert_close(*every_way(graph, vectors, way.label))


@pytest.mark.parametrize("name", GRAPHS)
def test_stencils_before_the_split_see_one_vector_of_examples_at_a_time(name):
    graph = GRAPHS[name]()
    segment = segment_of(Network(graph, single=False))
    possible = [
        k for k in range(len(segment.stencils) + 1) if k == len(segment.stencils) or segment.crossing(k) is not None
    ]
    assert len(possible) > 2
    for split in possible:
        assert_close(*every_way(graph, 4, "tile 8x16", split))


def test_a_value_read_on_both_sides_of_a_split_forbids_it():
    segment = segment_of(Network(residual(), single=False))
    assert any(segment.crossing(k) is None for k in range(len(segment.stencils)))


def test_blocks_of_inputs_change_nothing():
    build = Builder((64, 8, 8))
    build.conv(40, density=0.3)
    build.add(Clip)
    assert any(label.endswith("blocked") for label in labels(build.graph(), 1))
    for vectors in (1, 2):
        for label in labels(build.graph(), vectors):
            assert_close(*every_way(build.graph(), vectors, label))


@pytest.mark.parametrize("vectors", [0, 1, 4])
def test_a_bias_may_differ_from_place_to_place(vectors):
    build = Builder((3, 5, 7))
    build.conv(6)
    conv = build.last
    build.ops[-1] = Conv2d(**{**vars(conv), "bias": build.rng.standard_normal(conv.shape).astype(np.float32)})
    build.pool(MaxPool2d, 2)
    for label in labels(build.graph(), vectors):
        assert_close(*every_way(build.graph(), vectors, label))


@pytest.mark.parametrize("vectors", [0, 1])
def test_not_a_number_stays_one(vectors):
    build = Builder((2, 4, 4))
    build.conv(3, density=1.0)
    build.add(Clip)
    build.pool(MaxPool2d, 2)
    graph, network = build.graph(), Network(build.graph(), single=not vectors)
    bound = Bound(program := Program(segment_of(network), {}, vectors=vectors))
    batch = np.ones((program.examples, 2, 4, 4), np.float32)
    batch[:, 0, 1, 1] = np.nan
    out = np.zeros((program.examples, *graph.output.shape), np.float32)
    bound((batch.ctypes.data, out.ctypes.data), 1)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(graph(torch.from_numpy(batch)).numpy()))
    assert np.isnan(out).any()


@pytest.mark.parametrize("vectors", [0, 1])
def test_not_a_number_reaches_none_but_those_who_read_it(vectors):
    build = Builder((100,))
    build.linear(40, density=0.3)
    graph, network = build.graph(), Network(build.graph(), single=not vectors)
    reads = graph.ops[1].weight[:, 50] != 0
    assert 0 < reads.sum() < 40
    for label in labels(graph, vectors):
        program = Program(segment_of(network), {network.output: label}, vectors=vectors)
        batch, out = np.ones((program.examples, 100), np.float32), np.zeros((program.examples, 40), np.float32)
        batch[:, 50] = np.nan
        Bound(program)((batch.ctypes.data, out.ctypes.data), 1)
        np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(reads, out.shape))


def test_single_vectors_pick_inputs_out_of_windows_where_processors_can():
    assert ("windows" in labels(chain(), 0)) == (LANES > 4)


def test_terms_in_the_halo_are_left_out_of_maps_of_one_pixel():
    build = Builder((8, 1, 1))
    build.conv(32, density=1.0)
    assert_close(*every_way(build.graph(), 0, "slices"))
    segment = segment_of(Network(build.graph(), single=True))
    places = Program(segment, {}, vectors=0).places
    step = lowering.slices_step(segment.stencils[0], places, places[segment.outputs[0]], windows=False)
    assert len(step.tables[2]) == 8 * 32 // LANES


@pytest.mark.parametrize("vectors", [0, 1])
def test_networks_that_are_too_large_are_told(vectors):
    build = Builder((3, 30_000, 10_000))
    build.add(Clip)
    with pytest.raises(ValueError, match="kernels reach"):
        Program(segment_of(Network(build.graph(), single=not vectors)), {}, vectors=vectors)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("vectors", [0, 1, 2])
def test_empty_and_full_layers(density, vectors):
    build = Builder((2, 3, 3))
    build.conv(5, density=density)
    build.add(Clip)
    build.linear(3, density=density)
    for label in labels(build.graph(), vectors):
        assert_close(*every_way(build.graph(), vectors, label))


def test_pooling_with_padding_runs_natively_only_behind_a_relu():
    for relu in (False, True):
        build = Builder((2, 6, 6))
        build.conv(4)
        if relu:
            build.add(Clip)
        geometry = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}
        build.add(MaxPool2d, (4, 3, 3), **geometry)
        network = Network(build.graph(), single=False)
        assert all(isinstance(item, Stencil) for item in network.items) == relu
        if relu:
            assert_close(*every_way(build.graph(), 1, "tile 8x16"))


@st.composite
def graphs(draw) -> Graph:
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    build = Builder(shape, seed=draw(st.integers(0, 2**16)))
    for _ in range(draw(st.integers(1, 3))):
        _, height, width = build.last.shape
        sides = draw(st.tuples(*[st.integers(0, 2)] * 4))
        tall, wide = height + sides[0] + sides[1], width + sides[2] + sides[3]
        kernel = (draw(st.integers(1, min(3, tall))), draw(st.integers(1, min(3, wide))))
        stride = draw(st.sampled_from([(1, 1), (2, 2), (1, 2)]))
        build.conv(
            draw(st.integers(1, 20)), kernel, stride, sides, density=draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
        )
        if draw(st.booleans()):
            build.add(Clip)
        if draw(st.booleans()) and min(build.last.shape[1:]) >= 2:
            build.pool(draw(st.sampled_from([MaxPool2d, AvgPool2d])), 2, draw(st.sampled_from([1, 2])))
    build.linear(draw(st.integers(1, 20)))
    return build.graph()


@settings(max_examples=20, deadline=None)
@given(graphs(), st.sampled_from([0, 1, 2]))
def test_any_network_of_convolutions(graph, vectors):
    for label in labels(graph, vectors)[:: 3 if vectors == 0 else 2]:
        assert_close(*every_way(graph, vectors, label))
