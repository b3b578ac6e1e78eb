"""Bits per layer: the `Recipe`, the one shipped, and loading others."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path

from diffusers import ModelMixin
from huggingface_hub import HfApi, hf_hub_download
from torch import nn

from ..allocation.average_bits import IN_OUT_LAYERS, PAPER_TIMESTEPS, AverageBits, average_bits, cached_bits
from ..codec.grid import check_bits
from ..nn.packed import PackedWeight
from ..nn.time_features import TimeFeatures
from ..nn.time_path import TimePath
from ..utils.errors import DamagedFileError, shown
from ..utils.files import write_atomically
from ..utils.hub import explaining_refusals
from ..utils.json_files import is_count, parse_json, read_bounded

RECIPE_FILE = "recipe.json"
PUBLISHED = "stable-diffusion-v1-5"


class Recipe(Mapping[str, int]):
    """Layer name to bits; a layer of n bits has 2**n + 1 levels (255 at 8).

    Behaves as a read-only mapping: `len`, iteration, `recipe["conv_in"]`.

    Args:
        layers: bits by module name, each from 1 to 8.
        source: where the bits come from, kept in the file.
        shapes: weight shape by module name, where known; `fits` checks them.

    Raises:
        ValueError: bits outside 1 to 8; the message names the layer.
    """

    def __init__(
        self,
        layers: Mapping[str, int],
        *,
        source: str | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ):
        self._layers = {name: check_bits(bits, f"bits of layer {name!r}") for name, bits in layers.items()}
        self.source = source
        self.shapes = {name: tuple(shape) for name, shape in (shapes or {}).items()}

    def __getitem__(self, name: str) -> int:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        histogram = ", ".join(f"{count} of {bits} bit" for bits, count in sorted(self.histogram().items()))
        return f"Recipe({len(self)} layers: {histogram})"

    def histogram(self) -> Counter[int]:
        """Number of layers by bits."""
        return Counter(self._layers.values())

    def fits(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether every layer of this recipe is in `shapes`, with the same shape where this recipe knows it."""
        return all(name in shapes and self.shapes.get(name, shapes[name]) == tuple(shapes[name]) for name in self)

    def average_bits(self, model: ModelMixin) -> AverageBits:
        """Average bits a weight of `model`, quantized or not, under this recipe, in both conventions.

        First and last layers count 8 bits; a time embedding that can be cached counts as 50 cached steps.

        Raises:
            ValueError: the recipe names layers that the model lacks.
        """
        weights = {
            name: _num_weights(module)
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
        }
        missing = [name for name in self if name not in weights]
        if missing:
            raise ValueError(f"The recipe names layers that the model lacks: {', '.join(missing[:5])}.")
        removed = features = 0
        if isinstance(getattr(model, "time_proj", None), TimeFeatures):
            time_features = model.hf_quantizer.quantization_config.schema.time_features
            removed, features = time_features.removed_weights, time_features.num_features
        elif (path := TimePath.find(model)) is not None:
            removed, features = sum(weights.pop(name) for name in path.layers), sum(size for _, size in path.sizes)
        bits = {name: 8 for name in weights if name in IN_OUT_LAYERS} | dict(self)
        return average_bits(
            {name: (bits[name], count) for name, count in weights.items() if name in bits},
            other_weights=sum(count for name, count in weights.items() if name not in bits),
            removed_weights=removed,
            cached=cached_bits(features, len(PAPER_TIMESTEPS)),
        )

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str], *, token: str | None = None) -> Recipe:
        """A recipe by the name of a shipped one ("stable-diffusion-v1-5"), a JSON path, a folder, or a Hub id.

        Raises:
            FileNotFoundError: none of these exists.
            ValueError: the file is not a recipe.
        """
        shipped = resources.files(__package__).joinpath("recipes", f"{name_or_path}.json")
        path = Path(name_or_path)
        if path.is_dir():
            path = path / RECIPE_FILE
        if path.is_file():
            content = read_bounded(path)
        elif shipped.is_file():
            content = shipped.read_bytes()
        elif str(name_or_path).count("/") == 1 and path.suffix != ".json":
            content = read_bounded(Path(hf_hub_download(str(name_or_path), RECIPE_FILE, token=token)))
        else:
            raise FileNotFoundError(
                f"No recipe {str(name_or_path)!r}: it is neither a shipped name ({PUBLISHED!r}), nor an existing JSON "
                'file, nor a Hub id ("user/name").'
            )
        return cls._from_json(content, str(name_or_path))

    @classmethod
    def _from_json(cls, content: bytes, where: str) -> Recipe:
        data = parse_json(content, where)
        if not isinstance(data.get("layers"), dict):
            raise DamagedFileError(where, 'is not a recipe: it needs a "layers" object of module name to bits')
        shapes = data.get("shapes", {})
        if not isinstance(shapes, dict) or not all(_is_shape(shape) for shape in shapes.values()):
            raise DamagedFileError(
                where, 'is not a recipe: "shapes" must be an object of module name to a list of sizes'
            )
        source = data.get("source")
        if not isinstance(source, (str, type(None))):
            raise DamagedFileError(where, f'is not a recipe: "source" must be a text, not {shown(source)}')
        try:
            return cls(data["layers"], source=source, shapes=shapes)
        except ValueError as error:
            raise DamagedFileError(where, f"is not a recipe: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as JSON; into a folder, as recipe.json."""
        target = Path(path)
        if target.is_dir():
            target = target / RECIPE_FILE
        write_atomically(target, self._to_json())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload recipe",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload the recipe as recipe.json to a model repository, made where it is missing; `load` takes its id.

        Args:
            repo_id: "user/name".
            commit_message: of the upload.
            private: whether a new repository is private.
            token: of the Hub; the stored one when left out.
            create_pr: whether to open a pull request instead of committing.

        Returns:
            URL of the commit.

        Raises:
            HfHubHTTPError: the Hub refuses; the message says what to do.
        """
        api = HfApi(token=token)
        with explaining_refusals(repo_id):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_file(
                path_or_fileobj=self._to_json().encode(),
                path_in_repo=RECIPE_FILE,
                repo_id=repo_id,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    def _to_json(self) -> str:
        data = {"source": self.source, "layers": self._layers, "shapes": self.shapes}
        return json.dumps({k: v for k, v in data.items() if v}, indent=1) + "\n"


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(is_count(size, 1) for size in value)


def _num_weights(layer: nn.Linear | nn.Conv2d) -> int:
    """Weights of a layer, without decoding a packed one."""
    if isinstance(layer, PackedWeight):
        return math.prod(layer.weight_shape)
    return layer.weight.numel()
