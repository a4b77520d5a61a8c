"""What a few seeds are made to say."""

import factory
import numpy as np
import pytest

from vdbench import stats
from vdbench.records import Work


def test_summary_of_known_values():
    summary = stats.summarise([1.0, 2.0, 3.0, 6.0])
    assert summary is not None
    assert (summary.n, summary.mean) == (4, 3.0)
    assert summary.std == pytest.approx(np.sqrt(14 / 3))  # n - 1


def test_one_value_has_no_spread_and_none_has_no_summary():
    assert stats.summarise([1.5]) == stats.Summary(1, 1.5, None, None)
    assert stats.summarise([]) is None


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = stats.bootstrap_interval(rng.normal(5, 2, 30)) or (np.nan, np.nan)
        covered += low <= 5 <= high
    assert 180 <= covered <= 198


def test_two_values_have_no_interval():
    assert stats.summarise([1.0, 2.0]).interval is None
    assert stats.summarise([1.0, 2.0, 3.0]).interval is not None


def test_interval_is_the_same_every_time_and_widens_with_level():
    values = [1.0, 2.0, 4.0, 8.0]
    narrow, wide = stats.bootstrap_interval(values, level=0.5), stats.bootstrap_interval(values)
    assert wide == stats.bootstrap_interval(values)
    assert narrow and wide and wide[0] < narrow[0] < narrow[1] < wide[1]


def test_pairs_are_of_the_same_seed():
    assert stats.paired_differences({2: 5.0, 0: 1.0, 3: 9.0}, {0: 0.5, 1: 7.0, 2: 4.0}) == [0.5, 1.0]


def test_speedup_pairs_interleaved_samples():
    """Load that slows a round slows both backends, so that their ratio stays what it is."""
    load = np.array([1.0, 1.0, 9.0, 10.0, 11.0])
    suite = factory.suite()
    timings = [_timing("torch_dense", 4e-5 * load), _timing("scipy_csr", 2e-5 * load)]
    dense, sparse = stats.speedups(factory.record(suite, "fc", "vd_warmup", 0, "time", timing=timings))
    assert (dense.over_torch.value, dense.over_torch.interval) == (1.0, None)
    assert sparse.over_torch.value == pytest.approx(2.0)
    assert sparse.over_torch.interval == pytest.approx((2.0, 2.0))
    assert sparse.seconds == pytest.approx(2e-5 * 9)


def test_speedup_is_the_median_of_ratios_and_not_the_ratio_of_medians():
    timings = [_timing("torch_dense", [4.0, 9.0, 10.0]), _timing("scipy_csr", [2.0, 1.0, 10.0])]
    record = factory.record(factory.suite(), "fc", "vd_warmup", 0, "time", timing=timings)
    assert stats.speedups(record)[1].over_torch.value == 2.0  # of 2, 9 and 1; the medians would give 4.5


def test_speedup_compares_only_equal_batch_and_threads():
    timings = [_timing("torch_dense", [1.0, 1.0]), _timing("scipy_csr", [0.1, 0.1], batch_size=64)]
    record = factory.record(factory.suite(), "fc", "vd_warmup", 0, "time", timing=timings)
    assert stats.speedups(record)[1].over_torch is None
    assert stats.speedups(record)[1].over_best is None


def test_the_best_dense_backend_is_that_of_the_setting():
    timings = [
        _timing("torch_dense", [4.0, 4.0]),
        _timing("onnxruntime", [2.0, 2.0]),
        _timing("vdbench", [1.0, 1.0]),
        _timing("torch_dense", [3.0, 3.0], batch_size=64),
        _timing("onnxruntime", [6.0, 6.0], batch_size=64),
        _timing("vdbench", [0.5, 0.5], batch_size=64),
    ]
    found = stats.speedups(factory.record(factory.suite(), "fc", "vd_warmup", 0, "time", timing=timings))
    assert [(item.over_best.reference, item.over_best.value) for item in found] == [
        ("onnxruntime", 0.5),
        ("onnxruntime", 1.0),
        ("onnxruntime", 2.0),
        ("torch_dense", 1.0),
        ("torch_dense", 0.5),
        ("torch_dense", 6.0),
    ]
    assert [item.over_torch.value for item in found] == [1.0, 2.0, 4.0, 1.0, 0.5, 6.0]


def test_sparse_and_compacted_backends_are_never_the_reference():
    timings = [_timing(name, [1.0, 1.0]) for name in ("onnxruntime_compacted", "mnn_sparse", "vdbench")]
    record = factory.record(factory.suite(), "fc", "vd_warmup", 0, "time", timing=timings)
    assert [(item.over_best, item.over_torch) for item in stats.speedups(record)] == [(None, None)] * 3


def test_contestants_are_the_fastest_of_their_kind():
    times = {"torch_dense": 3, "openvino": 2, "mnn_sparse": 5, "scipy_csr": 4, "vdbench": 9}
    timings = [_timing(name, [float(seconds)] * 2) for name, seconds in times.items()]
    found = stats.speedups(factory.record(factory.suite(), "fc", "vd_warmup", 0, "time", timing=timings))
    assert [item.timing.backend for item in stats.contestants(found)] == ["vdbench", "openvino", "scipy_csr"]
    assert stats.contestants([]) == (None, None, None)


def test_work_is_counted_on_the_weights_left_and_held_against_the_cores():
    suite = factory.untrained_suite()
    timings = [_timing("vdbench", [1e-6, 1e-6], batch_size=64) | {"threads": 2}]
    work = Work(multiply_adds=1000, values=10, weights=10)
    made = factory.untrained_record(suite, "line", "density0.1", timing=timings, work=work, limits={"fma": 200.0})
    (found,) = stats.speedups(made)
    assert found.gflops == pytest.approx(2 * 1000 * 64 / 1e-6 / 1e9)
    assert found.limit == pytest.approx(128 / 400)
    (unknown,) = stats.speedups(made.model_copy(update={"work": None, "limits": {}}))
    assert (unknown.gflops, unknown.limit) == (None, None)


def test_speedup_refuses_samples_that_were_not_interleaved():
    timings = [_timing("torch_dense", [1.0, 1.0]), _timing("scipy_csr", [0.1, 0.1, 0.1])]
    record = factory.record(factory.suite(), "fc", "vd_warmup", 0, "time", timing=timings)
    with pytest.raises(ValueError, match=r"fc/vd_warmup/0: scipy_csr has 3 samples and torch_dense 2"):
        stats.speedups(record)


def _timing(backend, samples, batch_size=1):
    return {"backend": backend, "device": "cpu", "threads": 1, "batch_size": batch_size, "samples_s": list(samples)}
