"""Trains a small Stable Diffusion pipeline from scratch on captioned scenes of coloured shapes.

    python -m examples.shapes.pretrain --work-dir runs/shapes --out pipeline --stage all

Stages, each of which needs those before it: `vae`, `decoder`, `text`, `unet`, `clip`, `export`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from .clip import train_clip
from .dataset import build_dataset, load_dataset
from .export import export_pipeline
from .sides import relation_axes
from .text import create_tokenizer, tokenize, train_text
from .training import TrainOptions, add_options, with_options
from .unet import train_unet
from .vae import refine_decoder, store_latents, train_vae

STAGES = ("vae", "decoder", "text", "unet", "clip", "export")
DEFAULTS = {
    "vae": TrainOptions(steps=1600, learning_rate=2e-3, batch_size=32, cooldown=600),
    "decoder": TrainOptions(steps=600, learning_rate=1e-3, batch_size=32, cooldown=400),
    "text": TrainOptions(steps=1000, learning_rate=1e-3, batch_size=128, cooldown=400),
    "unet": TrainOptions(steps=30_000, learning_rate=1e-3, batch_size=32, cooldown=6000, warmup=500, ema_decay=0.998),
    "clip": TrainOptions(steps=1500, learning_rate=1e-3, batch_size=64, cooldown=500),
}


def run_vae(work: Path, options: TrainOptions) -> None:
    images = load_dataset(work / "data")[0]
    vae = train_vae(images, work / "vae.pt", options)
    if PartialState().is_main_process:
        vae.save_pretrained(work / "vae")
    store_latents(vae, images, work / "latents.npy")


def run_decoder(work: Path, options: TrainOptions) -> None:
    vae = refine_decoder(
        AutoencoderKL.from_pretrained(work / "vae"),
        images=load_dataset(work / "data")[0],
        latents=np.load(work / "latents.npy", mmap_mode="r"),
        path=work / "decoder.pt",
        options=options,
    )
    if PartialState().is_main_process:
        vae.save_pretrained(work / "vae_final")


def run_text(work: Path, options: TrainOptions) -> None:
    captions = [caption for caption in load_dataset(work / "data")[1] if caption]
    tokenizer = create_tokenizer(captions)
    text = train_text(tokenizer, len(captions), work / "text.pt", options)
    if PartialState().is_main_process:
        tokenizer.save_pretrained(work / "tokenizer")
        text.save_pretrained(work / "text")


def run_unet(work: Path, options: TrainOptions) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    captions = load_dataset(work / "data")[1]
    unet = train_unet(
        latents=torch.from_numpy(np.load(work / "latents.npy")),
        token_ids=tokenize(tokenizer, captions),
        empty_ids=tokenize(tokenizer, [""])[0],
        axes=relation_axes(captions),
        text=CLIPTextModelWithProjection.from_pretrained(work / "text"),
        path=work / "unet.pt",
        options=options,
    )
    if PartialState().is_main_process:
        unet.save_pretrained(work / "unet")


def run_clip(work: Path, options: TrainOptions) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    images, captions, foils = load_dataset(work / "data")
    captioned = captions.index("") if "" in captions else len(captions)
    captions, foils = captions[:captioned], foils[:captioned]
    clip = train_clip(
        images=images[:captioned],
        token_ids=tokenize(tokenizer, captions),
        foil_ids=tokenize(tokenizer, foils),
        text=CLIPTextModelWithProjection.from_pretrained(work / "text"),
        path=work / "clip.pt",
        options=options,
    )
    if PartialState().is_main_process:
        clip.save_pretrained(work / "clip")


def run_export(work: Path, out: Path) -> None:
    if PartialState().is_main_process:
        export_pipeline(
            out,
            vae=AutoencoderKL.from_pretrained(work / "vae_final"),
            clip=CLIPModel.from_pretrained(work / "clip"),
            tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
            unet=UNet2DConditionModel.from_pretrained(work / "unet"),
        )


def make_data(folder: Path, images: int | None) -> None:
    """Make the training set once.

    Raises:
        ValueError: there is one of another size.
    """
    if not (folder / "captions.json").exists():
        build_dataset(folder, 120_000 if images is None else images)
        return
    found = len(np.load(folder / "images.npy", mmap_mode="r"))
    if images not in (None, found):
        raise ValueError(f"{folder} holds {found} images, not {images}. Choose another --work-dir.")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("data", *STAGES, "all"), default="all", help="data: make the set; end")
    parser.add_argument("--work-dir", type=Path, required=True, help="training set, checkpoints, trained parts")
    parser.add_argument("--out", type=Path, default=Path("pipeline"), help="where `export` writes the pipeline")
    parser.add_argument("--images", type=int, help="size of the training set, made once; default: 120,000")
    add_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.is_main_process:
        make_data(args.work_dir / "data", args.images)
    state.wait_for_everyone()
    if args.stage == "data":
        return
    runs = {"vae": run_vae, "decoder": run_decoder, "text": run_text, "unet": run_unet, "clip": run_clip}
    for stage in STAGES if args.stage == "all" else (args.stage,):
        if stage == "export":
            run_export(args.work_dir, args.out)
        else:
            options = with_options(DEFAULTS[stage], args)
            torch.manual_seed(options.seed)  # all processes start from the same weights
            runs[stage](args.work_dir, options)
        state.wait_for_everyone()


if __name__ == "__main__":
    main()
