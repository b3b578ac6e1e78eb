"""Prompt sets: text files with a prompt a line, or tab-separated ones in the layout of PartiPrompts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

_QUOTED = re.compile(r'"((?:[^"]|"")*)"')


@dataclass(frozen=True)
class Prompt:
    """A caption; where the file has them, its category and what a scorer needs to know about it."""

    caption: str
    category: str | None = None
    spec: Any = None


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Read a tab-separated UTF-8 file whose header has `Prompt` and optionally `Category` and `Spec` (JSON).

    Column names are compared without case, other columns are ignored. Fields need no quotes; a field that is quoted
    as in CSV, inner quotes doubled, is unquoted. A file of one column without such a header, and not
    named *.tsv, is read as a prompt a line, empty lines left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: not UTF-8, no `Prompt` column, no prompt at all, an empty field or a `Spec` that is not JSON.
    """
    lines = _lines(path)
    header = _header(lines)
    if "prompt" not in header and len(header) < 2 and Path(path).suffix != ".tsv":
        return [Prompt(caption) for caption in _plain_lines(path, lines)]
    if header and "prompt" not in header:
        raise ValueError(f"{path} has no column 'Prompt'; its first line names {', '.join(map(repr, header))}.")
    prompts = [
        _prompt(dict(zip(header, _fields(line), strict=False)), header, f"{path}, line {number}")
        for number, line in enumerate(lines[1:], start=2)
        if line.strip()
    ]
    if not prompts:
        raise ValueError(f"{path} holds no prompts.")
    return prompts


def read_captions(path: str | os.PathLike[str]) -> list[str]:
    """Captions of a file that `read_prompts` reads, or of a text file with one a line; empty lines are left out.

    Raises:
        OSError, ValueError: as of `read_prompts`.
    """
    lines = _lines(path)
    if "prompt" in _header(lines):
        return [prompt.caption for prompt in read_prompts(path)]
    return _plain_lines(path, lines)


def _plain_lines(path: str | os.PathLike[str], lines: Sequence[str]) -> list[str]:
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise ValueError(f"{path} holds no prompts.")
    return captions


def sample_prompts(prompts: Sequence[T], count: int | None) -> list[T]:
    """`count` of the prompts in their order, always the same ones; all of them where `count` is None.

    Drawn at random, because files are often sorted by category.

    Raises:
        ValueError: `count` is not between 1 and the number of prompts.
    """
    if count is None:
        return list(prompts)
    if not 1 <= count <= len(prompts):
        raise ValueError(f"Cannot take {count} of {len(prompts)} prompts.")
    chosen = np.random.default_rng(0).permutation(len(prompts))[:count]
    return [prompts[index] for index in sorted(chosen)]


def _lines(path: str | os.PathLike[str]) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig") as stream:
            return [line.rstrip("\n") for line in stream]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def _header(lines: list[str]) -> list[str]:
    return [name.strip().lower() for name in _fields(lines[0])] if lines else []


def _fields(line: str) -> list[str]:
    # Unlike the csv module, a quote that opens a prompt (as in `"Stop" on a sign`) cannot swallow the lines after it.
    return [
        match[1].replace('""', '"') if (match := _QUOTED.fullmatch(field)) else field for field in line.split("\t")
    ]


def _prompt(row: dict[str, str], header: list[str], where: str) -> Prompt:
    for column in ("prompt", "category"):
        if column in header and not row.get(column, "").strip():
            raise ValueError(f"{where}: the {column} is empty.")
    spec = row.get("spec", "").strip()
    try:
        parsed = json.loads(spec) if spec else None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: the spec is not JSON ({error}).") from error
    return Prompt(row["prompt"].strip(), row["category"].strip() if "category" in header else None, parsed)
