"""Norms of groups with the sum before and the activation after, against numpy in double precision and torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_bitsfusion.ops import dispatch, norms
from diffusers_bitsfusion.ops.dispatch import why_no_compiled_norm
from diffusers_bitsfusion.ops.norms import group_norm, group_norm_reference

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = ["planes", "channels last", "every second", "transposed"]


def tensors(batch, channels, size, dtype=torch.float32, layout="planes", seed=0, mean=0.0):
    """An image in a layout, weight, bias and shift."""
    generator = torch.Generator().manual_seed(seed)

    def random_normal(*shape):
        return torch.randn(shape, generator=generator)

    x = (random_normal(batch, channels, *size) * 2 + mean).to(dtype)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "every second":
        x = x.repeat_interleave(2, dim=-1)[..., ::2]
    elif layout == "transposed":
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x, *((random_normal(*shape) + 0.5).to(dtype) for shape in ((channels,), (channels,), (batch, channels)))


def numpy_norm(x, groups, weight, bias, eps, silu, shift):
    x, weight, bias = (t.double().numpy() for t in (x, weight, bias))
    if shift is not None:
        x = x + shift.double().numpy()[:, :, None, None]
    parts = x.reshape(x.shape[0], groups, -1)
    parts = (parts - parts.mean(axis=2, keepdims=True)) / np.sqrt(parts.var(axis=2, keepdims=True) + eps)
    y = parts.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    return y / (1 + np.exp(-y)) if silu else y


@pytest.fixture(autouse=True, scope="module")
def small_norms_too():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_FEWEST_OUTPUTS", 1)
        yield


@pytest.fixture
def loop_only(monkeypatch):
    """Fail where torch computes instead."""
    if why_no_compiled_norm(torch.device("cpu"), torch.float32, 1, 1) is None:
        monkeypatch.setattr(norms, "group_norm_reference", None)


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 9),
    width=st.integers(1, 11),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(LAYOUTS),
    silu=st.booleans(),
    shifted=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=120)
def test_norms_are_numpys(batch, groups, width, size, dtype, layout, silu, shifted, seed):
    x, weight, bias, shift = tensors(batch, groups * width, size, dtype, layout, seed)
    arguments = groups, weight, bias, 1e-5, silu, shift if shifted else None
    found = group_norm(x, *arguments)
    assert found.dtype == dtype and found.shape == x.shape
    if layout == "channels last":
        assert found.is_contiguous(memory_format=torch.channels_last)
    # Groups of one or two values that are nearly equal have a variance of rounding errors.
    atol = 1e-4 if dtype == torch.float32 else 2e-2
    np.testing.assert_allclose(
        found.double().numpy(), numpy_norm(x, *arguments), rtol=2 ** (-6 if atol > 1e-3 else -18), atol=atol
    )


@pytest.mark.usefixtures("loop_only")
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [96, 1312])  # one part of channels that is summed side by side, and three
def test_bits_do_not_depend_on_threads_or_batch(layout, channels, threads):
    x, weight, bias, shift = tensors(3, channels, (19, 23), layout=layout)
    expected = [group_norm(x[i : i + 1], 32, weight, bias, 1e-5, True, shift[i : i + 1]) for i in range(3)]
    torch.set_num_threads(threads)
    try:
        found = group_norm(x, 32, weight, bias, 1e-5, True, shift)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found, torch.cat(expected))
    np.testing.assert_allclose(found.numpy(), numpy_norm(x, 32, weight, bias, 1e-5, True, shift), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("loop_only")
@pytest.mark.parametrize("layout", ["planes", "channels last"])
@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
def test_statistics_are_no_less_exact_than_torchs(layout, mean):
    """Of a mean far above the deviation, and where the edges of an image differ from its inside."""
    x, *_ = tensors(2, 64, (33, 31), layout=layout, mean=mean)
    x[..., 0] += 40
    x[:, :, 0] -= 25
    one, zero = torch.ones(64), torch.zeros(64)
    expected = numpy_norm(x, 8, one, zero, 1e-5, False, None).reshape(16, -1)
    found, torchs = (
        norm(x, 8, one, zero, 1e-5).double().numpy().reshape(16, -1)
        for norm in (group_norm, torch.nn.functional.group_norm)
    )

    def errors(y):
        """Of means and of deviations, which are 0 and 1, and of single values."""
        return abs(y.mean(1)).max(), abs(y.std(1) - expected.std(1)).max(), np.sqrt(np.square(y - expected).mean())

    for error, theirs, bound in zip(errors(found), errors(torchs), (6e-8, 8e-8, 1e-7), strict=True):
        assert error < max(bound, theirs)
        assert error < 10 * bound


@pytest.mark.usefixtures("loop_only")
@pytest.mark.parametrize("layout", ["planes", "channels last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_show_in_their_group_alone(layout, bad):
    x, weight, bias, shift = tensors(2, 12, (9, 9), layout=layout)
    x[1, 4, 8, 8] = bad
    finite = group_norm(x, 3, weight, bias, 1e-5, True, shift).isfinite()
    assert not finite[1, 4:8].any() and finite[0].all() and finite[1, :4].all() and finite[1, 8:].all()


@pytest.mark.parametrize(
    "case", ["empty batch", "no positions", "many groups", "fp16", "fp64", "autocast", "3-D", "5-D"]
)
def test_what_the_loops_do_not_take_is_torchs(case):
    x, weight, bias, shift = tensors(
        0 if case == "empty batch" else 2, 130, (0, 3) if case == "no positions" else (4, 3)
    )
    groups = 130 if case == "many groups" else 13
    if case in ("fp16", "fp64"):
        dtype = {"fp16": torch.float16, "fp64": torch.float64}[case]
        x, weight, bias, shift = (t.to(dtype) for t in (x, weight, bias, shift))
    x = x.flatten(2) if case == "3-D" else x.unflatten(2, (2, 2)) if case == "5-D" else x
    arguments = x, groups, weight, bias, 1e-5, True, shift
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        found, expected = outcome(group_norm, arguments), outcome(group_norm_reference, arguments)
    if isinstance(expected, str):  # From torch 2.14 on, which refuses images of no positions.
        assert found == expected
    else:
        torch.testing.assert_close(found, expected)


def outcome(function, arguments):
    """What a function returns, or the words in which torch refuses its arguments."""
    try:
        return function(*arguments)
    except RuntimeError as error:
        return str(error)


def test_wrong_sizes_are_refused_in_torchs_words():
    x, weight, bias, _ = tensors(2, 12, (4, 4))
    with pytest.raises(RuntimeError, match="divisible by num_groups"):
        group_norm(x, 5, weight, bias, 1e-5)
    with pytest.raises(RuntimeError, match="weight"):
        group_norm(x, 3, weight[:5], bias, 1e-5)
    with pytest.raises(RuntimeError, match="size"):
        group_norm(x, 3, weight, bias, 1e-5, shift=weight[None, :7])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_torch(layout):
    leaves = [t.requires_grad_() for t in tensors(2, 12, (5, 4), layout=layout)]
    x, weight, bias, shift = leaves
    grad = torch.randn(2, 12, 5, 4)
    found = torch.autograd.grad(group_norm(x, 3, weight, bias, 1e-5, True, shift), leaves, grad)
    y = torch.nn.functional.silu(torch.nn.functional.group_norm(x + shift[:, :, None, None], 3, weight, bias, 1e-5))
    for value, torchs in zip(found, torch.autograd.grad(y, leaves, grad), strict=True):
        torch.testing.assert_close(value, torchs)


def test_forward_mode_is_that_of_torch():
    x, weight, bias, shift = tensors(2, 12, (5, 4))
    tangent = torch.randn_like(x)
    found = torch.func.jvp(lambda x: group_norm(x, 3, weight, bias, 1e-5, True, shift), (x,), (tangent,))
    expected = torch.func.jvp(lambda x: group_norm_reference(x, 3, weight, bias, 1e-5, True, shift), (x,), (tangent,))
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("loop_only")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operator_describes_its_output(layout):
    found = group_norm(tensors(2, 12, (5, 4), layout=layout)[0], 3, torch.ones(12), torch.zeros(12), 1e-5)
    with FakeTensorMode() as mode:
        x = mode.from_tensor(tensors(2, 12, (5, 4), layout=layout)[0])
        described = group_norm(x, 3, torch.ones(12), torch.zeros(12), 1e-5)
    assert (described.shape, described.stride(), described.dtype) == (found.shape, found.stride(), found.dtype)
