"""The evaluation of one pipeline: its images measured, also against a reference's where there is one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from ..utils.processes import process_state
from .blocks import own_blocks
from .clip import Clip, clip_score
from .compositional import Scorer, bootstrap_mean, bootstrap_scores, judge
from .distribution import cmmd, frechet_distance
from .generate import DEFAULT_SAMPLING, Sampling
from .image_distances import image_metrics, require_image_metrics
from .image_folder import ImageFolder
from .image_sets import generate_image_sets, image_root
from .prompts import Prompt
from .report_table import as_figures

# Time that processes wait for each other's images, far above the time-out of a training step.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class _Scores:
    """The scores (n,) and CLIP features (n, d) of n images, None where not measured."""

    compositional: np.ndarray | None = None
    clip_score: np.ndarray | None = None
    features: np.ndarray | None = None


def evaluate(
    path: str | os.PathLike[str],
    prompts: Sequence[Prompt],
    reference: str | os.PathLike[str] | None = None,
    scorer: Scorer | None = None,
    clip: str | os.PathLike[str] | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    guidance_scales: Sequence[float] = (),
    lpips: bool = False,
    images: str | os.PathLike[str] | None = None,
    progress: bool = True,
    dtype: torch.dtype | None = None,
    unet: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Generate an image for every prompt and measure the images.

    Images and their features go to the disk and are read a block at a time. Under `accelerate launch` the processes
    share the work, and all of them get the report.

    Args:
        path: folder or Hub id of the pipeline, packed or in full precision.
        prompts: of the images.
        reference: pipeline to compare with, sampled with the same prompts and seeds.
        scorer: see `load_scorer`; needs a spec with every prompt.
        clip: folder or Hub id of a CLIP; when left out, the folder `clip/` of the pipeline or of the reference.
        sampling: steps, guidance, seed, batch size and scheduler.
        guidance_scales: instead of `sampling.guidance_scale`, one or more.
        lpips: whether to measure LPIPS against the reference as well.
        images: folder that keeps the images, of as many pipelines and settings as one likes; those that it holds,
            of an interrupted run or of a reference evaluated before, are not generated again.
        progress: whether to show progress bars.
        dtype: of the pipelines, as of `load_pipeline`.
        unet: folder or Hub id of a UNet or transformer in place of the pipeline's own, not of the reference's.

    Returns:
        JSON-safe. `"compositional"` (`"overall"`, the mean over categories, and each category), `"clip_score"`, and
        against a reference `"mse"`, `"psnr"`, `"ssim"`, `"lpips"`, `"clip_fid"`, `"cmmd"`, each where it could be
        measured; `"intervals"` has the 95 % bounds under the same names. `"reference"` has the reference's own
        scores, `"difference"` the pipeline's minus the reference's, paired. `"settings"` says how they were sampled.
        Of several guidance scales the first is reported so, and all of them under `"by_guidance_scale"`.
        A PSNR of equal images is infinite and given as None.

    Raises:
        ImportError: a package of the extra `eval` is missing.
        OSError: a pipeline or the CLIP cannot be read, or the images not written.
        ValueError: no prompts, nothing to measure, a spec is missing, or see `load_pipeline` and `ImageFolder`.
    """
    path = os.fspath(path)
    reference = None if reference is None else os.fspath(reference)
    clip = clip_beside(path, reference) if clip is None else os.fspath(clip)
    _check(prompts, scorer, clip, reference, lpips)
    process_state(timeout=PATIENCE)
    model = None if clip is None else Clip.from_pretrained(clip)
    samplings = [replace(sampling, guidance_scale=scale) for scale in dict.fromkeys(guidance_scales)] or [sampling]

    reports = {}
    with image_root(images) as root:
        captions = [prompt.caption for prompt in prompts]
        replacement = None if unet is None else os.fspath(unet)
        generated = generate_image_sets(path, [captions], samplings, root, dtype, progress, unet=replacement)
        others = (
            None if reference is None else generate_image_sets(reference, [captions], samplings, root, dtype, progress)
        )
        for index, chosen in enumerate(samplings):
            references = None if others is None else others.folders[0][index]
            report = _report(prompts, scorer, model, generated.folders[0][index], references, lpips, root)
            used = asdict(chosen) | {"scheduler": generated.scheduler}
            inputs = {"pipeline": path, "reference": reference, "clip": clip, "images": len(prompts)}
            inputs |= {} if replacement is None else {"unet": replacement}
            reports[str(chosen.guidance_scale)] = report | {"settings": inputs | used}
    first = next(iter(reports.values()))
    return first if len(reports) == 1 else first | {"by_guidance_scale": reports}


def clip_beside(path: str, reference: str | None) -> str | None:
    """Return the folder `clip/` of the pipeline or of the reference, None where neither has one."""
    folders = [Path(place) / "clip" for place in (path, reference) if place is not None]
    return next((str(folder) for folder in folders if folder.is_dir()), None)


def _check(
    prompts: Sequence[Prompt], scorer: Scorer | None, clip: str | None, reference: str | None, lpips: bool
) -> None:
    """Refuse wrong input that can be known before hours of sampling."""
    if not prompts:
        raise ValueError("There are no prompts.")
    if scorer is None and clip is None and reference is None:
        raise ValueError("Nothing to measure: give a scorer, a CLIP or a reference.")
    missing = [prompt.caption for prompt in prompts if prompt.spec is None]
    if scorer is not None and missing:
        raise ValueError(f"The scorer needs a Spec with every prompt; {len(missing)} lack it, first {missing[0]!r}.")
    if lpips and reference is None:
        raise ValueError("LPIPS needs a reference.")
    if reference is not None:
        require_image_metrics(lpips)


def _report(
    prompts: Sequence[Prompt],
    scorer: Scorer | None,
    clip: Clip | None,
    images: ImageFolder,
    references: ImageFolder | None,
    lpips: bool,
    root: Path,
) -> dict[str, Any]:
    scores = _scores(prompts, scorer, clip, images, root)
    intervals = _intervals(prompts, scores)
    if references is None:
        return as_figures(intervals)
    other = _scores(prompts, scorer, clip, references, root)
    metrics = _gathered(
        len(prompts),
        lambda block: image_metrics(images.block(block), references.block(block), lpips),
    )
    intervals |= {name: bootstrap_mean(values) for name, values in metrics.items()}
    if scores.features is not None and other.features is not None:
        if len(prompts) > 1:
            intervals["clip_fid"] = frechet_distance(scores.features, other.features)
        intervals["cmmd"] = cmmd(scores.features, other.features)
    return as_figures(intervals) | {
        "reference": as_figures(_intervals(prompts, other)),
        "difference": as_figures(_intervals(prompts, _difference(scores, other))),
    }


def _scores(
    prompts: Sequence[Prompt], scorer: Scorer | None, clip: Clip | None, folder: ImageFolder, root: Path
) -> _Scores:
    """Score the images in a folder; their features lie in a file in `root`, so that memory does not grow with them."""
    file = None if clip is None else _feature_file(root / f"{folder.folder.name}-features.npy", len(prompts), clip)

    def measure(block: range) -> dict[str, np.ndarray]:
        images, of_block = folder.block(block), [prompts[index] for index in block]
        values = {}
        if scorer is not None:
            values["compositional"] = judge(scorer, images, [prompt.spec for prompt in of_block])
        if clip is not None and file is not None:
            features = clip.image_features(images)
            values["clip_score"] = clip_score(features, clip.text_features([prompt.caption for prompt in of_block]))
            mapped = np.lib.format.open_memmap(file, "r+")
            mapped[block.start : block.stop] = features
            mapped.flush()
        return values

    scores = _gathered(len(prompts), measure)  # All processes have written when it returns.
    return _Scores(**scores, features=None if file is None else np.load(file, mmap_mode="r"))


def _feature_file(path: Path, count: int, clip: Clip) -> Path:
    """Return the path of a new array of features, (count, d) float32, that all processes write to."""
    with process_state().main_process_first():
        if process_state().is_main_process:
            np.lib.format.open_memmap(path, "w+", np.float32, (count, clip.width)).flush()
    return path


def _gathered(count: int, measure: Callable[[range], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return what `measure` gives for the blocks of all processes, in their order, arrays joined by name."""
    own = {block.start: measure(block) for block in own_blocks(count)}
    blocks = {start: values for part in gather_object([own]) for start, values in part.items()}
    ordered = [blocks[start] for start in sorted(blocks)]
    return {name: np.concatenate([values[name] for values in ordered]) for name in ordered[0]}


def _difference(a: _Scores, b: _Scores) -> _Scores:
    """Return the difference of two models' scores on the same prompts."""
    return _Scores(
        None if a.compositional is None or b.compositional is None else a.compositional - b.compositional,
        None if a.clip_score is None or b.clip_score is None else a.clip_score - b.clip_score,
    )


def _intervals(prompts: Sequence[Prompt], scores: _Scores) -> dict[str, Any]:
    """Return a `ConfidenceInterval` by name, and for the compositional score one by category."""
    intervals: dict[str, Any] = {}
    if scores.compositional is not None:
        intervals["compositional"] = bootstrap_scores(scores.compositional, [prompt.category for prompt in prompts])
    if scores.clip_score is not None:
        intervals["clip_score"] = bootstrap_mean(scores.clip_score)
    return intervals
