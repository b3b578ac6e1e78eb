"""The command `bitsfusion evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import default_prompts, show
from .options import Dtype, Json
from .sources import config_folder

_SUITES = "Suites"
_MODELS = "Models of the suites: folders or Hub ids"


def evaluate(
    path: Annotated[str, typer.Argument(help="Folder or Hub id of a pipeline, packed or in full precision.")],
    reference: Annotated[
        str | None, typer.Option(help="Full-precision pipeline to compare with; default: none.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Text file with a prompt a line, or *.tsv with a Prompt, optionally a Category and a Spec column; "
            "for suites also COCO's annotations (.json); default: prompts.tsv in the folder of PATH or of the "
            "reference."
        ),
    ] = None,
    scorer: Annotated[
        str | None, typer.Option(help="MODULE:FUNCTION that judges images by their Spec; default: none.")
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a CLIP; default: clip/ in the folder of PATH or of the reference."),
    ] = None,
    num_images: Annotated[int | None, typer.Option(help="Draw so many of the prompts; default: all.")] = None,
    steps: Annotated[int, typer.Option(help="Inference steps.")] = 50,
    guidance_scale: Annotated[list[float] | None, typer.Option(help="Can be repeated; default: 7.5.")] = None,
    seed: Annotated[int, typer.Option(help="Base of the seeds of all images.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Images drawn at once; does not change them.")] = 8,
    dtype: Dtype = "auto",
    scheduler: Annotated[str | None, typer.Option(help="diffusers scheduler; default: the pipeline's own.")] = None,
    lpips: Annotated[bool, typer.Option("--lpips", help="Measure LPIPS too; needs the package lpips.")] = False,
    json_file: Json = None,
    images: Annotated[
        Path | None, typer.Option(help="Keep the images here, and continue from them; default: nowhere.")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the scores into the card in PATH.")] = False,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="geneval, tifa, clip, pickscore or hpsv2, in place of the scores without; can be repeated; "
            "default: none.",
            rich_help_panel=_SUITES,
        ),
    ] = None,
    geneval_prompts: Annotated[
        str | None, typer.Option(help="GenEval's evaluation_metadata.jsonl; default: none.", rich_help_panel=_SUITES)
    ] = None,
    tifa_prompts: Annotated[
        str | None, typer.Option(help="TIFA's tifa_v1.0_text_inputs.json; default: none.", rich_help_panel=_SUITES)
    ] = None,
    tifa_questions: Annotated[
        str | None,
        typer.Option(help="TIFA's tifa_v1.0_question_answers.json; default: none.", rich_help_panel=_SUITES),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(
            help="GenEval's Mask2Former, or MODULE:FUNCTION; default: facebook/mask2former-swin-small-coco-instance.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    color_classifier: Annotated[
        str | None,
        typer.Option(
            help="GenEval's CLIP for colours, or MODULE:FUNCTION; default: openai/clip-vit-large-patch14.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    vqa: Annotated[
        str | None,
        typer.Option(
            help="Answers TIFA's questions; or MODULE:FUNCTION; default: Salesforce/blip-vqa-capfilt-large.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    sentence_encoder: Annotated[
        str | None,
        typer.Option(
            help="Finds the choice nearest to an answer; default: sentence-transformers/all-mpnet-base-v2.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    pickscore: Annotated[
        str | None,
        typer.Option(help="Of the suite pickscore; default: yuvalkirstain/PickScore_v1.", rich_help_panel=_MODELS),
    ] = None,
    hpsv2: Annotated[
        str | None, typer.Option(help="Of the suite hpsv2; default: adams-story/HPSv2-hf.", rich_help_panel=_MODELS)
    ] = None,
) -> None:
    """Draw a prompt set and score the images: compositional score, CLIP score, distances to a reference.

    With --suite, published evaluations instead. Under `accelerate launch` the processes share the work.
    """
    import torch

    from diffusers_bitsfusion import evaluation
    from diffusers_bitsfusion.reporting.model_card import add_section, check_card
    from diffusers_bitsfusion.utils.processes import process_state

    config_folder(path)  # which names a folder or model that is not there
    if json_file is not None and str(json_file) != "-":
        json_file.parent.mkdir(parents=True, exist_ok=True)  # now, not after hours of sampling
    if card:
        check_card(Path(path))
    shared: dict[str, Any] = {
        "reference": reference,
        "sampling": evaluation.Sampling(steps=steps, seed=seed, batch_size=batch_size, scheduler=scheduler),
        "guidance_scales": guidance_scale or (),
        "images": images,
        "dtype": None if dtype == "auto" else getattr(torch, dtype),
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
    show(evaluation.format_report(report), report, json_file)
    if card:
        add_section(Path(path), "Scores", f"```text\n{evaluation.format_report(report)}\n```")


def _prompts_beside(path: str, reference: str | None) -> str | None:
    """Return prompts.tsv of the pipeline or of the reference; None where a suite brings its own."""
    try:
        return str(default_prompts(path, reference))
    except ValueError:
        return None
