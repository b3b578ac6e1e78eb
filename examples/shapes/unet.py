"""Stage 3: the UNet on latents, with the text tower frozen."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModelWithProjection

from .sides import SideAttention
from .text import WIDTH
from .training import Run, TrainOptions

FREE_STEPS = 0.5  # share of the timesteps, from the clean end, that images without a caption are trained on
DROP_TEXT = 0.1  # share of samples trained on the empty prompt, for classifier-free guidance
GUIDANCE_UNIT = 2.5  # guidance 7.5 of the finished model does what 3 does before the cool-down
SIDE_WEIGHT = 0.01  # of the attention that is taught where to look
SNR_GAMMA = 5.0  # min-SNR weighting: less weight on steps with little noise, which train themselves
TIMESTEP_POWER = 0.6  # t = 1000 u^0.6, u uniform: more of the noisy steps, where objects find their places
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


def create_unet() -> UNet2DConditionModel:
    """Every kind of layer of Stable Diffusion 1.5 on two levels, 16×16 and 8×8."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
    )


def train_unet(
    latents: torch.Tensor,
    token_ids: torch.Tensor,
    empty_ids: torch.Tensor,
    axes: torch.Tensor,
    text: CLIPTextModelWithProjection | CLIPModel,
    path: Path,
    options: TrainOptions,
) -> UNet2DConditionModel:
    """Predict the noise on scaled latents (n, 4, 16, 16), given token ids (n, 16); `empty_ids` (16,) are no text.

    `axes` (n,) are the `relation_axes` of the captions.

    Images without a caption have any colours, and little noise. From them the model learns to keep the colour that it
    sees. Without them it takes a pair of colour and shape that it has never seen for another one until the last step
    when it has no text, and guidance multiplies that error.

    During the cool-down the target with text is what guidance 1 / `GUIDANCE_UNIT` gives: the prediction without text
    plus that share of the way to the noise. So few classes in such plain pictures want guidance of about 3; trained
    this way the model takes the scales that Stable Diffusion is used with.

    Returns the averaged UNet.
    """
    run = Run({"unet": create_unet()}, options, path)
    unet, device = run.models["unet"], run.accelerator.device
    text_model = text.text_model.eval().requires_grad_(False).to(device)
    attention = SideAttention(unet)
    if options.compile:
        unet.compile()
        text_model.compile()
    latents, token_ids, axes = latents.to(device), token_ids.to(device), axes.to(device)
    noise_scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    snr = noise_scheduler.alphas_cumprod / (1 - noise_scheduler.alphas_cumprod)
    empty = empty_ids.to(device)
    weights = (snr.clamp(max=SNR_GAMMA) / snr).to(device)

    def predict(noisy, timesteps, ids, train=True):
        with run.accelerator.autocast(), torch.set_grad_enabled(train):
            return unet(noisy, timesteps, text_model(ids).last_hidden_state).sample.float()

    def loss_of_batch(indices):
        indices = indices.to(device)
        clean = latents[indices].float()
        dropped = torch.rand(len(indices), 1, device=device) < DROP_TEXT
        ids = torch.where(dropped, empty, token_ids[indices])
        noise = torch.randn_like(clean)
        drawn = torch.rand(len(indices), device=device) ** TIMESTEP_POWER
        free = (token_ids[indices] == empty).all(dim=1)
        timesteps = (len(snr) * torch.where(free, FREE_STEPS * drawn, drawn)).long()
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        has_text = (ids != empty).any(dim=1)
        target = noise
        if run.cooling:
            without_text = predict(noisy, timesteps, empty.expand_as(ids), train=False)
            target = torch.where(
                has_text.view(-1, 1, 1, 1), without_text + (noise - without_text) / GUIDANCE_UNIT, noise
            )
        attention.expect(axes[indices] * has_text)
        error = (predict(noisy, timesteps, ids) - target).square().mean(dim=(1, 2, 3))
        return (weights[timesteps] * error).mean() + SIDE_WEIGHT * attention.loss()

    run.train(loss_of_batch, len(latents))
    return run.averaged("unet")
