import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_bitsfusion.training.batches import ImageBatches, Sharing, sample_at
from diffusers_bitsfusion.training.images import ArrayImages, TrainingImages
from diffusers_bitsfusion.training.prompt_embeddings import TextEncoder
from diffusers_bitsfusion.utils.timesteps import TimestepDistribution

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(parts, image_folder):
    def make(sharing, prediction_type="epsilon", **changes):
        scheduler = DDPMScheduler.from_config(parts.scheduler.config, prediction_type=prediction_type)
        batches = ImageBatches(
            TrainingImages(ArrayImages(image_folder), 16),
            parts.vae,
            TextEncoder(parts.tokenizer, parts.text_encoder),
            scheduler,
            TimestepDistribution.beta(1000),
            sharing,
            **({"seed": 3} | changes),
        )
        batches.start(0)
        return batches

    return make


def next_batches(batches, count):
    """Samples by position: caption, noisy latents, timestep, states and target."""
    samples = {}
    for _ in range(count):
        b = batches.next()
        rows = zip(b.positions, b.captions, b.noisy, b.timesteps, b.states, b.target, strict=True)
        samples |= {position: rest for position, *rest in rows}
    return samples


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for position, (caption, *tensors) in found.items():
        other, *others = expected[position]
        assert caption == other
        torch.testing.assert_close(tensors, others, rtol=1e-5, atol=1e-5)


def test_samples_are_the_same_however_they_are_shared_out(make):
    alone = next_batches(make(Sharing(4)), 2)
    assert sorted(alone) == list(range(8))
    accumulated = next_batches(make(Sharing(2, accumulation=2)), 4)
    two = [next_batches(make(Sharing(1, accumulation=2, processes=2, index=index)), 4) for index in (0, 1)]
    assert_equal(accumulated, alone)
    assert_equal(two[0] | two[1], alone)
    assert not two[0].keys() & two[1].keys()


def test_any_step_can_be_started_from(make):
    batches = make(Sharing(2))
    expected = next_batches(batches, 4)
    batches.start(2)
    again = next_batches(batches, 2)
    assert_equal(again, {position: expected[position] for position in range(4, 8)})


def test_workers_change_nothing(make):
    assert_equal(next_batches(make(Sharing(2), num_workers=1), 2), next_batches(make(Sharing(2)), 2))


def test_an_epoch_has_every_sample_once_in_a_new_order():
    epochs = [[sample_at(5, epoch * 50 + place, 50) for place in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [sample_at(6, place, 50) for place in range(50)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noise_is_added_and_the_target_fits_it(make, parts, image_folder, prediction_type):
    batches = make(Sharing(7), prediction_type)
    batch = batches.next()
    alphas = torch.tensor(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2), dtype=torch.float32)
    alpha = alphas[batch.timesteps].view(-1, 1, 1, 1)
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    # From the noisy latents and the target the clean ones follow, and those are what the VAE's mean is near to.
    clean = {
        "epsilon": lambda: (batch.noisy - noise * batch.target) / signal,
        "v_prediction": lambda: signal * batch.noisy - noise * batch.target,
        "sample": lambda: batch.target,
    }[prediction_type]()
    source = ArrayImages(image_folder)
    images = [source.images[source.captions.index(caption)] for caption in batch.captions]
    pixels = torch.from_numpy(np.stack(images) / 127.5 - 1).permute(0, 3, 1, 2).float()
    latents = parts.vae.encode(pixels).latent_dist
    standard = (clean / parts.vae.config.scaling_factor - latents.mean) / latents.std
    assert abs(float(standard.mean())) < 0.1 and float(standard.std()) == pytest.approx(1, abs=0.1)


def test_noise_is_normal_and_independent(make):
    batches = make(Sharing(7), "epsilon")
    noise = torch.cat([batches.next().target for _ in range(3)]).flatten(1)
    assert abs(float(noise.mean())) < 0.02 and float(noise.std()) == pytest.approx(1, abs=0.02)
    correlations = torch.corrcoef(noise) - torch.eye(len(noise))
    assert float(correlations.abs().max()) < 0.3


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_text_is_dropped_in_that_share(make, parts, share):
    batches = make(Sharing(7), text_dropout=share)
    text = TextEncoder(parts.tokenizer, parts.text_encoder)
    empty, count, seen = text.encode([""])[0], 0, 0
    for _ in range(4):
        batch = batches.next()
        full = text.encode(batch.captions)
        for state, own in zip(batch.states, full, strict=True):
            is_empty = torch.allclose(state, empty, atol=1e-5)
            assert is_empty or torch.allclose(state, own, atol=1e-5)
            count, seen = count + is_empty, seen + 1
    assert count / seen == share if share in (0, 1) else 0.2 < count / seen < 0.8


def test_text_states_are_the_pipelines(parts):
    expected, empty = parts.encode_prompt("a b", "cpu", 1, do_classifier_free_guidance=True)
    text = TextEncoder(parts.tokenizer, parts.text_encoder)
    found = text.encode(["a b", "a b"], dropped=torch.tensor([False, True]))
    torch.testing.assert_close(found, torch.cat([expected, empty]), rtol=1e-5, atol=1e-5)
