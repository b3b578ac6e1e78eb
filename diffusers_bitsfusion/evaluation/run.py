"""The evaluation: pictures of one pipeline, measured, and where there is a reference, against its pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.fingerprints import hash_of_settings, hash_of_text
from .clip import Clip, clip_score
from .compositional import Scorer, bootstrap_mean, bootstrap_scores, judge
from .distribution import cmmd, frechet_distance
from .generate import DEFAULT_SAMPLING, Sampling, generate_images
from .image_folder import ImageFolder
from .images import image_metrics, require_image_metrics
from .pipeline import default_device, fingerprint, load_pipeline
from .prompts import Prompt
from .report_table import as_figures


@dataclass(frozen=True)
class _Pictures:
    """One pipeline's pictures of all prompts, (n, height, width, 3) uint8 for each guidance scale."""

    scheduler: str
    by_scale: list[np.ndarray]


@dataclass(frozen=True)
class _Scores:
    """What is known of each of n pictures: scores (n,) and CLIP features (n, d), None where not measured."""

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
) -> dict[str, Any]:
    """Draw a picture for every prompt and measure the pictures.

    Args:
        path: folder or Hub id of the pipeline, packed or in full precision.
        prompts: what to draw.
        reference: pipeline to compare with, drawn with the same prompts and seeds.
        scorer: see `load_scorer`; needs a spec with every prompt.
        clip: folder or Hub id of a CLIP; when left out, the folder `clip/` of the pipeline or of the reference.
        sampling: how the pictures are drawn.
        guidance_scales: instead of `sampling.guidance_scale`, one or more.
        lpips: whether to measure LPIPS against the reference as well.
        images: folder that keeps the pictures, of as many pipelines and settings as one likes; those that it holds,
            of an interrupted run or of a reference evaluated before, are not drawn again.
        progress: whether to show progress bars.

    Returns:
        JSON-safe. `"compositional"` (`"overall"`, the mean over categories, and each category), `"clip_score"`, and
        against a reference `"mse"`, `"psnr"`, `"ssim"`, `"lpips"`, `"clip_fid"`, `"cmmd"`, each where it could be
        measured; `"intervals"` has the 95 % bounds under the same names. `"reference"` has the reference's own
        scores, `"difference"` the pipeline's minus the reference's, paired. `"settings"` says how they were drawn.
        Of several guidance scales the first is reported so, and all of them under `"by_guidance_scale"`.
        A PSNR of equal pictures is infinite and given as None.

    Raises:
        ImportError: a package of the extra `eval` is missing.
        OSError: a pipeline or the CLIP cannot be read, or the pictures not written.
        ValueError: no prompts, nothing to measure, a spec is missing, or see `load_pipeline` and `ImageFolder`.
    """
    path = os.fspath(path)
    reference = None if reference is None else os.fspath(reference)
    clip = _clip_folder(path, reference) if clip is None else os.fspath(clip)
    _check(prompts, scorer, clip, reference, lpips)
    model = None if clip is None else Clip.from_pretrained(clip)
    samplings = [replace(sampling, guidance_scale=scale) for scale in dict.fromkeys(guidance_scales)] or [sampling]

    drawn = _draw(path, prompts, samplings, images, progress)
    others = None if reference is None else _draw(reference, prompts, samplings, images, progress)
    reports = {}
    for index, chosen in enumerate(samplings):
        references = None if others is None else others.by_scale[index]
        report = _report(prompts, scorer, model, drawn.by_scale[index], references, lpips)
        used = asdict(chosen) | {"scheduler": drawn.scheduler}
        inputs = {"pipeline": path, "reference": reference, "clip": clip, "images": len(prompts)}
        reports[str(chosen.guidance_scale)] = report | {"settings": inputs | used}
    first = next(iter(reports.values()))
    return first if len(reports) == 1 else first | {"by_guidance_scale": reports}


def _clip_folder(path: str, reference: str | None) -> str | None:
    folders = [Path(place) / "clip" for place in (path, reference) if place is not None]
    return next((str(folder) for folder in folders if folder.is_dir()), None)


def _check(
    prompts: Sequence[Prompt], scorer: Scorer | None, clip: str | None, reference: str | None, lpips: bool
) -> None:
    """Everything that can be known before hours of drawing."""
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


def _draw(
    path: str,
    prompts: Sequence[Prompt],
    samplings: Sequence[Sampling],
    images: str | os.PathLike[str] | None,
    progress: bool,
) -> _Pictures:
    pipeline = load_pipeline(path, samplings[0].scheduler)
    scheduler = type(pipeline.scheduler).__name__
    captions = [prompt.caption for prompt in prompts]
    by_scale = []
    for sampling in samplings:
        folder = None
        if images is not None:
            settings = {
                "files": fingerprint(path),
                "prompts": hash_of_text("\n".join(captions)),
                "scheduler": scheduler,
                "steps": sampling.steps,
                "guidance_scale": sampling.guidance_scale,
                "seed": sampling.seed,
                "device": default_device().type,
            }
            folder = ImageFolder(Path(images) / f"{Path(path).name}-{hash_of_settings(settings)[:8]}", settings)
        by_scale.append(generate_images(pipeline, captions, sampling, folder, progress))
    return _Pictures(scheduler, by_scale)


def _report(
    prompts: Sequence[Prompt],
    scorer: Scorer | None,
    clip: Clip | None,
    images: np.ndarray,
    references: np.ndarray | None,
    lpips: bool,
) -> dict[str, Any]:
    scores = _scores(prompts, scorer, clip, images)
    estimates = _estimates(prompts, scores)
    if references is None:
        return as_figures(estimates)
    other = _scores(prompts, scorer, clip, references)
    metrics = image_metrics(images, references, lpips)
    estimates |= {name: bootstrap_mean(values) for name, values in metrics.items()}
    if scores.features is not None and other.features is not None:
        if len(images) > 1:
            estimates["clip_fid"] = frechet_distance(scores.features, other.features)
        estimates["cmmd"] = cmmd(scores.features, other.features)
    return as_figures(estimates) | {
        "reference": as_figures(_estimates(prompts, other)),
        "difference": as_figures(_estimates(prompts, _difference(scores, other))),
    }


def _scores(prompts: Sequence[Prompt], scorer: Scorer | None, clip: Clip | None, images: np.ndarray) -> _Scores:
    compositional = None if scorer is None else judge(scorer, images, [prompt.spec for prompt in prompts])
    if clip is None:
        return _Scores(compositional)
    features = clip.image_features(images)
    text_features = clip.text_features([prompt.caption for prompt in prompts])
    return _Scores(compositional, clip_score(features, text_features), features)


def _difference(a: _Scores, b: _Scores) -> _Scores:
    """Of two models' scores on the same prompts, measured the same way."""
    return _Scores(
        None if a.compositional is None or b.compositional is None else a.compositional - b.compositional,
        None if a.clip_score is None or b.clip_score is None else a.clip_score - b.clip_score,
    )


def _estimates(prompts: Sequence[Prompt], scores: _Scores) -> dict[str, Any]:
    """An `Estimate` by name, and for the compositional score one by category."""
    estimates: dict[str, Any] = {}
    if scores.compositional is not None:
        estimates["compositional"] = bootstrap_scores(scores.compositional, [prompt.category for prompt in prompts])
    if scores.clip_score is not None:
        estimates["clip_score"] = bootstrap_mean(scores.clip_score)
    return estimates
