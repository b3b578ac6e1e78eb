"""Caption files as they are published: PartiPrompts' TSV, COCO's annotation JSON, a text file with one a line."""

from __future__ import annotations

import os
from pathlib import Path

from ..prompts import Prompt, read_captions, read_prompts
from .json_files import read_json, require_fields, wrong_file

PARTI_PROMPTS = "https://github.com/google-research/parti/blob/main/PartiPrompts.tsv"
COCO = "https://cocodataset.org/#download (captions_val2014.json in the annotations of 2014)"

_WHAT = "a file of COCO's captions"


def read_caption_file(path: str | os.PathLike[str]) -> list[Prompt]:
    """Read captions, with their categories where the file has them.

    Args:
        path: PartiPrompts' TSV, or another with a `Prompt` column; COCO's annotations (*.json), of which the first
            caption of each picture is taken, in the order of the pictures' ids; or text with a caption a line.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is none of these.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}. PartiPrompts is at {PARTI_PROMPTS}; COCO at {COCO}.")
    if Path(path).suffix == ".json":
        return [Prompt(caption) for caption in _coco_captions(path)]
    if Path(path).suffix == ".txt":
        return [Prompt(caption) for caption in read_captions(path)]
    return read_prompts(path)


def _coco_captions(path: str | os.PathLike[str]) -> list[str]:
    content = read_json(path, _WHAT, COCO)
    require_fields(content, {"annotations": list}, os.fspath(path), _WHAT, COCO)
    first: dict[int, tuple[int, str]] = {}
    seen = set()
    for number, item in enumerate(content["annotations"], start=1):
        where = f"{path}, annotation {number}"
        require_fields(item, {"id": int, "image_id": int, "caption": str}, where, _WHAT, COCO)
        if item["id"] in seen:
            raise wrong_file(where, _WHAT, COCO, f"the id {item['id']} is there twice")
        seen.add(item["id"])
        entry = (item["id"], " ".join(item["caption"].split()))
        first[item["image_id"]] = min(first.get(item["image_id"], entry), entry)
    if not first:
        raise wrong_file(path, _WHAT, COCO, "it holds no captions")
    return [first[image][1] for image in sorted(first)]
