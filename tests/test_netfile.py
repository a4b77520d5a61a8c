"""Files of pruned nets: exact round trips, same content same bytes, and a clear refusal of anything else."""

import json
from pathlib import Path

import hypothesis.extra.numpy as arrays_of
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vdbench import netfile
from vdbench.netfile import NetFileError
from vdbench.records import RecordError


def sparse(shape: tuple[int, ...], density: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < density, rng.normal(0, 0.1, shape), 0).astype(np.float32)


def lenet300100(density: float) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    shapes = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
    weights = {f"{name}.weight": sparse(shape, density, seed) for seed, (name, shape) in enumerate(shapes.items())}
    return weights, {f"{name}.bias": sparse(shape[:1], 1.0) for name, shape in shapes.items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.npz"


def round_trip(path: Path, weight: np.ndarray) -> np.ndarray:
    netfile.write_arrays(path, {"w": weight}, {}, {})
    arrays, _ = netfile.read_arrays(path)
    return arrays["w"]


def assert_identical(one: np.ndarray, other: np.ndarray) -> None:
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other, strict=True)


def test_a_net_comes_back_as_it_was(path):
    weights, biases = lenet300100(0.02)
    meta = {"model": "lenet300100", "seed": 3, "note": "σ"}
    netfile.write_arrays(path, weights, biases, meta)
    arrays, read_meta = netfile.read_arrays(path)
    assert read_meta == meta
    assert arrays.keys() == weights.keys() | biases.keys()
    for name, array in (weights | biases).items():
        assert_identical(arrays[name], array)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weight=arrays_of.arrays(
        st.sampled_from([np.float32, np.float64, np.float16, np.int8]),
        arrays_of.array_shapes(max_dims=4, max_side=9),
        fill=st.just(0),
    )
)
def test_any_array_comes_back_as_it_was(weight, path):
    assert_identical(round_trip(path, weight), weight)


@pytest.mark.parametrize(
    "weight", [np.zeros((20, 30), np.float32), sparse((20, 30), 1.1), np.zeros((0, 5), np.float32)]
)
def test_empty_and_dense_layers(weight, path):
    assert_identical(round_trip(path, weight), weight)


@pytest.mark.parametrize(
    ("gap", "dtype"),
    [
        (1, np.uint8),
        (2**8 - 1, np.uint8),
        (2**8, np.uint16),
        (2**16 - 1, np.uint16),
        (2**16, np.uint32),
        (2**20, np.uint32),
    ],
)
def test_gaps_are_stored_in_the_narrowest_type_that_holds_them(gap, dtype, path):
    weight = np.zeros(gap + 8, np.float32)
    weight[[3, 3 + gap, 4 + gap]] = 1, -2, 3
    assert_identical(round_trip(path, weight), weight)
    with np.load(path) as content:
        assert content["w:gaps"].dtype == dtype


def test_first_and_last_weight_are_not_forgotten(path):
    weight = np.zeros((3, 4), np.float32)
    weight[0, 0], weight[-1, -1] = 1, 2
    assert_identical(round_trip(path, weight), weight)


def test_memory_order_is_no_part_of_the_content(path):
    weight = sparse((4, 3, 5, 5), 0.3)
    as_it_is = round_trip(path, weight), path.read_bytes()
    channels_last = np.ascontiguousarray(weight.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert_identical(round_trip(path, channels_last), as_it_is[0])
    assert path.read_bytes() == as_it_is[1]


def test_same_content_is_the_same_bytes(tmp_path):
    weights, biases = lenet300100(0.02)
    netfile.write_arrays(tmp_path / "a.npz", weights, biases, {"model": "m", "seed": 1})
    netfile.write_arrays(tmp_path / "b.npz", weights, biases, {"seed": 1, "model": "m"})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_small_file_for_a_sparse_net(path):
    weights, biases = lenet300100(0.01)
    netfile.write_arrays(path, weights, biases, {"model": "lenet300100"})
    assert path.stat().st_size < 20_000
    assert path.stat().st_size > 4 * sum(np.count_nonzero(w) for w in weights.values())  # the values are all there


# --- refusals


@pytest.fixture
def good(path):
    """The bytes of a small net."""
    netfile.write_arrays(path, {"w": sparse((30, 40), 0.1)}, {"b": np.ones(30, np.float32)}, {"model": "x"})
    return path.read_bytes()


def test_a_layer_may_be_called_like_the_weights_of_a_recurrent_one():
    assert netfile.parameter_name("weight_head") == "weight_head.weight"
    for name in ("weight_hh_l0", "rnn.weight_ih_l12_reverse", "weight_hr_l0"):
        assert netfile.parameter_name(name) == name


def test_missing_file(path):
    with pytest.raises(NetFileError, match=r"net\.npz: no such file"):
        netfile.read_arrays(path)


def test_truncated_at_any_length(good, path):
    for length in range(0, len(good), 29):
        path.write_bytes(good[:length])
        with pytest.raises(NetFileError, match=r"net\.npz: not a file of vdbench's \(no NumPy archive, or cut short\)"):
            netfile.read_arrays(path)


@pytest.mark.parametrize("content", [b"garbage", b"PK\x03\x04 of another kind", b'{"json": 1}'])
def test_garbage(content, path):
    path.write_bytes(content)
    with pytest.raises(NetFileError, match=r"net\.npz: not a file of vdbench's \(") as caught:
        netfile.read_arrays(path)
    assert "delete" not in str(caught.value) and "pickle" not in str(caught.value)


def test_damaged_byte_is_refused_or_harmless(good, path):
    reference, _ = netfile.read_arrays(path)
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0xFF]) + good[position + 1 :])
        try:
            arrays, _ = netfile.read_arrays(path)
        except NetFileError:
            continue
        for name in arrays.keys() & reference.keys():
            assert_identical(arrays[name], reference[name])


def test_is_a_record_error_so_that_the_command_line_explains_it():
    assert issubclass(NetFileError, RecordError)


class Payload:
    """What a malicious pickle does: run something as soon as it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_array_is_refused_not_run(good, path, tmp_path):
    with np.load(path) as archive:
        content = dict(archive)
    content["b"] = np.array([Payload(tmp_path / "executed")], dtype=object)
    np.savez(path, **content)
    with pytest.raises(NetFileError, match="pickle"):
        netfile.read_arrays(path)
    assert not (tmp_path / "executed").exists()


def test_lone_array_file_is_refused(path):
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(NetFileError):
        netfile.read_arrays(path)


def meta(content: object) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("meta", None),
        ("meta", np.array([1, 2], np.uint8)),
        ("meta", meta({"model": "x"})),
        ("meta", meta({"format": 2, "model": "x"})),
        ("meta", meta([1])),
        ("meta", meta("text")),
        ("w:gaps", None),
        ("w:values", None),
        ("w:values", np.ones(3, np.float32)),
        ("w:values", np.ones((120, 1), np.float32)),
        ("w:shape", np.array([2, 3], np.uint32)),
        ("w:shape", np.array([-30, -40])),
        ("w:gaps", np.full(120, 200, np.uint8)),
        ("w:gaps", np.full(120, -1)),
        ("w:gaps", np.zeros(120, np.uint8)),
        ("w:gaps", np.full(120, 0.5)),
    ],
)
def test_edited_file_is_refused(key, value, path):
    weight = np.zeros((30, 40), np.float32)
    weight.ravel()[:120] = 1
    netfile.write_arrays(path, {"w": weight}, {}, {"model": "x"})
    with np.load(path) as archive:
        content = dict(archive)
    if value is None:
        del content[key]
    else:
        content[key] = value
    np.savez(path, **content)
    with pytest.raises(NetFileError, match=r"net\.npz"):
        netfile.read_arrays(path)
