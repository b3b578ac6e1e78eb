"""Names of the weight files that diffusers writes into a model folder."""

from __future__ import annotations

import re
from pathlib import Path

_SHARD = re.compile(r"(?P<stem>.+?)-\d{5}-of-\d{5}(?P<end>\.(safetensors|bin))")
_ENDS = (".safetensors", ".bin")
_STEMS = ("diffusion_pytorch_model", "model")  # of diffusers' models and of transformers'


def stem(name: str) -> str | None:
    """ "diffusion_pytorch_model" (".fp16" with a variant) of a weight file, a shard or an index; None of others."""
    if name.endswith(".index.json"):
        name = name.removesuffix(".index.json")
    shard = _SHARD.fullmatch(name)
    if shard:
        return shard["stem"]
    return next((name.removesuffix(end) for end in _ENDS if name.endswith(end)), None)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model in `folder`, all shards; where there are variants, of the plain one.

    Raises:
        FileNotFoundError: there is none.
    """
    files = [file for file in sorted(folder.glob("*.safetensors")) if _is_of_a_model(str(stem(file.name)))]
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file of a model ({', '.join(_STEMS)}).")
    first = min((str(stem(file.name)) for file in files), key=len)
    return [file for file in files if stem(file.name) == first]


def _is_of_a_model(stem: str) -> bool:
    """Not those of adapters, which may lie beside it."""
    return stem.partition(".")[0] in _STEMS
