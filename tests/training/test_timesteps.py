import numpy as np
import pytest
import torch

from diffusers_bitsfusion.training.timesteps import BINS, ErrorMeter, TimestepDistribution, TimestepErrors

UNIFORM = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 3.0])
def test_beta_is_the_power_of_a_uniform_number(alpha):
    found = TimestepDistribution.beta(1000, alpha).timesteps(UNIFORM)
    expected = np.floor(1000 * UNIFORM.numpy() ** (1 / alpha))  # quantiles of Beta(alpha, 1)
    assert np.abs(found.numpy() - expected).max() <= 1  # where a quantile falls on a whole step
    assert (found.numpy() == expected).mean() > 0.999


def test_beta_has_the_moments_of_numpys():
    drawn = TimestepDistribution.beta(1000).timesteps(UNIFORM).double() / 1000
    reference = np.random.default_rng(0).beta(3, 1, 20_000)
    assert float(drawn.mean()) == pytest.approx(reference.mean(), abs=0.005)
    assert float(drawn.std()) == pytest.approx(reference.std(), abs=0.005)


def test_uniform_and_its_ends():
    distribution = TimestepDistribution.uniform(8)
    assert distribution.timesteps(torch.tensor([0.0, 0.1249, 0.126, 0.999999, 1.0])).tolist() == [0, 0, 1, 7, 7]


def test_proportional_to_measured_errors():
    errors = TimestepErrors([25.0, 75.0], [1.0, 3.0])
    distribution = TimestepDistribution.proportional(100, errors)
    ratio = distribution.probabilities[90] / distribution.probabilities[10]
    assert ratio == pytest.approx(3) and distribution.probabilities.sum() == pytest.approx(1)
    middle = distribution.probabilities[50] / distribution.probabilities[10]
    assert middle == pytest.approx(1 + 2 * (50.5 - 25) / 50)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, np.nan]])
def test_weights_that_are_none(weights):
    with pytest.raises(ValueError, match="finite, not negative and not all zero"):
        TimestepDistribution(np.array(weights))


def test_alpha_must_be_positive():
    with pytest.raises(ValueError, match="must be positive, got 0"):
        TimestepDistribution.beta(1000, 0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_errors_are_those_of_the_clean_latents(prediction_type):
    generator = torch.Generator().manual_seed(1)
    alphas = torch.linspace(0.99, 0.01, 100)
    noisy, student, teacher = (torch.randn(64, 3, 4, 4, generator=generator) for _ in range(3))
    timesteps = torch.randint(100, (64,), generator=generator)
    meter = ErrorMeter(alphas, prediction_type)
    meter.update(student[:40], teacher[:40], timesteps[:40])
    meter.update(student[40:], teacher[40:], timesteps[40:])
    found = meter.result()

    signal, noise = alphas[timesteps].sqrt().view(-1, 1, 1, 1), (1 - alphas[timesteps]).sqrt().view(-1, 1, 1, 1)
    clean = {
        "epsilon": lambda p: (noisy - noise * p) / signal,
        "v_prediction": lambda p: signal * noisy - noise * p,
        "sample": lambda p: p,
    }[prediction_type]
    errors = (clean(student) - clean(teacher)).square().mean(dim=(1, 2, 3)).numpy()
    bins = timesteps.numpy() // (100 // BINS)
    present = sorted(set(bins))
    assert found.timesteps == [(b + 0.5) * 100 / BINS for b in present]
    np.testing.assert_allclose(found.errors, [errors[bins == b].mean() for b in present], rtol=1e-4)


def test_the_curve_is_kept(tmp_path):
    errors = TimestepErrors([1.0, 2.0], [0.5, 0.25])
    errors.save(tmp_path / "errors.json")
    assert TimestepErrors.load(tmp_path / "errors.json") == errors
