"""What a few seeds are made to say."""

import factory
import numpy as np
import pytest

from vdbench import stats


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
    assert (dense.ratio, dense.interval) == (1.0, None)
    assert sparse.ratio == pytest.approx(2.0)
    assert sparse.interval == pytest.approx((2.0, 2.0))
    assert sparse.seconds == pytest.approx(2e-5 * 9)


def test_speedup_is_the_median_of_ratios_and_not_the_ratio_of_medians():
    timings = [_timing("torch_dense", [4.0, 9.0, 10.0]), _timing("scipy_csr", [2.0, 1.0, 10.0])]
    record = factory.record(factory.suite(), "fc", "vd_warmup", 0, "time", timing=timings)
    assert stats.speedups(record)[1].ratio == 2.0  # of 2, 9 and 1; the medians would give 4.5


def test_speedup_compares_only_equal_batch_and_threads():
    timings = [_timing("torch_dense", [1.0, 1.0]), _timing("scipy_csr", [0.1, 0.1], batch_size=64)]
    record = factory.record(factory.suite(), "fc", "vd_warmup", 0, "time", timing=timings)
    assert stats.speedups(record)[1].ratio is None


def test_speedup_refuses_samples_that_were_not_interleaved():
    timings = [_timing("torch_dense", [1.0, 1.0]), _timing("scipy_csr", [0.1, 0.1, 0.1])]
    record = factory.record(factory.suite(), "fc", "vd_warmup", 0, "time", timing=timings)
    with pytest.raises(ValueError, match=r"fc/vd_warmup/0: scipy_csr has 3 samples and torch_dense 2"):
        stats.speedups(record)


def _timing(backend, samples, batch_size=1):
    return {"backend": backend, "device": "cpu", "threads": 1, "batch_size": batch_size, "samples_s": list(samples)}
