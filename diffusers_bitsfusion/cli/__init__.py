"""The command line `bitsfusion`: one file a command, each of which imports what it needs only when it runs.

`bitsfusion_launcher.py` loads this folder without the package around it, so its files import the package by its full
name, within functions, and each other relatively.
"""

from __future__ import annotations

from importlib.metadata import version
from platform import python_version
from typing import Annotated

import typer

from .allocate import allocate
from .analyze import analyze
from .common import JsonCommand, command
from .compare import compare
from .draw import draw
from .evaluate import evaluate
from .export import export
from .inspect import inspect
from .launch_app import launch_app
from .quantize import quantize
from .train import train
from .vote import vote

app = typer.Typer(
    name="bitsfusion",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich would take "[eval]" and "[default: 16]" for styles, and leave them out.
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        others = ", ".join(f"{name} {version(name)}" for name in ("diffusers", "torch"))
        typer.echo(f"diffusers_bitsfusion {version('diffusers_bitsfusion')} ({others}, Python {python_version()})")
        raise typer.Exit()


@app.callback()
def main(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions and end."),
    ] = False,
) -> None:
    """Quantize diffusion models to extremely few bits, and measure, compare and train them."""


for _function in (quantize, inspect, draw, compare, evaluate, vote, analyze, allocate, export):
    app.command(cls=JsonCommand)(command(_function))
app.command("app")(command(launch_app))
# Options of training are those of diffusers' training scripts, so argparse parses them.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)(train)
