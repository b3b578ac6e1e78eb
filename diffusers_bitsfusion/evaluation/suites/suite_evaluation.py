"""Several suites over one pipeline: images generated once, scored by each, compared with a reference's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ...utils.fingerprints import hash_of_settings
from ...utils.processes import process_state
from ..blocks import own_blocks
from ..generate import DEFAULT_SAMPLING, Sampling
from ..image_folder import ImageFolder
from ..image_sets import generate_image_sets, image_root
from ..prompt_evaluation import PATIENCE
from ..report_table import as_figures
from .base import Scores, Suite
from .score_file import ScoreFile


def evaluate_suites(
    path: str | os.PathLike[str],
    suites: Sequence[Suite],
    reference: str | os.PathLike[str] | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    guidance_scales: Sequence[float] = (),
    images: str | os.PathLike[str] | None = None,
    progress: bool = True,
    dtype: torch.dtype | None = None,
    unet: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Generate the images that the suites need, score them, and compare them with a reference's of equal seeds.

    Suites with the same captions share their images. Images and scores go to the disk as they come, so that a run
    that was interrupted at any moment continues there, and memory does not grow with their number. Under `accelerate
    launch` the processes share the work, and all of them get the report; its figures are those of one process.

    Args:
        path: folder or Hub id of the pipeline, packed or in full precision.
        suites: of `load_suites`.
        reference: pipeline to compare with.
        sampling: steps, guidance, seed, batch size and scheduler.
        guidance_scales: instead of `sampling.guidance_scale`, one or more.
        images: folder that keeps images and scores; needed by several processes.
        progress: whether to show progress bars.
        dtype: of the pipelines, as of `load_pipeline`.
        unet: folder or Hub id of a UNet or transformer in place of the pipeline's own.

    Returns:
        JSON-safe: under "suites" by name what each found, its scores beside "intervals", "reference", "difference" and
        "settings" as `evaluate` gives them, of several guidance scales all under "by_guidance_scale".

    Raises:
        OSError, ValueError: a suite needs a reference or a model that is missing, or see `generate_image_sets`.
    """
    for suite in suites:
        if suite.needs_reference and reference is None:
            raise ValueError(f"The suite {suite.name} compares with a reference; give one (--reference).")
    process_state(timeout=PATIENCE)
    for suite in suites:
        suite.load()  # A missing model is reported before hours of sampling; the loaded one is freed.
    paths = [os.fspath(path)] if reference is None else [os.fspath(path), os.fspath(reference)]
    samplings = [replace(sampling, guidance_scale=scale) for scale in dict.fromkeys(guidance_scales)] or [sampling]
    with image_root(images) as root:
        captions = [suite.captions for suite in suites]
        own_unet = None if unet is None else os.fspath(unet)
        image_sets = [
            generate_image_sets(place, captions, samplings, root, dtype, progress, unet=replacement)
            for place, replacement in zip(paths, (own_unet, None), strict=False)
        ]
        reports = {}
        for number, suite in enumerate(suites):
            note = {"note": suite.note} if suite.note else {}
            by_scale = {}
            for index, chosen in enumerate(samplings):
                folders = [image_set.folders[number][index] for image_set in image_sets]
                used = asdict(chosen) | {"scheduler": image_sets[0].scheduler, "images": len(suite.captions)}
                inputs = {"pipeline": paths[0], "reference": paths[1] if len(paths) > 1 else None}
                inputs |= {} if own_unet is None else {"unet": own_unet}
                report = _report(suite, _scored(suite, folders, root, progress))
                settings = inputs | used | suite.settings
                by_scale[str(chosen.guidance_scale)] = report | note | {"settings": settings}
            first = next(iter(by_scale.values()))
            reports[suite.name] = first if len(by_scale) == 1 else first | {"by_guidance_scale": by_scale}
    return {"suites": reports}


def _scored(suite: Suite, folders: Sequence[ImageFolder], root: Path, progress: bool) -> list[Scores]:
    """Return the scores of each folder's images; those that are on the disk are not made again."""
    state = process_state()
    count, scorer = len(suite.captions), None
    files = []
    for folder in folders:
        settings = suite.settings | {"suite": suite.name, "pictures": folder.folder.name}
        with state.main_process_first():
            file = ScoreFile(root / f"{suite.name}-{hash_of_settings(settings)[:8]}", settings, state.process_index)
        done = file.done()
        missing = [block for block in own_blocks(count) if not done.issuperset(block)]
        # All processes wait for the file of features, if any of them needs it.
        if any(gather_object([bool(missing)])):
            scorer = scorer or suite.load()
            with state.main_process_first():
                file.prepare(count, scorer.width)
            for block in tqdm(missing, desc=f"{suite.name}, blocks", disable=not (progress and state.is_main_process)):
                records, features = scorer.score(block, folder.block(block))
                file.append(block, records, features)
        files.append(file)
    state.wait_for_everyone()
    return [file.scores() for file in files]


def _report(suite: Suite, scores: Sequence[Scores]) -> dict[str, Any]:
    own = suite.values(scores[0])
    if len(scores) == 1:
        return as_figures(suite.summary(own))
    others = suite.values(scores[1])
    return as_figures(suite.summary(own) | suite.against(scores[0], scores[1])) | {
        "reference": as_figures(suite.summary(others)),
        "difference": as_figures(suite.summary(own - others)),
    }
