import copy

import pytest
import torch
from tiny import tiny_unet

from diffusers_bitsfusion import BitsFusionConfig, quantize_model, set_compute
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.nn.conversion import pack_weight, packed_from_float
from diffusers_bitsfusion.nn.traceable import TraceableLayer, make_traceable

pytestmark = pytest.mark.usefixtures("one_thread")

ARGUMENTS = (torch.randn(2, 4, 8, 8), torch.tensor(7.5), torch.randn(2, 5, 32))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of checks of shapes and of timesteps
@pytest.mark.parametrize("time_embedding", ["table", "cache", "keep"])
@torch.no_grad()
def test_a_traced_unet_computes_the_same_without_an_operator_of_this_package(time_embedding):
    kept = {"type": "cache", "timesteps": [1.0, 7.5]} if time_embedding == "cache" else time_embedding
    config = BitsFusionConfig(recipe=2, time_embedding=kept)
    packed = quantize_model(tiny_unet(), config, progress=False).requires_grad_(False)
    set_compute(packed, "exact")
    expected = packed(*ARGUMENTS).sample
    with_operators = torch.jit.trace(lambda *x: packed(*x, return_dict=False)[0], ARGUMENTS, check_trace=False)
    elsewhere = ARGUMENTS[0], torch.tensor(1.0), ARGUMENTS[2]
    assert torch.equal(with_operators(*elsewhere), packed(*elsewhere).sample)
    bits = make_traceable(packed)
    assert set(bits.values()) == {2, 8}
    traced = torch.jit.trace(lambda *x: packed(*x, return_dict=False)[0], ARGUMENTS, check_trace=False)
    torch.testing.assert_close(traced(*ARGUMENTS), expected)
    assert "bitsfusion" not in str(traced.inlined_graph).replace("diffusers_bitsfusion", "")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (torch.nn.Linear(10, 6, bias=False), (3, 10)),
        (torch.nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular"), (2, 8, 9, 9)),
    ],
)
@torch.no_grad()
def test_geometry_bias_and_branch_are_kept(layer, shape):
    packed = pack_weight(packed_from_float(layer, 3, torch.float32), layer.weight, Rounding())
    if isinstance(layer, torch.nn.Linear):
        packed.extend_branch(torch.randn(2, 10), torch.randn(6, 2))
    x = torch.randn(shape)
    torch.testing.assert_close(TraceableLayer(copy.deepcopy(packed))(x), packed(x))
