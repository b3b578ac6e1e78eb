"""Attention by bf16 dot products, against softmax in numpy, and against torch's own."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_bitsfusion.ops import attention as module
from diffusers_bitsfusion.ops.attention import attention
from diffusers_bitsfusion.ops.dispatch import why_no_bf16_attention

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of an output's dtype; that of a probability in bf16 comes to it.
EPSILON = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def inputs(batch, heads, queries, keys, width, dtype=torch.float32, seed=0, size=1.0):
    """Of the strides that projections leave: [batch, tokens, heads, width], transposed."""
    generator = torch.Generator().manual_seed(seed)
    tokens = (queries, keys, keys)
    return [
        (torch.randn(batch, n, heads, width, generator=generator) * size).to(dtype).transpose(1, 2) for n in tokens
    ]


def numpy_attention(query, key, value):
    """(softmax(q kᵀ / √width) v, the same of |v|) in double precision, of inputs in bf16 where that is computed in."""
    dtype = query.dtype if why_no_bf16_attention(query.device) else torch.bfloat16
    query, key, value = (x.to(dtype).double().numpy() for x in (query, key, value))
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return shares @ value, shares @ np.abs(value)


def assert_near(found, expected, size, dtype):
    """Within the rounding of every probability to bf16 (2⁻⁹ of it, at the worst all one way) and of the output."""
    bound = (2**-8 + EPSILON[dtype]) * size + 1e-6
    assert (np.abs(found.double().numpy() - expected) <= bound).all()


@given(
    batch=st.integers(0, 2),
    heads=st.integers(1, 3),
    queries=st.integers(1, 40),
    keys=st.integers(1, 80),
    width=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    exponent=st.integers(-3, 3),
)
@settings(deadline=None, max_examples=60)
def test_attention_is_numpys(batch, heads, queries, keys, width, dtype, seed, exponent):
    tensors = inputs(batch, heads, queries, keys, width, dtype, seed, 2.0**exponent)
    found = attention(*tensors)
    assert found.shape == (batch, heads, queries, width) and found.dtype == dtype
    assert found.transpose(1, 2).is_contiguous()
    assert_near(found, *numpy_attention(*tensors), dtype)


@pytest.mark.parametrize(
    "sizes", [(1, 2, 253, 257, 40), (1, 1, 505, 1030, 16), (2, 1, 3, 513, 160), (1, 1, 5, 7, 256)]
)
@pytest.mark.parametrize("threads", [1, 3])
def test_more_tokens_than_a_block_holds(sizes, threads):
    torch.set_num_threads(threads)
    tensors = inputs(*sizes)
    assert_near(attention(*tensors), *numpy_attention(*tensors), torch.float32)


def test_a_later_block_may_hold_the_largest_scores():
    """What was summed before is made smaller, down to nothing."""
    query, key, value = inputs(1, 1, 6, 700, 16)
    key[:, :, 600] = query[:, :, 3] * 50
    assert_near(attention(query, key, value), *numpy_attention(query, key, value), torch.float32)
    torch.testing.assert_close(attention(query, key, value)[0, 0, 3], value[0, 0, 600], rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("layout", ["contiguous", "expanded", "strided"])
def test_any_strides_work(layout):
    query, key, value = inputs(2, 3, 9, 11, 8)
    expected = numpy_attention(query, key, value)
    if layout == "contiguous":
        query, key, value = (x.contiguous() for x in (query, key, value))
    elif layout == "expanded":
        key, value = key[:1].expand(2, -1, -1, -1), value[:1].expand(2, -1, -1, -1)
        expected = numpy_attention(query, key, value)
    else:
        query, key, value = (x.repeat_interleave(2, dim=-1)[..., ::2] for x in (query, key, value))
    assert_near(attention(query, key, value), *expected, torch.float32)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_inputs_show_in_the_output(which, bad):
    tensors = inputs(1, 1, 4, 40, 8)
    tensors[which][0, 0, 2, 1] = bad
    found, expected = attention(*tensors), F.scaled_dot_product_attention(*tensors)
    assert torch.equal(found.isfinite(), expected.isfinite())


def test_gradients_are_those_of_torch():
    tensors = [x.requires_grad_() for x in inputs(1, 2, 5, 7, 8)]
    grad = torch.randn(1, 2, 5, 8)
    found = torch.autograd.grad(attention(*tensors), tensors, grad)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*tensors), tensors, grad)
    for value, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(value, torchs)


@pytest.mark.parametrize("reason", ["wide head", "no compiler"])
def test_where_it_cannot_be_torchs_own_runs(reason, monkeypatch):
    tensors = inputs(1, 2, 5, 7, 258 if reason == "wide head" else 8)
    if reason == "no compiler":
        monkeypatch.setattr(module, "why_no_bf16_attention", lambda device: reason)
    found = attention(*tensors)
    assert found.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(found, F.scaled_dot_product_attention(*tensors))


def test_it_compiles_into_one_graph():
    tensors = inputs(1, 2, 5, 7, 8)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), attention(*tensors))
    torch.library.opcheck(torch.ops.bitsfusion.attention, tuple(tensors), test_utils="test_faketensor")
