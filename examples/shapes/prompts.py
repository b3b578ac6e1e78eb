"""The held-out prompts as a file for `bitsfusion evaluate`, and the scorer that reads its specifications.

python -m examples.shapes.prompts --out prompts.tsv
bitsfusion evaluate PIPELINE --prompts prompts.tsv --scorer examples.shapes.prompts:score
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from . import scorer
from .captions import heldout_prompts
from .scenes import ObjectSpec, PromptSpec


def score(images: Sequence[np.ndarray], specs: Sequence[Mapping]) -> list[bool]:
    """Whether each image (h, w, 3) uint8 shows what its specification, parsed from the file's JSON, asks for."""
    return scorer.score(images, [_parse(spec) for spec in specs])


def write_prompts(path: Path, n: int = 600, seed: int = 1024) -> None:
    """Write `heldout_prompts(n, seed)` as tab-separated Prompt, Category and Spec (JSON)."""
    lines = ["Prompt\tCategory\tSpec"]
    for prompt in heldout_prompts(n, seed):
        lines.append(f"{prompt.caption}\t{prompt.spec.category}\t{json.dumps(asdict(prompt.spec))}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _parse(spec: Mapping) -> PromptSpec:
    return PromptSpec(spec["category"], tuple(ObjectSpec(**item) for item in spec["objects"]), spec["relation"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the held-out prompts as a tab-separated file.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=600, help="number of held-out prompts")
    parser.add_argument("--seed", type=int, default=1024)
    args = parser.parse_args()
    write_prompts(args.out, args.prompts, args.seed)


if __name__ == "__main__":
    main()
