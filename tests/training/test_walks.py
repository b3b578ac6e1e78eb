import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from diffusers_bitsfusion.timesteps import TimestepDistribution
from diffusers_bitsfusion.training.batches import Sharing
from diffusers_bitsfusion.training.text import TextEncoder
from diffusers_bitsfusion.training.walks import WalkBatches

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (4, 3, 3)


class Oracle(nn.Module):
    """A teacher that knows where every walk must end: at the number that its text states hold."""

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

    def encode(self, captions):
        return torch.tensor([[[float(caption)]] for caption in captions])

    def replace_by_empty(self, states, dropped):
        return torch.where(dropped.view(-1, 1, 1), -1.0, states)


def make(sharing, prompts=("0.5",), kind="epsilon", distribution=None, **changes):
    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", prediction_type=kind)
    walks = WalkBatches(
        prompts,
        Oracle(scheduler),
        Numbers(),
        scheduler,
        distribution or TimestepDistribution.uniform(1000),
        sharing,
        SHAPE,
        **({"walk_steps": 6, "seed": 1} | changes),
    )
    walks.start(0)
    return walks


def step(walks):
    """One forward pass: train on the batch, then walk on."""
    batch = walks.next()
    (prediction,) = walks.teacher(batch.noisy, batch.timesteps, batch.states, return_dict=False)
    walks.advance(batch, prediction)
    return batch


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_walk_ends_where_the_teacher_leads(kind):
    walks = make(Sharing(1), kind=kind, guidance_scale=1.0, text_dropout=0.0)
    for _ in range(2):  # the first walk is cut to two steps
        step(walks)
    torch.testing.assert_close(walks.state()[0, 0], torch.full(SHAPE, 0.5), rtol=1e-3, atol=2e-3)
    for _ in range(6):
        step(walks)
    torch.testing.assert_close(walks.state()[0, 0], torch.full(SHAPE, 0.5), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("text_dropout", [0.0, 1.0])
def test_guidance_leads_away_from_the_empty_text_whichever_was_trained_on(text_dropout):
    walks = make(Sharing(1), kind="sample", guidance_scale=3.0, text_dropout=text_dropout)
    batches = [step(walks) for _ in range(2)]
    guided = -1 + 3.0 * (0.5 - -1)
    torch.testing.assert_close(walks.state()[0, 0], torch.full(SHAPE, guided), rtol=1e-4, atol=1e-4)
    assert all(float(batch.states) == (-1.0 if text_dropout else 0.5) for batch in batches)


def test_it_starts_from_unit_noise_at_the_last_timestep():
    batch = step(make(Sharing(200)))
    assert batch.timesteps.tolist() == [999] * 200
    assert float(batch.noisy.std()) == pytest.approx(1, abs=0.03) and abs(float(batch.noisy.mean())) < 0.03


def test_timesteps_are_visited_as_the_distribution_says():
    walk_steps, sharing = 12, Sharing(40)
    distribution = TimestepDistribution.beta(1000)
    walks = make(sharing, distribution=distribution, walk_steps=walk_steps)
    for _ in range(walk_steps):  # the first walks, which all begin at once
        step(walks)
    visited = torch.cat([step(walks).timesteps for _ in range(2 * walk_steps)])
    starts = visited == 999
    assert 1 / walk_steps <= float(starts.float().mean()) < 2 / walk_steps
    inner = visited[~starts].double() / 1000
    assert float(inner.mean()) == pytest.approx(3 / 4, abs=0.02)  # of Beta(3, 1)
    assert float(inner.var()) == pytest.approx(3 / 80, abs=0.005)


def test_later_batches_have_walks_at_every_stage():
    walks = make(Sharing(24), walk_steps=12)
    for _ in range(12):
        step(walks)
    timesteps = step(walks).timesteps
    assert int(timesteps.min()) < 150 and int(timesteps.max()) > 850 and len(timesteps.unique()) > 12


def test_walks_are_the_same_however_they_are_shared_out_and_go_on_from_their_state():
    prompts = [str(number) for number in range(9)]
    alone, shares = (
        make(Sharing(4), prompts),
        [make(Sharing(1, accumulation=2, processes=2, index=i), prompts) for i in (0, 1)],
    )
    for at in range(9):
        if at == 5:
            state = alone.state().clone()
            alone = make(Sharing(4), prompts)
            alone.load_state(state)
            alone.start(5)
        expected = step(alone)
        found = [step(share) for _ in range(2) for share in shares]
        assert [p for batch in found for p in batch.positions] == expected.positions
        assert [c for batch in found for c in batch.captions] == expected.captions
        for name in ("noisy", "timesteps", "states", "dropped"):
            together = torch.cat([getattr(batch, name) for batch in found])
            torch.testing.assert_close(together, getattr(expected, name))


def test_the_real_teacher_draws_what_its_pipeline_draws(parts):
    """Guidance and text as in `StableDiffusionPipeline`, at the walk's own timesteps."""
    scheduler = DDPMScheduler.from_config(parts.scheduler.config)
    walks = WalkBatches(
        ["a b"],
        parts.unet,
        TextEncoder(parts.tokenizer, parts.text_encoder),
        scheduler,
        TimestepDistribution.uniform(1000),
        Sharing(1),
        (4, 8, 8),
        walk_steps=4,
        guidance_scale=5.0,
    )
    walks.start(0)
    visited = [step(walks) for _ in range(2)]
    latents, alphas = visited[0].noisy, scheduler.alphas_cumprod
    conditional, empty = parts.encode_prompt("a b", "cpu", 1, do_classifier_free_guidance=True)
    steps = [*(int(batch.timesteps) for batch in visited), None]
    with torch.no_grad():
        for now, then in zip(steps, steps[1:], strict=False):
            given, without = (parts.unet(latents, now, states).sample for states in (conditional, empty))
            noise = without + 5.0 * (given - without)
            clean = (latents - (1 - alphas[now]).sqrt() * noise) / alphas[now].sqrt()
            alpha = torch.tensor(1.0) if then is None else alphas[then]
            latents = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(walks.state()[0], latents, rtol=1e-3, atol=1e-3)
