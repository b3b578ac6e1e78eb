"""The table of docs/classes.md: `python -m tests.conformance.table` runs all checks and writes it.

`python -m tests.conformance.table WanTransformer3DModel ...` renews the rows of some classes.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import diffusers
import torch

from .catalog import CASES, classes, shares
from .checks import CHECKS, run_all

PAGE = Path(__file__).resolve().parents[2] / "docs" / "classes.md"
_HEADER = f"""# Every model class

Written by `python -m tests.conformance.table`; `tests/conformance/test_classes.py` compares some rows with what a run
gives. A row for every model class of diffusers {diffusers.__version__} that has weights.

**packed** is the share of all parameters, biases and norms included, that is packed at the size that the class has by
default. **embeddings** are tables of embeddings, which are packed too with `embeddings=True`. **in fp32** is what the
class says must stay in fp32, which no quantizer of diffusers touches. The other columns are of a tiny model of random
weights, at 4 bits: it computes exactly what the dequantized model computes (`Kandinsky3UNet` within 1e-5, since oneDNN
is given a layout of its own for wide convolutions), also after it was saved and reloaded, or quantized while loading;
its gradients in the inputs are the dequantized model's; a call decodes as many weights as it uses; and in
`compute="int8"` it changes its outputs by 30 % at most. – means that there is nothing to pack, or that the float model
has no gradient in these inputs.
"""


def row(name: str) -> str:
    """Run everything for a class and return its line."""
    share = shares(name)
    checks = run_all(name, CASES[name]) if name in CASES else dict.fromkeys(CHECKS, "–")
    cells = [
        _percent(share.packed),
        *(_percent(part) if part > 5e-5 else "" for part in (share.embeddings, share.fp32)),
    ]
    return f"| {' | '.join([f'`{name}`', *cells, *(checks[title] for title in CHECKS)])} |"


def rows() -> dict[str, str]:
    """Return the lines of the page by class."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def _percent(share: float) -> str:
    return f"{share:.2%}".replace("%", " %")


def _share(cell: str) -> float:
    return float(cell.removesuffix(" %") or 0)


def _summary(lines: dict[str, str]) -> str:
    cells = {name: [cell.strip() for cell in line.split("|")[2:-1]] for name, line in lines.items()}
    packed = {name: _share(line[0]) for name, line in cells.items()}
    outcomes = [cell for line in cells.values() for cell in line[3:] if cell != "–"]
    low = [
        f"`{name}` ({'embeddings' if _share(cells[name][1]) > _share(cells[name][2]) else 'kept in fp32'})"
        for name, share in packed.items()
        if share < 95
    ]
    most = {name: sum(map(_share, line[:3])) for name, line in cells.items()}
    last = min(most, key=most.__getitem__)
    return (
        f"{len(lines)} classes. Packed: median {statistics.median(packed.values()):.2f} %, 95 % or more of all but\n"
        f"{', '.join(low)}; with embeddings and what is kept in fp32 at least {most[last]:.2f} % (`{last}`). "
        f"Checks: {outcomes.count('yes')} of {len(outcomes)} hold, over {len(CASES)} tiny models."
    )


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    lines = rows() if names else {}
    for name in names or classes():
        lines[name] = row(name)
        print(lines[name], flush=True)
    lines = {name: lines[name] for name in classes() if name in lines}
    titles = ("class", "packed", "embeddings", "in fp32", *CHECKS)
    head = f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}"
    PAGE.write_text("\n".join([f"{_HEADER}\n{_summary(lines)}\n\n{head}", *lines.values(), ""]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
