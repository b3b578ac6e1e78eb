"""The command `bitsfusion evaluate`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import default_prompts, show
from .options import Dtype, Json
from .sources import check_holds_something, config_folder

_SUITES = "Suites"
_MODELS = "Models of the suites: folders or Hub ids"


def evaluate(
    path: Annotated[str, typer.Argument(help="Folder or Hub id of a pipeline, packed or in full precision.")],
    reference: Annotated[
        str | None, typer.Option(help="Full-precision pipeline to compare with; default: none.")
    ] = None,
    unet: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a UNet or transformer in place of that of PATH; default: its own."),
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
    num_images: Annotated[int | None, typer.Option(help="Use so many of the prompts; default: all.")] = None,
    steps: Annotated[int, typer.Option(help="Inference steps.")] = 50,
    guidance_scale: Annotated[list[float] | None, typer.Option(help="Can be repeated; default: 7.5.")] = None,
    seed: Annotated[int, typer.Option(help="Base of the seeds of all images.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Images sampled at once; does not change them.")] = 8,
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
    """Generate images of a prompt set and score them: compositional and CLIP score, distances to a reference.

    With --suite, published evaluations instead. Under `accelerate launch` the processes share the work.
    """
    _evaluate(Namespace(**locals()))  # These are the options by name, as argparse passes them.


def _evaluate(args: Namespace) -> None:
    import torch

    from diffusers_bitsfusion.evaluation import Sampling
    from diffusers_bitsfusion.utils.processes import process_state

    if args.unet is not None and args.card:
        raise ValueError("--card writes into the card in PATH, whose UNet --unet replaces; use --json.")
    _check_paths(args.path, args.json_file, args.card)
    if args.unet is not None:
        check_holds_something(config_folder(args.unet), args.unet)
    shared = {
        "reference": args.reference,
        "unet": args.unet,
        "sampling": Sampling(steps=args.steps, seed=args.seed, batch_size=args.batch_size, scheduler=args.scheduler),
        "guidance_scales": args.guidance_scale or (),
        "images": args.images,
        "dtype": None if args.dtype == "auto" else getattr(torch, args.dtype),
    }
    report = _evaluate_suites(args, shared) if args.suite else _evaluate_prompts(args, shared)
    if process_state().is_main_process:
        _write_report(report, args.path, args.json_file, args.card)


def _check_paths(path: str, json_file: Path | None, card: bool) -> None:
    """Refuse what cannot be read or written, before hours of sampling."""
    from diffusers_bitsfusion.reporting.model_card import check_card

    config_folder(path)  # This raises an error that names a missing folder or model.
    if json_file is not None and str(json_file) != "-":
        json_file.parent.mkdir(parents=True, exist_ok=True)
    if card:
        check_card(Path(path))


def _evaluate_suites(args: Namespace, shared: dict[str, Any]) -> dict[str, Any]:
    """Return the report of published evaluations."""
    from diffusers_bitsfusion import evaluation

    if args.scorer is not None or args.lpips:
        raise ValueError("--scorer and --lpips are not for suites; run them without --suite.")
    files = evaluation.SuiteFiles(
        prompts=args.prompts or _prompts_beside(args.path, args.reference),
        geneval_prompts=args.geneval_prompts,
        tifa_prompts=args.tifa_prompts,
        tifa_questions=args.tifa_questions,
        detector=args.detector,
        color_classifier=args.color_classifier,
        vqa=args.vqa,
        sentence_encoder=args.sentence_encoder,
        clip=args.clip or evaluation.clip_beside(args.path, args.reference),
        pickscore=args.pickscore,
        hpsv2=args.hpsv2,
        num_images=args.num_images,
    )
    return evaluation.evaluate_suites(args.path, evaluation.load_suites(args.suite, files), **shared)


def _evaluate_prompts(args: Namespace, shared: dict[str, Any]) -> dict[str, Any]:
    """Return the report of a prompt set."""
    from diffusers_bitsfusion import evaluation

    known = evaluation.read_prompts(args.prompts or default_prompts(args.path, args.reference))
    return evaluation.evaluate(
        args.path,
        evaluation.sample_prompts(known, args.num_images),
        scorer=None if args.scorer is None else evaluation.load_scorer(args.scorer),
        clip=args.clip,
        lpips=args.lpips,
        **shared,
    )


def _write_report(report: dict[str, Any], path: str, json_file: Path | None, card: bool) -> None:
    from diffusers_bitsfusion.evaluation import format_report
    from diffusers_bitsfusion.reporting.model_card import add_section

    show(format_report(report), report, json_file)
    if card:
        add_section(Path(path), "Scores", f"```text\n{format_report(report)}\n```")


def _prompts_beside(path: str, reference: str | None) -> str | None:
    """Return prompts.tsv of the pipeline or of the reference; None where a suite brings its own."""
    try:
        return str(default_prompts(path, reference))
    except ValueError:
        return None
