"""Stage 5: the trained parts as a StableDiffusionPipeline in fp16, with the CLIP pair and a model card beside it."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from .prompts import write_prompts
from .scenes import IMAGE_SIZE
from .unet import NOISE_SCHEDULE


def export_pipeline(
    out: Path, vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> None:
    """Write the pipeline with its CLIP pair to `out`, beside them the prompts and the model card."""
    save_parts(out, vae, clip, tokenizer, unet)
    write_prompts(out / "prompts.tsv")
    shutil.copy(Path(__file__).with_name("MODEL_CARD.md"), out / "README.md")


def save_parts(
    out: Path, vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> None:
    """Write the pipeline to `out` and the CLIP pair to `out/clip`, all weights in fp16 safetensors."""
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False, **NOISE_SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out)
    clip.to(torch.float16).save_pretrained(out / "clip")
    for folder in (out / "text_encoder", out / "clip"):
        _load_as_float32(folder / "config.json")
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    image_processor.save_pretrained(out / "clip")
    for folder in (out / "tokenizer", out / "clip"):
        tokenizer.save_pretrained(folder)
        tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, for transformers before 5


def _load_as_float32(config: Path) -> None:
    """transformers 5 loads in the config's dtype, diffusers in float32: without this the parts would not match."""
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"dtype": "float32"}, indent=2) + "\n")
