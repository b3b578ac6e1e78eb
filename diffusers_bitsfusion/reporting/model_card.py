"""The model card that is written beside a packed model or pipeline."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported without saying so
from yaml import YAMLError

from ..codec.weight_files import stem, weight_files
from ..utils.installation import install_command
from ..utils.json_files import read_json
from .histogram import draw_histogram
from .report_types import MB, PipelineSizeReport, SizeReport
from .size_report import size_report

_CARD_FILE = "README.md"
_TAG = "bitsfusion"

_BODY = """
# {title}

A `{kind}` whose weights are packed at {bits}, by
[BitsFusion](https://arxiv.org/abs/2406.04333) as implemented in `diffusers_bitsfusion`.

```bash
{install}
```

```python
import torch
import diffusers_bitsfusion  # registers the method; without it diffusers says "Unknown quantization type"
from diffusers import {kind}

{variable} = {kind}.from_pretrained("{title}", {variant}dtype={dtype})
```

{made}

## Size

{figures}
"""


_TRAINED = "trained in this precision"
_MADE = {
    "trained": f"The weights were {_TRAINED} (quantization-aware training).",
    "tuned": "The weights were rounded for the inputs that their layers see ({run}); then scales, biases and norms "
    "were tuned in {tuning_steps} steps.",
    "calibrated": "The weights were rounded for the inputs that their layers see ({run}).",
    "rounded": "The weights were rounded without calibration.",
}
_RUN = "{num_samples} images of {num_inference_steps} steps, prompts: {prompts}, seed {seed}"
# Average bits over the quantized layers, below which a rounded model of Stable Diffusion generates noise.
NOISY_BITS = 3.0
_NOISE = (
    " At about 2 bits a weight a model of Stable Diffusion then generates noise, until it is calibrated or trained in "
    "quantized form."
)

# Texts of cards that diffusers or this package generated, which no card of a user's own has.
_OWN_MARK = "as implemented in `diffusers_bitsfusion`"
_GENERATED_MARKS = ("This model card has been automatically generated", _OWN_MARK)

# Metadata that a quantized model has in common with its original.
_CARRIED = ("license", "license_name", "license_link", "pipeline_tag", "language")


def is_users_own(folder: Path) -> bool:
    """Return whether `folder` has a card that nobody generated, which must not be replaced."""
    card = folder / _CARD_FILE
    return card.exists() and not any(mark in _read(card) for mark in _GENERATED_MARKS)


def _read(card: Path) -> str:
    """Read a card in any encoding: others wrote it, and only metadata and marks in ASCII are looked for."""
    return card.read_text(encoding="utf-8", errors="replace")


def write_card(folder: Path, saved: Any, title: str, token: str | None = None) -> None:
    """Write the card of a saved model or pipeline, and an image of each recipe beside it.

    Licence and base model come from the card of the model that it was made from, where there is one: in its folder,
    in the Hub's cache, or on the Hub.

    Args:
        folder: where it was saved.
        saved: the model or pipeline itself.
        title: what the card calls it, a folder name or Hub id.
        token: for the Hub, to read the card of a private base model; not written anywhere.
    """
    kind = type(saved).__name__
    report = size_report(folder)
    reports = report.quantized if isinstance(report, PipelineSizeReport) else {kind: report}
    quantized = folder / next(iter(reports)) if isinstance(report, PipelineSizeReport) else folder
    variant = str(stem(weight_files(quantized)[0].name)).partition(".")[2]
    body = _BODY.format(
        title=title,
        kind=kind,
        install=install_command(),
        bits=_bits({name: part.average_bits.layers for name, part in reports.items()}),
        variant=f'variant="{variant}", ' if variant else "",
        dtype=saved.dtype,
        variable="pipe" if isinstance(report, PipelineSizeReport) else "model",
        made=_made(saved, reports),
        figures="\n\n".join(_figures(name, part) for name, part in reports.items()),
    )
    for name, part in reports.items():
        image = draw_histogram(part.histogram, f"{name}: share of the weights by bits")
        image.save(folder / _image_name(name), optimize=True)
    data = ModelCardData(library_name="diffusers", **_lineage(str(saved.config.get("_name_or_path") or ""), token))
    data.tags = [_TAG, "quantized", "diffusers_bitsfusion"]
    ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(folder / _CARD_FILE)


def origin(folder: Path) -> str:
    """Return the origin of the quantized weights in a folder: "trained", "tuned", "calibrated" or "rounded".

    Args:
        folder: of a pipeline or model that this package saved.
    """
    card = folder / _CARD_FILE
    if card.is_file() and _says_trained(card):
        return "trained"
    configs = [read_json(file, non_finite=True) for file in sorted(folder.glob("**/config.json"))]
    said = [(config.get("quantization_config") or {}).get("calibration") for config in configs]
    calibration = next((entry for entry in said if entry), None)
    return _origin(calibration)


def _says_trained(card: Path) -> bool:
    text = _read(card)
    return _OWN_MARK in text and _TRAINED in text.lower()


def _origin(calibration: Mapping[str, Any] | None) -> str:
    if not calibration:
        return "rounded"
    return "tuned" if calibration.get("tuning_steps") else "calibrated"


def check_card(folder: Path) -> None:
    """Refuse a folder without a card of this package.

    Raises:
        FileNotFoundError: it has none, or a user's own.
    """
    card = folder / _CARD_FILE
    if not card.is_file() or _OWN_MARK not in _read(card):
        raise FileNotFoundError(f"{folder} has no card written by diffusers_bitsfusion; save the model there first.")


def add_section(folder: Path, title: str, text: str) -> None:
    """Put a section (the training command, scores) at the end of a card, in place of one with the same title.

    The next save, which writes the card again, drops it: what it says was true of the weights in `folder`.

    Raises:
        FileNotFoundError: see `check_card`.
    """
    check_card(folder)
    card = folder / _CARD_FILE
    sections = re.split(r"\n(?=## )", card.read_text(encoding="utf-8").rstrip() + "\n")
    kept = [section for section in sections if not section.startswith(f"## {title}\n")]
    card.write_text("\n".join([*kept, f"## {title}\n\n{text}\n"]), encoding="utf-8")


def predicts_noise(model: Any) -> bool:
    """Return whether a model is neither an autoencoder nor a text encoder, which tolerate rounding better."""
    module = type(model).__module__
    return ".autoencoders." not in module and not module.startswith("transformers.")


def _made(saved: Any, reports: Mapping[str, SizeReport]) -> str:
    """Return the card's sentences on the origin of the weights, those of the denoiser where it is among them."""
    models = {name: getattr(saved, name, saved) for name in reports}
    name = next((name for name, model in models.items() if predicts_noise(model)), next(iter(models)))
    quantizer, source = models[name].hf_quantizer, _local_card(str(saved.config.get("_name_or_path") or ""))
    if getattr(quantizer, "trained", False) or (source is not None and _says_trained(source)):
        return _MADE["trained"]
    calibration = quantizer.quantization_config.calibration
    if calibration:
        return _MADE[_origin(calibration)].format(run=_RUN.format(**calibration), **calibration)
    is_noise = predicts_noise(models[name]) and reports[name].average_bits.layers < NOISY_BITS
    return _MADE["rounded"] + (_NOISE if is_noise else "")


def _lineage(name_or_path: str, token: str | None) -> dict[str, Any]:
    """Return the metadata that tell of the original model: its Hub id, and what its own card says."""
    hub_id = _hub_id(name_or_path)
    source = None
    try:
        card = Path(hf_hub_download(hub_id, _CARD_FILE, token=token)) if hub_id else _local_card(name_or_path)
        source = ModelCard(_read(card), ignore_metadata_errors=True).data if card else None
    except GatedRepoError:
        pass  # The repository exists, though its card is not public.
    except RepositoryNotFoundError:
        hub_id = None  # The name is a path that is gone, not a Hub id.
    except (OSError, ValueError, YAMLError):
        pass  # Without network, or with a missing or damaged card, this card lacks what it would have said.
    carried = {key: source.get(key) for key in _CARRIED} if source else {}
    if source and _TAG in (source.get("tags") or []):  # A quantized source has the same original.
        hub_id = source.get("base_model")
    return carried | {"base_model": hub_id, "base_model_relation": "quantized" if hub_id else None}


def _hub_id(name_or_path: str) -> str | None:
    """Return "user/name" of a Hub id or of a folder in the Hub's cache; a local path says nothing to others."""
    cached = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots", name_or_path)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if name_or_path.count("/") != 1 or Path(name_or_path).exists():
        return None
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return name_or_path


def _local_card(name_or_path: str) -> Path | None:
    """Return the card in a model's folder, or in that of the pipeline around it."""
    folders = [Path(name_or_path), Path(name_or_path).parent] if name_or_path else []
    return next((folder / _CARD_FILE for folder in folders if (folder / _CARD_FILE).is_file()), None)


def _bits(averages: dict[str, float]) -> str:
    shown = [f"{average:.2f} bits" for average in averages.values()]
    if len(shown) == 1:
        return f"{shown[0]} each on average"
    return "on average " + ", ".join(f"{bits} ({name})" for name, bits in zip(averages, shown, strict=True))


def _image_name(name: str) -> str:
    return f"bits_{name}.png"


def _figures(name: str, report: SizeReport) -> str:
    bits = report.average_bits
    rows = [
        ("bytes on disk", f"{report.total_bytes / MB:.2f} MB, {report.ratio:.2f} times smaller than fp16"),
        ("bits a weight, the paper's formula", f"{bits.paper:.3f}"),
        ("bits a weight, over the quantized layers", f"{bits.layers:.3f}"),
        ("bits a weight, all bytes of the file", f"{report.real_bits:.3f}"),
        ("layers by bits", ", ".join(f"{n} of {b}" for b, (n, _) in sorted(report.histogram.items()))),
    ]
    rows += [("left in floating point", f"{count:,} weights: {reason}") for reason, count in report.left.items()]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"| {name} | |\n|---|---|\n{table}\n\n![bits of the layers of {name}]({_image_name(name)})"
