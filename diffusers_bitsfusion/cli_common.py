"""What the commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors of input and disk, and missing packages, into one line and exit code 1."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error


def default_prompts(*folders: str | None) -> Path:
    """`prompts.tsv` of the first folder that has one.

    Raises:
        ValueError: none has.
    """
    files = [Path(folder) / "prompts.tsv" for folder in folders if folder is not None]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ValueError("No prompts: give a file with --prompts.")
    return found
