"""Error measures against torch and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, mean_squared_error

from qtools import metrics

MEASURES = [metrics.mse, metrics.rmse, metrics.mae, metrics.max_error, metrics.sqnr_db]


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 40), dtype=np.float32)
    return x, x + 0.1 * rng.standard_normal((30, 40), dtype=np.float32)


def test_measures_equal_scikit_learn(pair):
    assert metrics.mse(*pair) == pytest.approx(mean_squared_error(*pair), rel=1e-6)
    assert metrics.rmse(*pair) == pytest.approx(math.sqrt(mean_squared_error(*pair)), rel=1e-6)
    assert metrics.mae(*pair) == pytest.approx(mean_absolute_error(*pair), rel=1e-6)
    assert metrics.max_error(*pair) == pytest.approx(np.abs(pair[0] - pair[1]).max(), rel=1e-6)


def test_sqnr_of_a_tenth_of_the_amplitude_is_20_db():
    x = np.ones(10)
    assert metrics.sqnr_db(x, 0.9 * x) == pytest.approx(20)
    assert metrics.sqnr_db(x, x) == math.inf
    assert metrics.sqnr_db(0 * x, x) == -math.inf


@pytest.mark.parametrize("measure", MEASURES)
def test_torch_and_numpy_agree(measure, pair):
    tensors = [torch.from_numpy(part) for part in pair]
    assert measure(*tensors) == pytest.approx(measure(*pair), rel=1e-12)
    assert measure(*(t.to(torch.bfloat16) for t in tensors)) == pytest.approx(measure(*pair), rel=0.05)


@pytest.mark.parametrize("measure", MEASURES)
def test_shapes_that_differ_and_empty_tensors_are_refused(measure):
    with pytest.raises(ValueError, match="cannot compare shapes"):
        measure(np.ones(3), np.ones((3, 1)))
    with pytest.raises(ValueError, match="empty"):
        measure(np.ones(0), np.ones(0))
