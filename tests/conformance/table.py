"""The table of docs/classes.md: `python -m tests.conformance.table` runs all checks and writes it.

`python -m tests.conformance.table WanTransformer3DModel ...` prints the rows of some classes.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import diffusers
import torch

from .catalog import CASES, classes, share_packed
from .checks import CHECKS, run_all

PAGE = Path(__file__).resolve().parents[2] / "docs" / "classes.md"
_HEADER = f"""# Every model class

Written by `python -m tests.conformance.table`; `tests/conformance/test_classes.py` compares some rows with what a run
gives. A row for every model class of diffusers {diffusers.__version__} that has weights.

**share** is that of all parameters, biases and norms included, which are packed at the size that the class
has by default (embeddings stay, unless `embeddings=True`). The other columns are of a tiny model of random
weights, at 4 bits: it computes exactly what the dequantized model computes, also after it was saved and
reloaded, or quantized while loading; its gradients in the inputs are the dequantized model's; a call decodes as many
weights as it uses; and in `compute="int8"` it changes its outputs by 30 % at most. – means that no tiny model
of the class is in `tests/conformance` yet, or that the float model has no gradient in these inputs.
"""


def row(name: str) -> str:
    """Run everything for a class and return its line."""
    checks = run_all(name, CASES[name]) if name in CASES else dict.fromkeys(CHECKS, "–")
    return f"| `{name}` | {_share(name)} | {' | '.join(checks[title] for title in CHECKS)} |"


def _share(name: str) -> str:
    try:
        return f"{share_packed(name):.2%}".replace("%", " %")
    except Exception as error:
        return f"not built: {type(error).__name__}"


def _summary(rows: list[str]) -> str:
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in rows]
    shares = [float(cell[0].removesuffix(" %")) for cell in cells if cell[0].endswith("%")]
    outcomes = [cell for line in cells for cell in line[1:] if cell != "–"]
    return (
        f"{len(rows)} classes. Share: lowest {min(shares):.2f} %, median {statistics.median(shares):.2f} %, "
        f"{sum(share < 95 for share in shares)} below 95 %. Checks: {outcomes.count('yes')} of {len(outcomes)} hold, "
        f"over {len(CASES)} tiny models."
    )


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    rows = []
    for name in names or classes():
        rows.append(row(name))
        print(rows[-1], flush=True)
    if not names:
        head = f"| class | share | {' | '.join(CHECKS)} |\n|{'---|' * (len(CHECKS) + 2)}"
        PAGE.write_text(f"{_HEADER}\n{_summary(rows)}\n\n{head}\n" + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
