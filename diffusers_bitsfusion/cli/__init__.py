"""The command line `bitsfusion`: one file a command, each of which imports what it needs only when it runs."""

from __future__ import annotations

import typer

from .allocate import allocate
from .analyze import analyze
from .compare import compare
from .evaluate import evaluate
from .inspect import inspect
from .quantize import quantize
from .vote import vote

app = typer.Typer(
    name="bitsfusion",
    help="Extremely low-bit diffusion models for diffusers.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)

for _command in (quantize, inspect, evaluate, compare, analyze, allocate, vote):
    app.command()(_command)
