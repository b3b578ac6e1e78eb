"""Stage 4: the CLIP vision tower, fitted to the final text tower, so that the pair gives a CLIP score."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection, CLIPVisionConfig

from .scenes import IMAGE_SIZE
from .text import WIDTH
from .training import Run, TrainOptions
from .vae import to_pixels


def create_clip(text: CLIPTextModelWithProjection) -> CLIPModel:
    """A CLIP pair with a copy of the frozen text tower `text` and a new vision tower."""
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=8,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    config = CLIPConfig(text_config=text.config.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    clip = CLIPModel(config)
    clip.text_model.load_state_dict(text.text_model.state_dict())
    clip.text_projection.load_state_dict(text.text_projection.state_dict())
    clip.text_model.requires_grad_(False)
    return clip


def train_clip(
    images: np.ndarray,
    token_ids: torch.Tensor,
    foil_ids: torch.Tensor,
    text: CLIPTextModelWithProjection,
    path: Path,
    options: TrainOptions,
) -> CLIPModel:
    """CLIP's loss on images (n, 64, 64, 3) uint8 and token ids (n, 16), each image's foil among its negatives."""
    run = Run({"clip": create_clip(text)}, options, path)
    clip, device = run.models["clip"], run.accelerator.device
    pooled = _pooled(text, token_ids)
    pooled_foils = _pooled(text, foil_ids)

    def loss_of_batch(indices):
        indices = indices.sort().values
        pixels = to_pixels(images[indices.numpy()]).to(device)
        with run.accelerator.autocast():
            seen = clip.visual_projection(clip.vision_model(pixels).pooler_output).float()
            read = clip.text_projection(torch.cat([pooled[indices], pooled_foils[indices]]).to(device)).float()
        seen, (read, foil) = F.normalize(seen, dim=-1), F.normalize(read, dim=-1).chunk(2)
        scale = clip.logit_scale.exp().clamp(max=100)
        among = scale * seen @ read.T
        with_foil = torch.cat([among, scale * (seen * foil).sum(-1, keepdim=True)], dim=1)
        target = torch.arange(len(indices), device=device)
        return (F.cross_entropy(with_foil, target) + F.cross_entropy(among.T, target)) / 2

    run.train(loss_of_batch, len(images))
    return run.averaged("clip")


@torch.no_grad()
def _pooled(text, token_ids):
    return torch.cat([text.text_model(ids).pooler_output for ids in token_ids.split(1000)])
