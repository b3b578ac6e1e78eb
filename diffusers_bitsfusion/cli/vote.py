"""The command `bitsfusion vote`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import default_prompts, say, show
from .options import Dtype, Json


def vote(
    source: Annotated[str | None, typer.Argument(metavar="SRC", help="Folder or Hub id of a pipeline.")] = None,
    destination: Annotated[str | None, typer.Argument(metavar="DST", help="The pipeline to prefer, or not.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="PartiPrompts.tsv, or another tab-separated file with a Prompt and optionally a Category column; "
            "default: prompts.tsv in the folder of SRC or DST."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the vote: its votes, images and report.")] = Path("votes"),
    report: Annotated[bool, typer.Option("--report", help="Sum up the votes so far, instead of a page.")] = False,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images, as of `evaluate`; default: in the folder of the vote.")
    ] = None,
    num_images: Annotated[int | None, typer.Option(help="Use so many of the prompts; default: all.")] = None,
    steps: Annotated[int, typer.Option(help="Inference steps.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="Of classifier-free guidance.")] = 7.5,
    seed: Annotated[int, typer.Option(help="Base of the seeds of all images.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Images sampled at once; does not change them.")] = 8,
    dtype: Dtype = "auto",
    scheduler: Annotated[str | None, typer.Option(help="diffusers scheduler; default: the pipelines' own.")] = None,
    json_file: Json = None,
) -> None:
    """Ask people which of two pipelines' images they prefer, on a page in the browser, or sum up what they said.

    The page shows two images of equal seed in random, hidden order. Every vote is on the disk at once; raters continue
    by their name.
    """
    if report:
        _report(out, json_file)
        return
    if json_file is not None:
        raise typer.BadParameter("--json: only with --report")
    if source is None or destination is None:
        raise ValueError("Two pipelines are needed: bitsfusion vote SRC DST (or --report).")
    import torch

    from diffusers_bitsfusion import evaluation
    from diffusers_bitsfusion.evaluation.image_sets import generate_image_sets
    from diffusers_bitsfusion.evaluation.suites.captions import read_caption_file
    from diffusers_bitsfusion.evaluation.votes import VoteStore
    from diffusers_bitsfusion.evaluation.votes.page import build_page
    from diffusers_bitsfusion.utils.processes import process_state

    known = read_caption_file(prompts or default_prompts(source, destination))
    chosen = evaluation.sample_prompts(known, num_images)
    captions = [prompt.caption for prompt in chosen]
    sampling = evaluation.Sampling(steps, guidance_scale, seed, batch_size, scheduler)
    kind = None if dtype == "auto" else getattr(torch, dtype)
    folders = {
        side: generate_image_sets(path, [captions], [sampling], images or out / "images", kind).folders[0][0]
        for side, path in (("source", source), ("destination", destination))
    }
    if not process_state().is_main_process:
        return
    names = {side: folder.folder.name for side, folder in folders.items()}
    store = VoteStore.create(out, chosen, {"source": source, "destination": destination, "images": names})
    build_page(store, folders).launch(show_error=True)


def _report(out: Path, json_file: Path | None) -> None:
    from diffusers_bitsfusion.evaluation.grid import distinct_labels
    from diffusers_bitsfusion.evaluation.votes import VoteStore, preference_report
    from diffusers_bitsfusion.evaluation.votes.bars import save_bars
    from diffusers_bitsfusion.utils.files import write_atomically

    store = VoteStore(out)
    report = preference_report(store.votes, store.prompts)
    content = {"settings": store.settings} | report.as_dict()
    show(f"{store.settings['destination']} against {store.settings['source']}: {report}", content, json_file)
    write_atomically(out / "report.json", json.dumps(content, indent=2) + "\n")
    labels = distinct_labels([store.settings["destination"], store.settings["source"]])
    save_bars(report, out / "report.png", *labels)
    if str(json_file) != "-":
        say(f"Written: {out / 'report.json'}, {out / 'report.png'}")
