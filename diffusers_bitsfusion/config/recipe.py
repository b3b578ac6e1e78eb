"""`Recipe`: the bits of each layer, loaded from the package, a file or the Hub."""

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
from ..utils.json_files import MAX_MODEL_BYTES, is_count, parse_json, read_bounded

# Name of a recipe's file in a folder or repository.
RECIPE_FILE = "recipe.json"

# Name of the shipped recipe.
PUBLISHED = "stable-diffusion-v1-5"


class Recipe(Mapping[str, int]):
    """Read-only mapping of layer name to bits; a layer of n bits has 2**n + 1 levels (255 at 8).

    Attributes:
        source: origin of the bits; None where unknown.
        shapes: weight shape by module name, where known.

    Args:
        layers: bits by module name, each from 1 to 8.
        source: origin of the bits, kept in the file.
        shapes: weight shape by module name, where known; `fits` checks them.

    Raises:
        ValueError: bits outside 1 to 8, the message names the layer; or no mappings.
    """

    def __init__(
        self,
        layers: Mapping[str, int],
        *,
        source: str | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        shapes = {} if shapes is None else shapes
        if not isinstance(layers, Mapping) or not isinstance(shapes, Mapping):
            raise ValueError(
                f"layers and shapes of a recipe must be mappings, got {shown(layers)} and {shown(shapes)}"
            )
        if wrong := [name for name, shape in shapes.items() if not _is_shape(shape)]:
            raise ValueError(f"shape of layer {wrong[0]!r} must be a list of sizes, got {shown(shapes[wrong[0]])}")
        self._layers = {name: check_bits(bits, f"bits of layer {name!r}") for name, bits in layers.items()}
        self.source = source
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}

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
        """Return the number of layers by bits."""
        return Counter(self._layers.values())

    def fits(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether every layer of the recipe is in `shapes`, with the same shape where the recipe knows it."""
        return all(name in shapes and self.shapes.get(name, shapes[name]) == tuple(shapes[name]) for name in self)

    def average_bits(self, model: ModelMixin) -> AverageBits:
        """Return the average bits a weight of `model` under this recipe, in both conventions (paper, section 5).

        The first and the last layer count 8 bits; a time embedding that can be cached counts as 50 cached steps.

        Args:
            model: UNet or transformer, quantized or not.

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
        """Load a recipe.

        Args:
            name_or_path: name of the shipped one ("stable-diffusion-v1-5"), a JSON file, a folder with recipe.json, or
                a Hub id ("user/name").
            token: token for the Hub; the stored one when left out.

        Raises:
            DamagedFileError: the file is not a recipe.
            FileNotFoundError: none of these exists.
            OSError: the Hub has no such repository or file, or cannot be reached.
        """
        shipped = resources.files(__package__).joinpath("recipes", f"{name_or_path}.json")
        path = Path(name_or_path)
        if path.is_dir():
            path = path / RECIPE_FILE
        if path.is_file():
            content = read_bounded(path, max_bytes=MAX_MODEL_BYTES)
        elif shipped.is_file():
            content = shipped.read_bytes()
        elif str(name_or_path).count("/") == 1 and path.suffix != ".json":
            file = hf_hub_download(str(name_or_path), RECIPE_FILE, token=token)
            content = read_bounded(Path(file), max_bytes=MAX_MODEL_BYTES)
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
        """Write the recipe as JSON; into a folder, as recipe.json.

        Args:
            path: file or existing folder.

        Raises:
            OSError: the file cannot be written.
        """
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
        """Upload the recipe as recipe.json to a model repository, made where it is missing; `load` accepts its id.

        Args:
            repo_id: "user/name".
            commit_message: message of the commit.
            private: whether a new repository is private.
            token: token for the Hub; the stored one when left out.
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
        return json.dumps({key: value for key, value in data.items() if value}, indent=1) + "\n"


def _is_shape(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(is_count(size, 1) for size in value)


def _num_weights(layer: nn.Linear | nn.Conv2d) -> int:
    """Return the number of weights of a layer, without decoding a packed one."""
    if isinstance(layer, PackedWeight):
        return math.prod(layer.weight_shape)
    return layer.weight.numel()
