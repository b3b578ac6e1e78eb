"""A pipeline small enough to analyse in full, with a layer that gives nothing, and analyses of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import tiny_pipeline

from diffusers_bitsfusion.analysis.header import Header, LayerCost
from diffusers_bitsfusion.analysis.results import Analysis
from diffusers_bitsfusion.analysis.sensitivity import analyze
from diffusers_bitsfusion.analysis.study import Settings
from diffusers_bitsfusion.evaluation import Sampling

DEAD = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
CAPTIONS = ["ab", "c", "d"]
SETTINGS = Settings(qat_steps=1, calls=4, sampling=Sampling(steps=2, batch_size=2))
ONE_LEVEL = {
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
}


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory, clip_folder) -> Path:
    """A pipeline of 24 layers with a CLIP beside it; the weights of `DEAD` are 0."""
    folder = tmp_path_factory.mktemp("small")
    pipe = tiny_pipeline(tmp_path_factory.mktemp("tokenizer"), **ONE_LEVEL)
    pipe.unet.get_submodule(DEAD).weight.data.zero_()
    pipe.save_pretrained(folder)
    shutil.copytree(clip_folder, folder / "clip")
    (folder / "prompts.tsv").write_text("Prompt\n" + "".join(f"{caption}\n" for caption in CAPTIONS))
    return folder


@pytest.fixture
def small_pipe(small_folder) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(small_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.requires_grad_(False)
    return pipe


@pytest.fixture(scope="session")
def run_analysis(small_folder, tmp_path_factory):
    """Analyses the small pipeline with any argument changed, on one thread."""

    def run(out: Path | None = None, **changes) -> Analysis:
        arguments = {"captions": CAPTIONS, "settings": SETTINGS, "progress": False} | changes
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return analyze(small_folder, out or tmp_path_factory.mktemp("analysis"), **arguments)
        finally:
            torch.set_num_threads(threads)

    return run


@pytest.fixture(scope="session")
def full(run_analysis) -> Analysis:
    return run_analysis()


@pytest.fixture(scope="session")
def target_of(full):
    """The paper's average bits that go with an average over the recipe's layers: here the others outweigh them."""
    return lambda bits: (bits * sum(full.sizes.values()) + full.header.fixed_bits) / full.header.weights


@pytest.fixture(scope="session")
def estimates(run_analysis) -> dict[str, Analysis]:
    methods = ("calibrated", "prediction", "gradient", "output", "weight")
    return {name: run_analysis(method=name) for name in methods}


@pytest.fixture
def make_analysis():
    """An analysis of given sensitivities: layer to (weights, sensitivity at 1, 2, 3 bits)."""

    def make(layers: dict[str, tuple[int, tuple[float, ...]]], clip_drop: dict[str, float] | None = None) -> Analysis:
        costs = {
            name: LayerCost(
                (weights,),
                tuple(int(weights * bits / 8) for bits in (1.54, 2.18, 2.90, 3.68, 4.49, 5.31, 6.18)),
                tuple(weights * error for error in (0.19, 0.082, 0.031, 0.0104, 0.0033, 0.001, 0.0003)),
            )
            for name, (weights, _) in layers.items()
        }
        metrics = ("mse",) if clip_drop is None else ("mse", "clip_drop")
        header = Header(
            method="full",
            metrics=metrics,
            bits=(1, 2, 3),
            model={"class": "UNet2DConditionModel", "fingerprint": "0" * 64},
            layers=costs,
            fixed_bits=0.0,
            weights=sum(weights for weights, _ in layers.values()),
            settings={},
            versions={"torch": torch.__version__},
            run="r",
        )
        records = {}
        for name, bits in header.items:
            record = {"mse": layers[name][1][bits - 1]}
            records[name, bits] = record | ({} if clip_drop is None else {"clip_drop": clip_drop[name]})
        return Analysis(header, records)

    return make
