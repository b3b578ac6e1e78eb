"""What the commands share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from ..utils.hub import local_folder
from ..utils.json_files import read_json


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


def config_folder(source: str) -> Path:
    """The folder of a pipeline or model; of a Hub id a folder with its configs, which are downloaded.

    Raises:
        FileNotFoundError: it is neither a folder nor a Hub id.
        OSError: the Hub has no such repository, or cannot be asked.
    """
    return local_folder(source, ["model_index.json", "config.json", "*/config.json"])


def is_model(folder: Path) -> bool:
    """Whether a `config_folder` is that of a model rather than of a pipeline."""
    return (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()


def read_config(file: Path) -> dict[str, Any]:
    """Return the content of a config.json.

    Raises:
        DamagedFileError: it is no JSON object.
    """
    return read_json(file, non_finite=True)


def refuse_quantized(folder: Path, components: Iterable[str]) -> None:
    """Refuse to quantize what is quantized, which loads as it is whatever is asked for.

    Args:
        folder: a `config_folder`.
        components: of a pipeline, those that would be quantized.

    Raises:
        ValueError: the config of one, or of the model, has a quantization_config.
    """
    for file in (folder / part / "config.json" for part in ("", *components)):
        if file.is_file() and "quantization_config" in read_config(file):
            raise ValueError(f"{file} is of a model that is quantized already. Quantize the original.")


def refuse_destination(source: str, destination: Path, components: Iterable[str]) -> None:
    """Refuse to write where that would destroy an original, or where nothing can be written, before the work begins.

    Args:
        source: a folder or Hub id to read.
        destination: folder to write.
        components: of a pipeline, those that are quantized.

    Raises:
        ValueError: the folders are one, whatever they are called; one is within the other; or the destination holds
            a model in full precision.
        OSError: the destination is no folder, or cannot be written.
    """
    if Path(source).is_dir():
        read, written = Path(source).resolve(), destination.resolve()
        if read == written or destination.exists() and os.path.samefile(source, destination):
            raise ValueError(f"SRC and DST are one folder, {read}: choose another DST, or the original would be lost.")
        if read in written.parents or written in read.parents:
            raise ValueError(f"One of SRC {read} and DST {written} is within the other: choose another DST.")
    for file in (destination / part / "config.json" for part in ("", *components)):
        if file.is_file() and "quantization_config" not in read_config(file):
            raise ValueError(
                f"DST {destination} holds a model that is not quantized ({file}), which would be lost: choose another "
                "DST, or delete it first."
            )
    existing = next(folder for folder in (destination, *destination.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file: choose another DST.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{existing} cannot be written: choose another DST.")
