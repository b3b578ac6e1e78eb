"""Fixtures of all tests: offline, quiet, tiny pipelines saved once, a fresh process."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from fresh_process import REPOSITORY, FreshProcess, flush_nothing
from hub_server import content
from hypothesis import settings
from tiny import tiny_pipeline, tiny_tokenizer, tiny_unet
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.native.library import native_library
from diffusers_bitsfusion.nn import packed
from diffusers_bitsfusion.ops import conv, linear, transforms

# The default of 1.99 needs wider models: here the layers outside the recipe weigh too much.
TARGET_BITS = 2.6

# The suite tries the same inputs in every run, so that a failure is of the change at hand; new ones are tried by
# `pytest --hypothesis-profile=default`.
settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")

flush_nothing()
logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny operations gain nothing from threads, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """Forget the compiled library before and after, for tests that change how it is found."""
    native_library.cache_clear()
    yield
    native_library.cache_clear()


@pytest.fixture(scope="session")
def make_config() -> Callable[..., BitsFusionConfig]:
    """A config whose target tiny models reach, with any argument changed."""

    def make(**changes) -> BitsFusionConfig:
        return BitsFusionConfig(**({"target_bits": TARGET_BITS} | changes))

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests first, so that at the end no process waits for another."""
    items.sort(key=lambda item: not item.path.name.startswith("test_train_"))


def pytest_collection_finish() -> None:
    """Spare the libraries' collections of garbage, half a second each, what was imported: it never becomes any."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Let the interpreter end as it always does: some modules count what is left of them."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory) -> Path:
    """An unquantized pipeline as `save_pretrained` wrote it."""
    folder = tmp_path_factory.mktemp("source")
    tiny_pipeline(tmp_path_factory.mktemp("tokenizer")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def packed_folders(tmp_path_factory, source_folder, make_config) -> dict[str, Path]:
    """Quantized pipelines as saved, by what became of the time embedding."""
    folders = {}
    for kind in ("keep", "table", "cache"):
        folders[kind] = tmp_path_factory.mktemp(f"packed-{kind}")
        pipe = StableDiffusionPipeline.from_pretrained(source_folder)
        quantize_model(pipe, make_config(time_embedding=kind), progress=False).save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIP of random weights on 16×16 images, as `save_pretrained` wrote it."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_tokenizer(folder)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": 0}
    text = tower | special | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = tower | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def call_unet() -> Callable[..., Tensor]:
    """The output of a UNet on fixed random inputs, at a timestep that every time embedding has."""

    def call(unet: nn.Module, timestep: float = 501) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        sample = torch.randn(2, unet.config.in_channels, 8, 8, generator=generator)
        states = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)
        with torch.no_grad():
            return unet(sample.to(unet.dtype), timestep, states.to(unet.dtype)).sample

    return call


@pytest.fixture(scope="session")
def quantized_once(make_config) -> tuple[UNet2DConditionModel, Tensor]:
    """A quantized UNet that no test changes, and the state of the random numbers after it was made."""
    return quantize_model(tiny_unet(), make_config(), progress=False), torch.get_rng_state()


@pytest.fixture
def packed_unet(quantized_once) -> UNet2DConditionModel:
    """A quantized UNet in memory, for tests that change it; what they draw is the same in any order."""
    unet, state = quantized_once
    torch.set_rng_state(state)
    return copy.deepcopy(unet)


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess]:
    """Runs code in a fresh Python that finds this package, with `arguments` in sys.argv[1:].

    With an `environment`, which is added, other packages are imported anew as well, since they read it then.
    """

    def run(code: str, *arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        if environment is None:
            return FreshProcess(["-c", code, *arguments]).result()
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | environment
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def uploads(monkeypatch) -> list[tuple[str, dict[str, bytes]]]:
    """(repository, files) of every folder uploaded by the libraries and the training script, to no Hub at all."""
    seen = []

    class Repository:
        def __init__(self, repo_id, **_):
            self.repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"

    def upload_folder(*, repo_id, folder_path, **_):
        seen.append((repo_id, content(Path(folder_path))))

    replacements = {"create_repo": Repository, "upload_folder": upload_folder}
    for name, module in list(sys.modules.items()):
        if name.startswith(("diffusers.", "diffusers_bitsfusion", "train_bitsfusion")):
            for function in replacements.keys() & vars(module).keys():
                monkeypatch.setattr(module, function, replacements[function])
    return seen


@pytest.fixture
def decodes(monkeypatch) -> dict[str, int]:
    """Counts of the decodings of weights: by using `weight`, and by calls of layers."""
    counts = {"read": 0, "call": 0}
    for module, name, kind in (
        (packed, "decode_weight", "read"),
        (transforms, "decode_weight", "read"),
        *[(module, name, "call") for module in (linear, conv) for name in ("decode_to_scratch", "block_codes")],
    ):
        function = getattr(module, name)

        def counting(*args, function=function, kind=kind):
            counts[kind] += 1
            return function(*args)

        monkeypatch.setattr(module, name, counting)
    return counts
