"""Constants of a few bits in an OpenVINO model, in the form that its CPU plug-in decompresses in matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Element:
    """An element type of OpenVINO for codes.

    Attributes:
        type: its name in `openvino.Type`.
        bits: bits of an element.
        zero_point: what is added to the codes, for a type without negative values; else 0.
    """

    type: str
    bits: int
    zero_point: int = 0


def element(bits: int) -> Element:
    """Return the smallest element type that holds the codes of packed layers of `bits`.

    Three levels take two bits, five and nine take four; seventeen are one too many for four bits.
    """
    if bits == 1:
        return Element("u2", 2, zero_point=1)
    return Element("i4", 4) if bits <= 3 else Element("i8", 8)


def pack_elements(codes: np.ndarray, kind: Element) -> np.ndarray:
    """Pack codes int8 [...] into the bytes of an OpenVINO tensor, the first element in the low bits; uint8 [bytes]."""
    values = (codes.reshape(-1) + kind.zero_point).astype(np.uint8) & (2**kind.bits - 1)
    per_byte = 8 // kind.bits
    values = np.pad(values, (0, -len(values) % per_byte)).reshape(-1, per_byte)
    packed = np.zeros(len(values), np.uint8)
    for position in range(per_byte):
        packed |= values[:, position] << (kind.bits * position)
    return packed


def use_low_bits(model: Any, bits: Mapping[str, int], prefix: str) -> None:
    """Replace the int8 codes of a converted model by constants of fewer bits, in place.

    The codes stay constants of the model, so that it is small on the disk. In memory the CPU plug-in (2026.4) keeps
    the weights of matrix products and of 1×1 convolutions in these types and decompresses them in each call; those of
    other convolutions it decompresses when it compiles the model.

    Args:
        model: `openvino.Model` of an `nn.traceable` model.
        bits: of each layer, by its name, from `make_traceable`.
        prefix: of these names in the traced module, with the dot.
    """
    import openvino
    from openvino import opset13

    for node in model.get_ordered_ops():
        name, _, buffer = node.get_friendly_name().removeprefix(prefix).rpartition(".")
        if node.get_type_name() != "Constant" or buffer != "codes" or name not in bits:
            continue
        kind = element(bits[name])
        (cast,) = [target.get_node() for target in node.output(0).get_target_inputs()]
        (product,) = [target.get_node() for target in cast.output(0).get_target_inputs()]
        scale = product.input_value(1).get_node().data
        shape = list(node.get_output_shape(0))
        # The tensor has memory of its own.
        tensor = openvino.Tensor(getattr(openvino.Type, kind.type), openvino.Shape(shape))
        tensor.data.view(np.uint8).reshape(-1)[:] = pack_elements(node.data, kind)
        values = opset13.convert(openvino.op.Constant(tensor), "f16")
        if kind.zero_point:
            offset = opset13.constant(np.full([1] * len(shape), kind.zero_point, np.uint8))
            values = opset13.subtract(values, opset13.convert(offset, "f16"))
        scaled = opset13.multiply(values, opset13.constant(scale.astype(np.float16)))
        weight = opset13.convert(scaled, "f32")
        weight.set_friendly_name(name)
        product.output(0).replace(weight.output(0))
