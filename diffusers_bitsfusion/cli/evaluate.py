"""The command `bitsfusion evaluate`."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..utils.files import write_atomically
from .common import default_prompts, user_errors

_SUITES = "Suites"
_MODELS = "Models of the suites: folders or Hub ids"


class Dtype(str, Enum):
    """Floating-point types of pipelines."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def evaluate(
    path: Annotated[str, typer.Argument(help="Folder or Hub id of a pipeline, packed or in full precision.")],
    reference: Annotated[str | None, typer.Option(help="Full-precision pipeline to compare with.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Tab-separated file with a Prompt, optionally a Category and a Spec column; for suites also COCO's "
            "annotations (.json) or a caption a line (.txt); default: prompts.tsv in the folder of PATH or of the "
            "reference."
        ),
    ] = None,
    scorer: Annotated[str | None, typer.Option(help="MODULE:FUNCTION that judges images by their Spec.")] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a CLIP; default: clip/ in the folder of PATH or of the reference."),
    ] = None,
    num_images: Annotated[int | None, typer.Option(help="Draw so many of the prompts; default: all.")] = None,
    steps: Annotated[int, typer.Option(help="Inference steps.")] = 50,
    guidance_scale: Annotated[list[float] | None, typer.Option(help="Can be repeated.  [default: 7.5]")] = None,
    seed: Annotated[int, typer.Option(help="Base of the seeds of all images.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Images drawn at once; does not change them.")] = 8,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: float16 on CUDA, float32 on a CPU.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="diffusers scheduler; default: the pipeline's own.")] = None,
    lpips: Annotated[bool, typer.Option("--lpips", help="Measure LPIPS too; needs the package lpips.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    images: Annotated[Path | None, typer.Option(help="Keep the images here, and continue from them.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the scores into the card in PATH.")] = False,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="geneval, tifa, clip, pickscore or hpsv2, instead of what is measured without; can be repeated.",
            rich_help_panel=_SUITES,
        ),
    ] = None,
    geneval_prompts: Annotated[
        str | None, typer.Option(help="GenEval's evaluation_metadata.jsonl.", rich_help_panel=_SUITES)
    ] = None,
    tifa_prompts: Annotated[
        str | None, typer.Option(help="TIFA's tifa_v1.0_text_inputs.json.", rich_help_panel=_SUITES)
    ] = None,
    tifa_questions: Annotated[
        str | None, typer.Option(help="TIFA's tifa_v1.0_question_answers.json.", rich_help_panel=_SUITES)
    ] = None,
    detector: Annotated[
        str | None, typer.Option(help="GenEval's Mask2Former, or MODULE:FUNCTION.", rich_help_panel=_MODELS)
    ] = None,
    color_classifier: Annotated[
        str | None, typer.Option(help="GenEval's CLIP for colours, or MODULE:FUNCTION.", rich_help_panel=_MODELS)
    ] = None,
    vqa: Annotated[
        str | None, typer.Option(help="Answers TIFA's questions; or MODULE:FUNCTION.", rich_help_panel=_MODELS)
    ] = None,
    sentence_encoder: Annotated[
        str | None, typer.Option(help="Takes TIFA's answers to the nearest choice.", rich_help_panel=_MODELS)
    ] = None,
    pickscore: Annotated[str | None, typer.Option(help="Of the suite pickscore.", rich_help_panel=_MODELS)] = None,
    hpsv2: Annotated[str | None, typer.Option(help="Of the suite hpsv2.", rich_help_panel=_MODELS)] = None,
) -> None:
    """Draw a prompt set and score the images: compositional score, CLIP score, distances to a reference.

    With --suite, published evaluations instead. Under `accelerate launch` the processes share the work.
    """
    with user_errors():
        import torch

        from .. import evaluation
        from ..reporting.model_card import add_section, check_card
        from ..utils.processes import process_state

        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)  # now, not after hours of drawing
        if card:
            check_card(Path(path))
        shared: dict[str, Any] = {
            "reference": reference,
            "sampling": evaluation.Sampling(steps=steps, seed=seed, batch_size=batch_size, scheduler=scheduler),
            "guidance_scales": guidance_scale or (),
            "images": images,
            "dtype": None if dtype is None else getattr(torch, dtype.value),
        }
        if suite:
            if scorer is not None or lpips:
                raise ValueError("--scorer and --lpips are not for suites; run them without --suite.")
            files = evaluation.SuiteFiles(
                prompts=prompts or _prompts_beside(path, reference),
                geneval_prompts=geneval_prompts,
                tifa_prompts=tifa_prompts,
                tifa_questions=tifa_questions,
                detector=detector,
                color_classifier=color_classifier,
                vqa=vqa,
                sentence_encoder=sentence_encoder,
                clip=clip or evaluation.clip_beside(path, reference),
                pickscore=pickscore,
                hpsv2=hpsv2,
                num_images=num_images,
            )
            report = evaluation.evaluate_suites(path, evaluation.load_suites(suite, files), **shared)
        else:
            read = evaluation.read_prompts(prompts or default_prompts(path, reference))
            report = evaluation.evaluate(
                path,
                evaluation.sample_prompts(read, num_images),
                scorer=None if scorer is None else evaluation.load_scorer(scorer),
                clip=clip,
                lpips=lpips,
                **shared,
            )
        if not process_state().is_main_process:
            return
        typer.echo(evaluation.format_report(report))
        if card:
            add_section(Path(path), "Scores", f"```text\n{evaluation.format_report(report)}\n```")
        if json_file is not None:
            write_atomically(json_file, json.dumps(report, indent=2, allow_nan=False) + "\n")


def _prompts_beside(path: str, reference: str | None) -> str | None:
    """Return prompts.tsv of the pipeline or of the reference; None where a suite brings its own."""
    try:
        return str(default_prompts(path, reference))
    except ValueError:
        return None
