"""The CLIP pair, both towers trained together on the emoji and their names."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer

from ..shapes.clip import create_clip
from ..shapes.text import create_text_model
from ..shapes.training import Run, TrainOptions
from ..shapes.vae import to_pixels

MAX_SHIFT = 4  # Pixels that a picture is moved by, in each direction, so that the pair learns what it shows.
NOISE = 0.1  # Standard deviation of the pixels' noise, of values in [-1, 1].


def train_clip(
    images: np.ndarray, token_ids: torch.Tensor, tokenizer: CLIPTokenizer, path: Path, options: TrainOptions
) -> CLIPModel:
    """Minimise CLIP's loss (arXiv 2103.00020) on images (n, 64, 64, 3) uint8 and token ids (n, 16).

    Unlike the shapes' text tower, which learns from captions alone, this one learns from the pictures: nothing but
    them tells which of the names' words look alike. Return the averaged pair.
    """
    clip = create_clip(create_text_model(tokenizer)).requires_grad_(True)
    run = Run({"clip": clip}, options, path)
    clip, device = run.models["clip"], run.accelerator.device
    pixels = to_pixels(images).to(device)

    def loss_of_batch(indices: torch.Tensor) -> torch.Tensor:
        indices = indices.unique()  # A picture twice would be its own wrong answer.
        moved = torch.roll(pixels[indices], torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2,)).tolist(), dims=(2, 3))
        seen = clip.visual_projection(clip.vision_model(moved + NOISE * torch.randn_like(moved)).pooler_output)
        read = clip.text_projection(clip.text_model(token_ids[indices].to(device)).pooler_output)
        scale = clip.logit_scale.exp().clamp(max=100)
        among = scale * F.normalize(seen, dim=-1) @ F.normalize(read, dim=-1).T
        target = torch.arange(len(indices), device=device)
        return (F.cross_entropy(among, target) + F.cross_entropy(among.T, target)) / 2

    run.train(loss_of_batch, len(images))
    return run.averaged("clip")
