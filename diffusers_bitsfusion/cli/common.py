"""Shared parts of the commands: verbosity, errors that end a command, and the output of results."""

from __future__ import annotations

import functools
import inspect
import json
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

_QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
_VERBOSE = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print what diffusers and transformers log, and where an error arose.")
]

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_verbose: ContextVar[bool] = ContextVar("verbose", default=False)


class JsonCommand(TyperCommand):
    """A command whose `--json` needs no value: `--json` alone means the standard output, written "-"."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write a `--json` without a value as `--json=-`, and parse as typer does."""
        pairs = zip(args, [*args[1:], ""], strict=False)
        written = ["--json=-" if arg == "--json" and not after.endswith(".json") else arg for arg, after in pairs]
        return super().parse_args(ctx, written)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Return a command's function with `--quiet` and `--verbose`, whose errors of input and disk are one line."""

    @functools.wraps(function)
    def run(*args: Any, quiet: bool, verbose: bool, **kwargs: Any) -> None:
        if quiet and verbose:
            raise typer.BadParameter("--quiet and --verbose exclude each other")
        with loudness(quiet, verbose), user_errors():
            function(*args, **kwargs)

    signature = inspect.signature(function, eval_str=True)
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("quiet", _QUIET), ("verbose", _VERBOSE))
    ]
    parameters = [*signature.parameters.values(), *shared]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@contextmanager
def loudness(quiet: bool, verbose: bool) -> Iterator[None]:
    """Let libraries log and show progress bars as requested, and as before afterwards."""
    if not (quiet or verbose):
        yield
        return
    tokens = [(_quiet, _quiet.set(quiet)), (_verbose, _verbose.set(verbose))]
    before = os.environ.get("TQDM_DISABLE")
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported, which happens later.
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    levels = [(library, library.get_verbosity()) for library in (of_diffusers, of_transformers)]
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        for library, _ in levels:
            library.set_verbosity(of_diffusers.ERROR if quiet else of_diffusers.INFO)
        try:
            yield
        finally:
            for library, level in levels:
                library.set_verbosity(level)
            for variable, token in tokens:
                variable.reset(token)
            if quiet:
                os.environ.pop("TQDM_DISABLE")
            if before is not None:
                os.environ["TQDM_DISABLE"] = before


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors of input and disk, and missing packages, into one line and exit code 1."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, ImportError)) and not _is_of_file(error):
            raise
        if _verbose.get():
            traceback.print_exception(error)
        typer.secho(f"Error: {_one_line(error)}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error


def _is_of_file(error: Exception) -> bool:
    from safetensors import SafetensorError  # This is raised for full disks and damaged files.

    return isinstance(error, SafetensorError)


def _one_line(error: Exception) -> str:
    """Return the message of an error without what libraries append on further lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) or type(error).__name__


def say(text: str) -> None:
    """Print a message that is no result, unless `--quiet` was given."""
    if not _quiet.get():
        typer.echo(text)


def show_progress() -> bool:
    """Return whether to show progress bars."""
    return not _quiet.get()


def show(text: str, content: Any, target: Path | None) -> None:
    """Print a result as text or, with `--json`, as JSON; or write the JSON to the file that `--json` names.

    Args:
        text: the result to be read.
        content: the same, JSON-safe.
        target: the value of `--json`.
    """
    as_json = None if target is None else json.dumps(content, indent=2, allow_nan=False)
    if as_json is None or str(target) != "-":
        typer.echo(text)
    else:
        typer.echo(as_json)
    if as_json is not None and str(target) != "-":
        assert target is not None
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(as_json + "\n", encoding="utf-8")


def check_output(file: Path, overwrite: bool) -> None:
    """Refuse to replace a file, or the files of a folder, without `--overwrite`, before any work is done.

    Raises:
        ValueError: it is there, and `overwrite` is not.
        OSError: it cannot be there, because a part of its path is a file.
    """
    is_filled = any(file.iterdir()) if file.is_dir() else file.exists()
    if is_filled and not overwrite:
        raise ValueError(f"{file} is there already. Choose another name, or replace it with --overwrite.")
    file.parent.mkdir(parents=True, exist_ok=True)


def default_prompts(*folders: str | None) -> Path:
    """Return `prompts.tsv` of the first folder that has one.

    Raises:
        ValueError: none has.
    """
    files = [Path(folder) / "prompts.tsv" for folder in folders if folder is not None]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ValueError("No prompts: give a file with --prompts.")
    return found
