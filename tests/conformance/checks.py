"""What is checked of a model of any class, against its dequantized model."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.nn.compute import packed_layers, set_compute
from diffusers_bitsfusion.nn.packed import PackedWeight
from diffusers_bitsfusion.nn.packed_tensor import PackedTensor
from diffusers_bitsfusion.ops import conv, linear, transforms

from .case import Case, flat_output, tensors

_BITS = 4
# Relative change of outputs by rounding activations to eight bits that no model here exceeds.
_INT8_ERROR = 0.3


def _config() -> BitsFusionConfig:
    return BitsFusionConfig(recipe=_BITS, in_out_bits=_BITS, time_embedding="keep")


class NotOfFloatsEither(Exception):
    """The dequantized model cannot do it: torch or diffusers has no gradient there, or not for these inputs."""


class Subject:
    """A packed tiny model, the dequantized one, and what both compute."""

    def __init__(self, name: str, case: Case) -> None:
        self.name, self.case = name, case
        self.model = self.pack()

    def pack(self) -> nn.Module:
        """Return the packed model, built anew: torch copies no module with the old weight normalisation."""
        return quantize_model(self.case.build(self.name), _config(), progress=False)

    def call(self, model: nn.Module) -> Tensor:
        """Return the outputs of a model, with the same noise each time, in one row."""
        arguments = self.case.arguments()
        torch.manual_seed(2)
        with torch.no_grad():
            return flat_output(self.case.call(model, **arguments))

    @cached_property
    def output(self) -> Tensor:
        output = self.call(self.model)
        assert output.isfinite().all() and output.std() > 0
        return output

    @cached_property
    def dequantized(self) -> nn.Module:
        """The dequantized model, without gradients, as packed weights are: torch chooses kernels by that."""
        return self.pack().dequantize().requires_grad_(False)

    def gradients(self, model: nn.Module) -> list[Tensor]:
        """Return the gradients of all floating inputs but timesteps and masks."""
        arguments = self.case.arguments()
        inputs = [
            value
            for name, argument in arguments.items()
            if "mask" not in name
            for value in tensors(argument)
            if value.dim() > 1
        ]
        for value in inputs:
            value.requires_grad_()
        torch.manual_seed(2)
        flat_output(self.case.call(model, **arguments)).square().sum().backward()
        return [value.grad for value in inputs if value.grad is not None]


def equals_dequantized(subject: Subject) -> bool:
    """Whether the dequantized model, which has the tensors of the float model, computes the same."""
    assert subject.dequantized.state_dict().keys() == subject.case.build(subject.name).state_dict().keys()
    if subject.case.kernel_error == 0:
        return torch.equal(subject.call(subject.dequantized), subject.output)
    error = (subject.call(subject.dequantized) - subject.output).norm()
    return bool(error <= subject.case.kernel_error * subject.output.norm())


def equals_reloaded(subject: Subject) -> bool:
    """Whether the saved model computes the same when it is loaded back."""
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        return torch.equal(subject.call(type(subject.dequantized).from_pretrained(folder)), subject.output)


def equals_quantized_while_loading(subject: Subject) -> bool:
    """Whether quantizing while loading gives what quantizing in memory does."""
    with tempfile.TemporaryDirectory() as folder:
        subject.case.build(subject.name).save_pretrained(folder)
        loaded = type(subject.dequantized).from_pretrained(folder, quantization_config=_config())
    return torch.equal(subject.call(loaded), subject.output)


def has_the_dequantized_gradient(subject: Subject) -> bool:
    """Whether the gradients of the inputs are the dequantized model's, and not all of them zero."""
    try:
        expected = subject.gradients(subject.dequantized)
    except RuntimeError as error:
        raise NotOfFloatsEither from error
    found = subject.gradients(subject.model)
    assert any(gradient.any() for gradient in expected)
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(f, e, rtol=1e-3, atol=1e-4 * float(e.abs().max())) for f, e in pairs)


def decodes_each_layer_once(subject: Subject) -> bool:
    """Whether a call decodes as many weights as it calls packed layers and reads packed parameters.

    Layers that are never called count once where their `weight` is read, as by poolers of torch's own attention.
    """
    calls: list[nn.Module] = []
    asked: set[nn.Module] = set()
    lazy_weight = PackedWeight._lazy_weight

    def noting(layer: PackedWeight) -> Tensor:
        asked.add(layer)
        return lazy_weight(layer)

    readers = [part for part in subject.model.modules() if isinstance(part, PackedTensor)]
    hooks = [
        part.register_forward_hook(lambda module, *_: calls.append(module))
        for part in [*packed_layers(subject.model).values(), *readers]
    ]
    with mock.patch.object(PackedWeight, "_lazy_weight", noting), _counting_decodes() as count:
        subject.call(subject.model)
    for hook in hooks:
        hook.remove()
    assert calls
    used = len(calls) + len(asked.difference(calls))
    return count["decodes"] <= used if readers else count["decodes"] == used


def is_near_in_integers(subject: Subject) -> bool:
    """Whether `compute="int8"` changes the outputs by a bounded share only."""
    model = subject.pack()
    set_compute(model, "int8")
    output = subject.call(model)
    return bool(output.isfinite().all() and (output - subject.output).norm() <= _INT8_ERROR * subject.output.norm())


# Columns of the table, by title.
CHECKS: dict[str, Callable[[Subject], bool]] = {
    "equal to dequantized": equals_dequantized,
    "saved, reloaded": equals_reloaded,
    "while loading": equals_quantized_while_loading,
    "gradient": has_the_dequantized_gradient,
    "decodes": decodes_each_layer_once,
    "int8": is_near_in_integers,
}


@contextmanager
def _counting_decodes() -> Iterator[Counter[str]]:
    count: Counter[str] = Counter()
    places = ((linear, "decode_to_scratch"), (conv, "decode_to_scratch"), (transforms, "decode_weight"))
    originals = [getattr(module, name) for module, name in places]
    patches = [
        mock.patch.object(module, name, _counting(original, count))
        for (module, name), original in zip(places, originals, strict=True)
    ]
    for patch in patches:
        patch.start()
    try:
        yield count
    finally:
        for patch in patches:
            patch.stop()


def _counting(function: Callable[..., Tensor], count: Counter[str]) -> Callable[..., Tensor]:
    def counted(*args: Any) -> Tensor:
        count["decodes"] += 1
        return function(*args)

    return counted


def run_all(name: str, case: Case) -> dict[str, str]:
    """Return "yes", "no" or the name of the error by the title of each check."""
    try:
        subject = Subject(name, case)
    except Exception as error:
        return dict.fromkeys(CHECKS, _shown(error))
    return {title: _run(check, subject) for title, check in CHECKS.items()}


def _run(check: Callable[[Subject], bool], subject: Subject) -> str:
    try:
        return "yes" if check(subject) else "no"
    except NotOfFloatsEither:
        return "–"
    except Exception as error:
        return _shown(error)


def _shown(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {text[:80]}" if text else type(error).__name__
