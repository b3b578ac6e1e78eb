import numpy as np
import pytest
import torch

from diffusers_bitsfusion.utils.timesteps import TimestepDistribution

UNIFORM = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 3.0])
def test_beta_is_the_power_of_a_uniform_number(alpha):
    found = TimestepDistribution.beta(1000, alpha).timesteps(UNIFORM)
    expected = np.floor(1000 * UNIFORM.numpy() ** (1 / alpha))  # quantiles of Beta(alpha, 1)
    assert np.abs(found.numpy() - expected).max() <= 1  # where a quantile falls on a whole step
    assert (found.numpy() == expected).mean() > 0.999


def test_beta_has_the_moments_of_numpys():
    timesteps = TimestepDistribution.beta(1000).timesteps(UNIFORM).double() / 1000
    reference = np.random.default_rng(0).beta(3, 1, 20_000)
    assert float(timesteps.mean()) == pytest.approx(reference.mean(), abs=0.005)
    assert float(timesteps.std()) == pytest.approx(reference.std(), abs=0.005)


def test_uniform_and_its_ends():
    distribution = TimestepDistribution.uniform(8)
    assert distribution.timesteps(torch.tensor([0.0, 0.1249, 0.126, 0.999999, 1.0])).tolist() == [0, 0, 1, 7, 7]


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, np.nan]])
def test_weights_that_are_none(weights):
    with pytest.raises(ValueError, match="finite, not negative and not all zero"):
        TimestepDistribution(np.array(weights))


def test_alpha_must_be_positive():
    with pytest.raises(ValueError, match="must be positive, got 0"):
        TimestepDistribution.beta(1000, 0)
