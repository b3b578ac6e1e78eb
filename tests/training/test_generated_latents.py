import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import nn

from diffusers_bitsfusion.training.batches import STREAM_SAMPLING, Sharing, generator_of
from diffusers_bitsfusion.training.generated_latents import GeneratedBatches
from diffusers_bitsfusion.training.prompt_embeddings import TextEncoder
from diffusers_bitsfusion.utils.timesteps import TimestepDistribution

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (4, 3, 3)


class Oracle(nn.Module):
    """A teacher that knows how every latent must end: with the number that its text states hold."""

    dtype = torch.float32

    def __init__(self, scheduler):
        super().__init__()
        self.alphas, self.kind = scheduler.alphas_cumprod, scheduler.config.prediction_type

    def forward(self, noisy, timesteps, states, return_dict):
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        clean = states[:, :1, :1, None].expand_as(noisy)
        noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        return ({"epsilon": noise, "sample": clean, "v_prediction": velocity}[self.kind],)


class Numbers:
    """A text encoder whose states of a prompt are the number that it spells, -1 for the empty text."""

    def encode(self, captions, dropped=None):
        states = torch.tensor([[[float(caption)]] for caption in captions])
        return states if dropped is None else self.replace_by_empty(states, dropped)

    def replace_by_empty(self, states, dropped):
        return torch.where(dropped.view(-1, 1, 1), -1.0, states)


@pytest.fixture
def make():
    def make(sharing, prompts=("0.5",), kind="epsilon", distribution=None, **changes):
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        scheduler = DDPMScheduler(**betas, prediction_type=kind)
        batches = GeneratedBatches(
            prompts,
            Oracle(scheduler),
            Numbers(),
            scheduler,
            distribution or TimestepDistribution.uniform(1000),
            sharing,
            SHAPE,
            **({"num_inference_steps": 4, "seed": 1} | changes),
        )
        batches.start(0)
        return batches

    return make


def clean(batches, batch):
    """The generated latents, computed from the noise that the model is to predict."""
    alpha = batches.scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    if batches.scheduler.config.prediction_type == "sample":
        return batch.target
    if batches.scheduler.config.prediction_type == "v_prediction":
        return alpha.sqrt() * batch.noisy - (1 - alpha).sqrt() * batch.target
    return (batch.noisy - (1 - alpha).sqrt() * batch.target) / alpha.sqrt()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_latent_is_what_the_teacher_leads_to_and_the_target_undoes_its_noise(make, kind):
    batches = make(Sharing(3), ["0.5", "-0.25", "2"], kind=kind, guidance_scale=1.0)
    batch = batches.next()
    expected = torch.tensor([float(caption) for caption in batch.captions]).view(-1, 1, 1, 1).expand(3, *SHAPE)
    torch.testing.assert_close(clean(batches, batch), expected, rtol=1e-3, atol=1e-3)
    assert sorted(batch.captions) == ["-0.25", "0.5", "2"]


@pytest.mark.parametrize("text_dropout", [0.0, 1.0])
def test_guidance_leads_away_from_the_empty_text_whatever_is_trained_on(make, text_dropout):
    batches = make(Sharing(1), kind="sample", guidance_scale=3.0, text_dropout=text_dropout)
    batch = batches.next()
    torch.testing.assert_close(batch.target, torch.full((1, *SHAPE), -1 + 3.0 * (0.5 - -1)))
    assert float(batch.states) == (-1.0 if text_dropout else 0.5)


def test_a_set_of_latents_serves_some_steps_with_new_noise_at_each(make):
    prompts = [str(number) for number in range(12)]
    batches = make(Sharing(2, accumulation=2), prompts, renewed_every=3)
    steps = [[batches.next(), batches.next()] for _ in range(7)]
    captions = [[caption for batch in step for caption in batch.captions] for step in steps]
    assert captions[0] == captions[1] == captions[2] and captions[3] == captions[4] == captions[5]
    assert len({*captions[0], *captions[3], *captions[6]}) == 12, "every prompt once before any twice"
    noise = torch.cat([batch.target for step in steps for batch in step]).flatten(1)
    assert len(noise.unique(dim=0)) == 28
    assert len(torch.cat([batch.timesteps for step in steps for batch in step]).unique()) > 20


def test_timesteps_are_those_of_the_distribution(make):
    batches = make(Sharing(500), distribution=TimestepDistribution.beta(1000))
    visited = torch.cat([batches.next().timesteps for _ in range(4)]).double() / 1000
    assert float(visited.mean()) == pytest.approx(3 / 4, abs=0.02)  # of Beta(3, 1)
    assert float(visited.var()) == pytest.approx(3 / 80, abs=0.005)


def test_batches_are_the_same_however_they_are_shared_out_and_go_on_from_any_step(make):
    prompts = [str(number) for number in range(9)]
    alone = make(Sharing(4), prompts, renewed_every=2)
    shares = [make(Sharing(1, accumulation=2, processes=2, index=i), prompts, renewed_every=2) for i in (0, 1)]
    for at in range(7):
        if at == 5:  # within a set
            alone = make(Sharing(4), prompts, renewed_every=2)
            alone.start(5)
        expected = alone.next()
        found = [share.next() for _ in range(2) for share in shares]
        assert [p for batch in found for p in batch.positions] == expected.positions
        assert [c for batch in found for c in batch.captions] == expected.captions
        for name in ("noisy", "timesteps", "states", "target"):
            together = torch.cat([getattr(batch, name) for batch in found])
            torch.testing.assert_close(together, getattr(expected, name))


def test_the_real_teacher_samples_what_its_pipeline_samples(parts):
    """Guidance and text as in `StableDiffusionPipeline`, noise as promised."""
    scheduler = DDPMScheduler.from_config(parts.scheduler.config)
    batches = GeneratedBatches(
        ["a b"],
        parts.unet,
        TextEncoder(parts.tokenizer, parts.text_encoder),
        scheduler,
        TimestepDistribution.uniform(1000),
        Sharing(1),
        (4, 8, 8),
        num_inference_steps=5,
        guidance_scale=5.0,
        seed=3,
    )
    batches.start(0)
    noise = torch.randn(1, 4, 8, 8, generator=generator_of(3, STREAM_SAMPLING, 0))
    parts.scheduler = DPMSolverMultistepScheduler.from_config(parts.scheduler.config, timestep_spacing="trailing")
    settings = {"num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "latent"}
    expected = parts("a b", latents=noise, **settings).images
    torch.testing.assert_close(clean(batches, batches.next()), expected, rtol=1e-3, atol=1e-3)
