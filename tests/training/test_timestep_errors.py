import numpy as np
import pytest
import torch

from diffusers_bitsfusion.training.timestep_errors import BINS, ErrorMeter, TimestepErrors


def test_proportional_to_measured_errors():
    errors = TimestepErrors([25.0, 75.0], [1.0, 3.0])
    distribution = errors.distribution(100)
    ratio = distribution.probabilities[90] / distribution.probabilities[10]
    assert ratio == pytest.approx(3) and distribution.probabilities.sum() == pytest.approx(1)
    middle = distribution.probabilities[50] / distribution.probabilities[10]
    assert middle == pytest.approx(1 + 2 * (50.5 - 25) / 50)


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
