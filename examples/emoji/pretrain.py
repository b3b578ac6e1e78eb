"""Trains a small Stable Diffusion pipeline from scratch on the emoji.

    python -m examples.emoji.pretrain --work-dir runs/emoji --out examples/emoji/pipeline

Stages, each of which needs those before it: `vae`, `decoder`, `clip`, `unet`, `export`. Models, training loop and
losses are those of `examples.shapes`; a run that was stopped goes on with `--resume`.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPModel, CLIPTokenizer

from ..shapes.export import save_parts
from ..shapes.text import create_tokenizer, tokenize
from ..shapes.training import TrainOptions, add_options, with_options
from ..shapes.unet import train_unet
from ..shapes.vae import refine_decoder, store_latents, train_vae
from .clip import train_clip
from .data import load
from .prompts import write_prompts

STAGES = ("vae", "decoder", "clip", "unet", "export")
DEFAULTS = {
    "vae": TrainOptions(steps=3000, learning_rate=2e-3, batch_size=16, cooldown=1000),
    "decoder": TrainOptions(steps=1000, learning_rate=1e-3, batch_size=16, cooldown=600),
    "clip": TrainOptions(steps=1200, learning_rate=1e-3, batch_size=96, cooldown=400),
    "unet": TrainOptions(steps=12_000, learning_rate=1e-3, batch_size=32, cooldown=2000, warmup=300, ema_decay=0.998),
}


def training_set() -> tuple[np.ndarray, list[str]]:
    """Return what training may see: pictures (n, 64, 64, 3) uint8 and their names."""
    images, emojis = load()
    seen = [index for index, emoji in enumerate(emojis) if not emoji.heldout]
    return np.ascontiguousarray(images[seen]), [emojis[index].name for index in seen]


def run_vae(work: Path, options: TrainOptions) -> None:
    images, _ = training_set()
    # The mirrored pictures double what the autoencoder sees; names tell left from right, so the UNet sees none.
    vae = train_vae(np.concatenate([images, images[:, :, ::-1]]), work / "vae.pt", options)
    vae.save_pretrained(work / "vae")
    store_latents(vae, images, work / "latents.npy")


def run_decoder(work: Path, options: TrainOptions) -> None:
    vae = AutoencoderKL.from_pretrained(work / "vae")
    images, _ = training_set()
    refine_decoder(vae, images, np.load(work / "latents.npy"), work / "decoder.pt", options)
    vae.save_pretrained(work / "vae_final")


def run_clip(work: Path, options: TrainOptions) -> None:
    images, names = training_set()
    # The words of held-out names all occur in others: the tokenizer learns nothing from them.
    tokenizer = create_tokenizer(names)
    clip = train_clip(images, tokenize(tokenizer, names), tokenizer, work / "clip.pt", options)
    tokenizer.save_pretrained(work / "tokenizer")
    clip.save_pretrained(work / "clip")


def run_unet(work: Path, options: TrainOptions) -> None:
    _, names = training_set()
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    unet = train_unet(
        latents=torch.from_numpy(np.load(work / "latents.npy")),
        token_ids=tokenize(tokenizer, names),
        empty_ids=tokenize(tokenizer, [""])[0],
        axes=torch.zeros(len(names), dtype=torch.int64),  # No name tells of a relation.
        text=CLIPModel.from_pretrained(work / "clip"),
        path=work / "unet.pt",
        options=options,
    )
    unet.save_pretrained(work / "unet")


def run_export(work: Path, out: Path) -> None:
    save_parts(
        out,
        vae=AutoencoderKL.from_pretrained(work / "vae_final"),
        clip=CLIPModel.from_pretrained(work / "clip"),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / "unet"),
    )
    write_prompts(out / "prompts.tsv")
    shutil.copy(Path(__file__).with_name("MODEL_CARD.md"), out / "README.md")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoints and trained parts")
    parser.add_argument("--out", type=Path, default=Path("pipeline"), help="where `export` writes the pipeline")
    add_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    runs = {"vae": run_vae, "decoder": run_decoder, "clip": run_clip, "unet": run_unet}
    for stage in STAGES if args.stage == "all" else (args.stage,):
        if stage == "export":
            run_export(args.work_dir, args.out)
            continue
        options = with_options(DEFAULTS[stage], args)
        torch.manual_seed(options.seed)
        runs[stage](args.work_dir, options)


if __name__ == "__main__":
    main()
