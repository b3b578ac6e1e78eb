"""The model card written beside a packed model or pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .accounting import MB, PipelineSizeReport, SizeReport, size_report

_CARD_FILE = "README.md"

_BODY = """
# {title}

A `{kind}` whose weights are packed at about 2 bits each, by
[BitsFusion](https://arxiv.org/abs/2406.04333) as implemented in `diffusers_bitsfusion`.

```bash
pip install diffusers_bitsfusion
```

```python
import diffusers_bitsfusion  # registers the method; without it diffusers says "Unknown quantization type"
from diffusers import {kind}

{variable} = {kind}.from_pretrained("{title}")
```

The weights were rounded to this precision. Unless they were also trained in it (quantization-aware training), a model
of about 2 bits a weight draws noise.

## Size

{figures}
"""


# In a card that diffusers or this package generated, and in no card of a user's own.
_GENERATED = ("This model card has been automatically generated", "as implemented in `diffusers_bitsfusion`")


def is_users_own(folder: Path) -> bool:
    """Whether `folder` has a card that nobody generated, which must not be replaced."""
    card = folder / _CARD_FILE
    return card.exists() and not any(mark in card.read_text(encoding="utf-8") for mark in _GENERATED)


def write_card(folder: Path, saved: Any, title: str) -> None:
    """Write the card of a saved model or pipeline.

    Args:
        folder: where it was saved.
        saved: the model or pipeline itself.
        title: what the card calls it, a folder name or Hub id.
    """
    kind, base_model = type(saved).__name__, saved.config.get("_name_or_path")
    report = size_report(folder)
    reports = report.quantized if isinstance(report, PipelineSizeReport) else {kind: report}
    hub_id = base_model if isinstance(base_model, str) and base_model.count("/") == 1 else None
    if hub_id is not None and Path(hub_id).exists():
        hub_id = None  # a local path says nothing to others
    data = ModelCardData(
        library_name="diffusers",
        base_model=hub_id,
        base_model_relation="quantized" if hub_id else None,
        tags=["bitsfusion", "quantized", "diffusers_bitsfusion"],
    )
    body = _BODY.format(
        title=title,
        kind=kind,
        variable="pipe" if isinstance(report, PipelineSizeReport) else "model",
        figures="\n\n".join(_figures(name, part) for name, part in reports.items()),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(folder / _CARD_FILE)


def _figures(name: str, report: SizeReport) -> str:
    bits = report.average_bits
    rows = [
        ("bytes on disk", f"{report.total_bytes / MB:.2f} MB, {report.ratio:.2f} times smaller than fp16"),
        ("bits a weight, the paper's formula", f"{bits.paper:.3f}"),
        ("bits a weight, over the quantized layers", f"{bits.layers:.3f}"),
        ("bits a weight, all bytes of the file", f"{report.real_bits:.3f}"),
        ("layers by bits", ", ".join(f"{n} of {b}" for b, (n, _) in sorted(report.histogram.items()))),
    ]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"| {name} | |\n|---|---|\n{table}"
