"""Stage 1: the autoencoder, 64×64 images to 16×16 latents of four channels, and the training set's latents."""

from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from .scenes import IMAGE_SIZE
from .training import Run, TrainOptions

LATENT_SHAPE = (4, 16, 16)
KL_WEIGHT = 1e-3  # enough noise on the latents that the decoder forgives the UNet small errors
LATENT_NOISE = 0.05  # relative to the latents' standard deviation, where the decoder is refined


def create_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        latent_channels=LATENT_SHAPE[0],
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """(n, h, w, 3) uint8 to (n, 3, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> np.ndarray:
    """(n, 3, h, w) in [-1, 1] to (n, h, w, 3) uint8."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def train_vae(images: np.ndarray, path: Path, options: TrainOptions) -> AutoencoderKL:
    """Train on images (n, 64, 64, 3) uint8; returns the averaged model with its `scaling_factor` measured."""
    run = Run({"vae": create_vae()}, options, path)
    vae = run.models["vae"]

    def loss_of_batch(indices):
        pixels = to_pixels(images[indices.sort().values.numpy()]).to(vae.device)
        with run.accelerator.autocast():
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        error = decoded - pixels
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * kl

    run.train(loss_of_batch, len(images))
    vae = run.averaged("vae")
    sample = encode(vae, images[:2048])
    vae.register_to_config(scaling_factor=1 / sample.std().item())
    return vae


def refine_decoder(
    vae: AutoencoderKL, images: np.ndarray, latents: np.ndarray, path: Path, options: TrainOptions
) -> AutoencoderKL:
    """Train the decoder alone on stored latents (n, 4, 16, 16) with a little noise, as the UNet's errors are.

    The encoder stays, so the latents and a UNet trained on them stay valid.
    """
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    run = Run({"vae": vae}, options, path)

    def loss_of_batch(indices):
        indices = indices.sort().values.numpy()
        pixels = to_pixels(images[indices]).to(vae.device)
        scaled = torch.from_numpy(latents[indices]).float().to(vae.device)
        scaled = scaled + LATENT_NOISE * torch.randn_like(scaled)
        with run.accelerator.autocast():
            error = vae.decode(scaled / vae.config.scaling_factor).sample.float() - pixels
        return error.abs().mean() + error.square().mean()

    run.train(loss_of_batch, len(images))
    return run.averaged("vae")


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """Means of the latents (n, 4, 16, 16) float32 of images (n, 64, 64, 3) uint8."""
    return vae.encode(to_pixels(images).to(vae.device)).latent_dist.mean.float().cpu()


def store_latents(vae: AutoencoderKL, images: np.ndarray, path: Path, batch_size: int = 128) -> None:
    """Write the scaled latents of all images to `path`, (n, 4, 16, 16) float16; the processes share the work."""
    state = PartialState()
    if state.is_main_process:
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(len(images), *LATENT_SHAPE)).flush()
    state.wait_for_everyone()
    latents = np.load(path, mmap_mode="r+")
    with state.split_between_processes(list(range(0, len(images), batch_size))) as starts:
        for start in tqdm(starts, desc="latents", mininterval=10, disable=not state.is_main_process):
            batch = slice(start, start + batch_size)
            latents[batch] = (encode(vae, images[batch]) * vae.config.scaling_factor).numpy()
    latents.flush()
    state.wait_for_everyone()


@torch.no_grad()
def round_trip(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Images (n, 64, 64, 3) uint8 encoded and decoded again."""
    return np.concatenate(
        [
            to_images(vae.decode(encode(vae, images[start : start + batch_size]).to(vae.device)).sample)
            for start in range(0, len(images), batch_size)
        ]
    )
