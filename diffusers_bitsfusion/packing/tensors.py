"""Parameters that are packed though their module is neither an ordinary Linear nor Conv2d."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedModel

from ..codec.schema import TENSOR_PREFIX, LayerSchema
from ..nn.conversion import why_not_packable

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
# Parameters of attention in one module (`nn.MultiheadAttention`).
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# Names of the direction of a weight whose length is a parameter of its own (weight normalisation, arXiv 1602.07868):
# in torch's old form beside the layer's other parameters, in its new one in a list of what a weight is computed from.
_DIRECTION = "weight_v"
_ORIGINALS = ("original", "original1")


@dataclass(frozen=True)
class TensorPlace:
    """A parameter, and how it becomes rows that are rounded each with a scale of its own.

    Attributes:
        owner: name of its module.
        parameter: its own name.
        shape: of the rows, an output channel first; see `LayerSchema`.
        order: axes of the parameter in those of `shape`; empty where they are the same.
        row_dims: leading axes of `shape` that make the rows.
    """

    owner: str
    parameter: str
    shape: tuple[int, ...]
    order: tuple[int, ...] = ()
    row_dims: int = 1

    @property
    def name(self) -> str:
        """Name in a plan and a checkpoint."""
        return ".".join(part for part in (self.owner, TENSOR_PREFIX + self.parameter) if part)

    @property
    def full_parameter(self) -> str:
        """Name of the parameter in the model."""
        return ".".join(part for part in (self.owner, self.parameter) if part)

    @property
    def num_weights(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    def schema(self, bits: int, scale_dtype: str) -> LayerSchema:
        """Return the schema with `bits` and scales of `scale_dtype`."""
        return LayerSchema(bits, self.shape, order=self.order, row_dims=self.row_dims, scale_dtype=scale_dtype)


def packable_tensors(
    model: nn.Module, exclude: Iterable[str] = (), embeddings: bool = False
) -> dict[str, TensorPlace]:
    """Return the parameters to pack beside the ordinary Linear and Conv2d layers, by their name in a plan.

    They are the weights of other convolutions, transposed ones included, of subclasses of Linear and Conv2d that
    compute otherwise, of layers with hooks or weight normalisation, of `nn.MultiheadAttention`, and of experts that
    one module holds in a parameter of three dimensions. Models of transformers have none.

    Args:
        model: model in full precision, which may be on the meta device.
        exclude: names of modules that stay as they are.
        embeddings: whether tables of embeddings are packed, too.
    """
    if isinstance(model, PreTrainedModel):
        return {}
    patterns = [f".{pattern}." for pattern in exclude]
    places = {}
    for owner, module in model.named_modules():
        if not any(pattern in f".{owner}." for pattern in patterns):
            places.update({place.name: place for place in _places(owner, module, embeddings)})
    return places


def _places(owner: str, module: nn.Module, embeddings: bool) -> Iterator[TensorPlace]:
    if isinstance(module, (nn.Linear, nn.Conv2d)) and why_not_packable(module) is None:
        return
    transposed = isinstance(module, _TRANSPOSED)
    for name, parameter in module.named_parameters(recurse=False):
        shape = tuple(parameter.shape)
        if len(shape) < 2 or not parameter.is_floating_point():
            continue
        if _is_experts(module, parameter):
            yield TensorPlace(owner, name, (shape[0], shape[2], shape[1]), (0, 2, 1), row_dims=2)
        elif transposed and name in ("weight", _DIRECTION):
            yield TensorPlace(owner, name, (shape[1], shape[0], *shape[2:]), (1, 0, *range(2, len(shape))))
        elif (
            (isinstance(module, _LAYERS) and name in ("weight", _DIRECTION))
            or (isinstance(module, nn.MultiheadAttention) and name in _ATTENTION)
            or (isinstance(module, ParametrizationList) and name in _ORIGINALS)
            or (isinstance(module, nn.Embedding) and embeddings)
        ):
            yield TensorPlace(owner, name, shape)


def _is_experts(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter holds the weights of several experts, [experts, in, out]."""
    return parameter.dim() == 3 and getattr(module, "num_experts", None) == parameter.shape[0]
