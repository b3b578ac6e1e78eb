"""Options that several commands have, so that they read and mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Dtype = Annotated[
    Literal["auto", "float16", "bfloat16", "float32"],
    typer.Option(help='Of what computes in floating point; "auto": float16 on a GPU, float32 on a CPU.'),
]
Device = Annotated[
    str | None, typer.Option(help='Where to compute, for example "cuda:1"; default: the GPU if there is one, or cpu.')
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub; default: its main branch.")]
Variant = Annotated[
    str | None, typer.Option(help='Of the weight files, for example "fp16"; default: none, or the only one there is.')
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="[FILE.json]",
        help="Print JSON instead of text; followed by the name of a .json file, print text and write JSON there.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Steps = Annotated[int, typer.Option(help="Inference steps of each image.")]
GuidanceScale = Annotated[float, typer.Option(help="Of classifier-free guidance.")]
Seed = Annotated[int, typer.Option(help="Base of the seeds of all images.")]
BatchSize = Annotated[int, typer.Option(help="Images drawn at once; does not change them.")]
Scheduler = Annotated[str | None, typer.Option(help="diffusers scheduler; default: the pipeline's own.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(help="Text file with a prompt a line, or *.tsv with a Prompt column; default: none."),
]
TimeEmbedding = Annotated[
    Literal["auto", "table", "cache", "keep"],
    typer.Option(
        help='"table": features of all timesteps in its place; "cache": of the paper\'s 50; "keep": quantized layers; '
        '"auto": the smaller of table and keep.'
    ),
]
