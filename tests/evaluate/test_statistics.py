import numpy as np
import pytest
import torch

from cosmos_mp.evaluate.metrics import frechet
from cosmos_mp.evaluate.statistics import bootstrap, ratio_of_means


def test_interval_of_a_mean_has_the_textbook_width():
    x = np.random.default_rng(0).normal(2.0, 3.0, size=400)
    value, low, high = bootstrap(np.mean, x, repeats=1000)
    standard_error = x.std() / 20
    assert value == pytest.approx(x.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error, rel=0.1)
    assert (low + high) / 2 == pytest.approx(value, abs=0.2 * standard_error)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [bootstrap(np.mean, rng.exponential(size=60), repeats=100, seed=i) for i in range(200)]
    covered = np.mean([i.low <= 1.0 <= i.high for i in intervals])
    assert 0.88 <= covered <= 0.98


def test_a_lower_level_is_narrower():
    x = np.random.default_rng(0).normal(size=100)
    wide, narrow = bootstrap(np.mean, x, level=0.95), bootstrap(np.mean, x, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_pairs_stay_together():
    x = np.random.default_rng(0).normal(5, 2, size=100)
    value, low, high = bootstrap(lambda a, b: a.mean() - b.mean(), x + 1, x)
    assert (value, low, high) == pytest.approx((1, 1, 1))


def test_equal_seeds_give_equal_intervals():
    x = np.random.default_rng(0).normal(size=50)
    assert bootstrap(np.mean, x, seed=3) == bootstrap(np.mean, torch.from_numpy(x), seed=3)
    assert bootstrap(np.mean, x, seed=3) != bootstrap(np.mean, x, seed=4)


def test_frechet_lies_inside_its_interval():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 20)), rng.normal(size=(100, 20)) * 1.2
    value, low, high = bootstrap(frechet, x, y, repeats=50)
    assert low < value < high
    assert value == pytest.approx(frechet(x, y))


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ([np.zeros(4), np.zeros(5)], {}, r"\[4, 5\]"),
        ([np.zeros(1)], {}, "N >= 2"),
        ([], {}, "N >= 2"),
        ([np.zeros(4)], {"repeats": 1}, "repeats"),
        ([np.zeros(4)], {"level": 1.0}, "level"),
        ([np.array([1.0, np.nan, 2.0])], {}, "not finite"),
    ],
)
def test_refuses(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(lambda *a: a[0].mean(), *arrays, **options)


def test_ratio_of_means():
    assert ratio_of_means(np.array([1.0, 3.0]), np.array([1.0, 7.0])) == 0.5
    with pytest.raises(ValueError, match="mean is 0"):
        ratio_of_means(np.ones(2), np.zeros(2))
