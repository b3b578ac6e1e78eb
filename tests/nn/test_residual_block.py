"""Residual blocks and norms of packed models, beside diffusers' own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from helpers import relative_error
from tiny import tiny_unet
from torch import nn

from diffusers_bitsfusion import set_compute, size_report
from diffusers_bitsfusion.nn import residual_block
from diffusers_bitsfusion.nn.residual_block import (
    FusedGroupNorm,
    FusedResnetBlock2D,
    fuse_residual_blocks,
    restore_residual_blocks,
)
from diffusers_bitsfusion.ops import dispatch, norms

pytestmark = pytest.mark.usefixtures("one_thread")

# Arguments of a block, and whether its norms take their surroundings in.
BLOCKS = {
    "plain": ({}, True),
    "wider": ({"out_channels": 24}, True),
    "without time": ({"temb_channels": None}, True),
    "activated time": ({"skip_time_act": True}, True),
    "halved": ({"output_scale_factor": 2.0}, True),
    "scales": ({"time_embedding_norm": "scale_shift"}, False),
    "another activation": ({"non_linearity": "gelu"}, False),
    "upsampling": ({"up": True}, False),
    "downsampling": ({"down": True}, False),
}


@pytest.fixture
def small_norms_too(monkeypatch):
    monkeypatch.setattr(dispatch, "_FEWEST_OUTPUTS", 1)


def make_block(**arguments):
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=16, groups=4, **{"temb_channels": 12, **arguments}).eval()
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return block


def inputs(block, dtype=torch.float32):
    x = torch.randn(2, 16, 6, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, None if block.time_emb_proj is None else torch.randn(2, 12).to(dtype)


@pytest.fixture
def fused_calls(monkeypatch):
    """Arguments (silu, shift) of the norms' calls."""
    calls = []
    own = residual_block.group_norm
    monkeypatch.setattr(residual_block, "group_norm", lambda *args: calls.append(args[-2:]) or own(*args))
    return calls


@pytest.mark.usefixtures("small_norms_too")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", BLOCKS)
def test_a_block_computes_what_diffusers_own_does(case, dtype, fused_calls):
    arguments, fuses = BLOCKS[case]
    block = make_block(**arguments).to(dtype)
    x, temb = inputs(block, dtype)
    exact_block, exact_inputs = copy.deepcopy(block).double(), (t if t is None else t.double() for t in (x, temb))
    with torch.no_grad():
        exact, expected = exact_block(*exact_inputs), block(x, temb)
        fuse_residual_blocks(block)
        found = block(x, temb)
        assert (type(block), type(block.norm1)) == (FusedResnetBlock2D, FusedGroupNorm)
        assert [silu for silu, _ in fused_calls] == [fuses] * 2
        restore_residual_blocks(block)
        assert torch.equal(block(x, temb), expected)
    assert (type(block), type(block.norm1)) == (ResnetBlock2D, nn.GroupNorm)
    assert found.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected)
    else:
        assert relative_error(found, exact) < 1.05 * relative_error(expected, exact)


def test_a_block_learns_as_diffusers_own(fused_calls):
    block = make_block()
    x, temb = (t.requires_grad_() for t in inputs(block))
    leaves = [x, temb, *block.parameters()]
    expected = torch.autograd.grad(block(x, temb).square().sum(), leaves)
    fuse_residual_blocks(block)
    found = torch.autograd.grad(block(x, temb).square().sum(), leaves)
    assert len(fused_calls) == 2
    for value, own in zip(found, expected, strict=True):
        torch.testing.assert_close(value, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["norm1", "norm2", "nonlinearity"])
def test_hooks_see_what_they_see_in_diffusers_own(part):
    block = make_block()
    seen = []
    getattr(block, part).register_forward_hook(lambda module, args, output: seen.append((*args, output)))
    x, temb = inputs(block)
    with torch.no_grad():
        block(x, temb)
        half = len(seen)
        fuse_residual_blocks(block)
        block(x, temb)
    assert len(seen) == 2 * half > 0
    torch.testing.assert_close(seen[half:], seen[:half])


def test_norms_that_others_have_changed_are_left_alone():
    block = make_block()
    block.norm1 = nn.GroupNorm(4, 16, affine=False)
    block.norm2.forward = block.norm2.forward
    fuse_residual_blocks(block)
    assert type(block.norm1) is type(block.norm2) is nn.GroupNorm
    with torch.no_grad():
        assert block(*inputs(block)).isfinite().all()


def test_packed_models_bring_their_blocks_and_dequantizing_gives_diffusers_own_back(packed_unet, call_unet):
    own = [type(module) for module in tiny_unet().modules() if isinstance(module, (ResnetBlock2D, nn.GroupNorm))]

    def kinds(model):
        return [type(module) for module in model.modules() if isinstance(module, (ResnetBlock2D, nn.GroupNorm))]

    fused = {ResnetBlock2D: FusedResnetBlock2D, nn.GroupNorm: FusedGroupNorm}
    for compute in ("exact", "int8"):
        set_compute(packed_unet, compute)
        assert kinds(packed_unet) == [fused[kind] for kind in own]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(packed_unet)))
    assert torch.equal(call_unet(copied), call_unet(packed_unet))
    assert kinds(packed_unet.dequantize()) == own


@pytest.mark.parametrize("reason", [None, "there is no C compiler"])
def test_the_report_says_how_norms_compute_and_why(packed_unet, monkeypatch, reason):
    monkeypatch.setattr(residual_block, "why_no_compiled_norm", lambda *_: reason)
    report = size_report(packed_unet)
    count = sum(isinstance(module, nn.GroupNorm) for module in packed_unet.modules())
    how = "by torch: there is no C compiler" if reason else "in compiled C, with the sum before"
    assert len(report.norm_kernels) == count and all(k.startswith(how) for k in report.norm_kernels.values())
    assert f"{count:>6}  norms of groups {how}" in str(report)
    assert report.to_dict()["norm_kernels"] == report.norm_kernels


def test_without_a_compiler_torch_computes(packed_unet, call_unet, monkeypatch):
    """Small norms in fp32 too, which so give the bits of the dequantized model."""
    before = call_unet(packed_unet)
    monkeypatch.setattr(norms, "why_no_compiled_norm", lambda device, *_: dispatch.NORMS_COMPILED.why_not(device))
    in_loops = call_unet(packed_unet)
    monkeypatch.setattr(norms, "why_no_compiled_norm", lambda *_: "there is no C compiler")
    assert torch.equal(call_unet(packed_unet), before)
    torch.testing.assert_close(in_loops, before)
