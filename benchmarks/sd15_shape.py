"""UNets of the shape of Stable Diffusion 1.5 and SDXL with random weights, for measurements that need no download.

    python -m benchmarks.sd15_shape DIR [--shape sd15|sdxl]

Every weight and bias of a Linear or Conv2d is drawn from N(0, 0.02²): diffusers' own initialisation is uniform,
which is neither what trained weights look like nor a distribution whose quantized codes have entropy to gain.
"""

import argparse
import os
import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

SD15_UNET_CONFIG = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL_UNET_CONFIG = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY_UNET_CONFIG = {  # of no real model: for dry runs
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (64, 256),  # enough that the default config reaches its bits
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
SHAPES = {"sd15": SD15_UNET_CONFIG, "sdxl": SDXL_UNET_CONFIG, "tiny": TINY_UNET_CONFIG}
WEIGHT_STD = 0.02
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def random_unet(seed: int = 0, shape: str = "sd15") -> UNet2DConditionModel:
    """The UNet in fp16; no fp32 copy of more than one tensor ever exists."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SHAPES[shape])
    unet = unet.half().to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module in unet.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            for parameter in module.parameters(recurse=False):
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, WEIGHT_STD, generator=generator))
        elif next(module.parameters(recurse=False), None) is not None:
            module.reset_parameters()
    return unet


def build(path: str | os.PathLike[str], seed: int = 0, shape: str = "sd15") -> Path:
    """Save the UNet under `path` unless it is there already; a directory appears only when it is complete."""
    path = Path(path)
    if (path / WEIGHTS_FILE).exists():
        return path
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    random_unet(seed, shape).save_pretrained(partial, max_shard_size="100GB")
    partial.replace(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Save a random UNet of a real one's shape in fp16.")
    parser.add_argument("path", type=Path, help="directory to write; reused when it is complete")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape", choices=SHAPES, default="sd15")
    arguments = parser.parse_args()
    print(build(arguments.path, arguments.seed, arguments.shape))


if __name__ == "__main__":
    main()
