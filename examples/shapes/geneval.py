"""The shapes in GenEval's format: prompts as its lines, and the scorer's parts as its detector and colour classifier.

python -m examples.shapes.geneval --out evaluation_metadata.jsonl
bitsfusion evaluate PIPELINE --suite geneval --geneval-file evaluation_metadata.jsonl \
    --detector examples.shapes.geneval:detect --color-classifier examples.shapes.geneval:name_colors

A line can ask for what the shapes' own rule asks for: a size is a class of its own ("large ring" beside "ring"), and
everything that the prompt does not name is excluded.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import scorer
from .captions import Prompt, heldout_prompts
from .scenes import SHAPES, ObjectSpec, nearest_color

_CONTRAST = 60  # as the scorer's
_GREY = (0x99, 0x99, 0x99)  # what GenEval puts outside of masks


def geneval_line(prompt: Prompt) -> dict[str, Any]:
    """Return the line of GenEval's file that asks for what the prompt asks for, and for nothing else."""
    spec = prompt.spec
    counts = Counter(item.shape for item in spec.objects)
    # A relation names an earlier clause, so the object that it refers to comes first.
    objects = spec.objects[:1] if spec.category == "counting" else spec.objects[::-1]
    include: list[dict[str, Any]] = [_clause(item, counts[item.shape]) for item in objects]
    if spec.relation is not None:
        include[1]["position"] = [spec.relation, 0]
    include += [{"class": f"{item.size} {item.shape}", "count": 1} for item in objects if item.size is not None]
    exclude = [{"class": shape, "count": counts[shape] + 1} for shape in (*SHAPES, scorer.UNKNOWN)]
    return {"tag": spec.category, "include": include, "exclude": exclude, "prompt": prompt.caption}


def detect(images: Sequence[Image.Image]) -> list[list[tuple]]:
    """Return what the scorer finds in each picture: (class name, score, box, mask), sizes as classes of their own."""
    return [_detections(np.asarray(image.convert("RGB"))) for image in images]


def name_colors(crops: Sequence[Image.Image]) -> list[str]:
    """Return the palette's colour nearest to the median of what is not grey in each crop."""
    return [_name_color(np.asarray(crop)) for crop in crops]


def _clause(item: ObjectSpec, count: int) -> dict[str, Any]:
    return {"class": item.shape, "count": count} | ({} if item.color is None else {"color": item.color})


def _detections(pixels: np.ndarray) -> list[tuple]:
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    mask = np.abs(pixels - np.median(border, axis=0)).max(-1) > _CONTRAST
    found = []
    for item in scorer.detect(pixels):
        box = (item.x - item.radius, item.y - item.radius, item.x + item.radius + 1, item.y + item.radius + 1)
        found += [(name, 1.0, box, mask) for name in (item.shape, f"{item.size} {item.shape}")]
    return found


def _name_color(pixels: np.ndarray) -> str:
    inside = pixels[(pixels != _GREY).any(-1)]
    return nearest_color(tuple(np.median(inside, axis=0)))


def write_lines(path: Path, n: int = 600, seed: int = 1024) -> None:
    """Write `heldout_prompts(n, seed)` as lines of GenEval's file."""
    lines = [json.dumps(geneval_line(prompt)) for prompt in heldout_prompts(n, seed)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the held-out prompts as lines of GenEval's file.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=600, help="number of held-out prompts")
    parser.add_argument("--seed", type=int, default=1024)
    args = parser.parse_args()
    write_lines(args.out, args.prompts, args.seed)


if __name__ == "__main__":
    main()
