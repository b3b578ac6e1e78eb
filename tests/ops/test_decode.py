import threading

import pytest
import torch
import torch.nn.functional as F

from diffusers_bitsfusion.codec.grid import half_range
from diffusers_bitsfusion.codec.radix import pack_dense
from diffusers_bitsfusion.ops import decode as decode_module
from diffusers_bitsfusion.ops.decode import decode, decode_reference, decode_to_scratch, decode_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_codes(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    half = half_range(bits)
    codes = torch.randint(-half, half + 1, (rows, columns), generator=generator).to(torch.int8)
    return codes, torch.rand(rows, generator=generator) + 0.01


def random_packed(rows, columns, bits, seed=0):
    """(dense codes, scale, exact weights in fp32)."""
    codes, scale = random_codes(rows, columns, bits, seed)
    return pack_dense(codes, bits), scale, codes * scale[:, None]


def in_new_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("decoder", [decode, decode_reference])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_weight_is_scale_times_code_rounded_once(decoder, dtype, bits):
    dense, scale, exact = random_packed(7, 45, bits)
    out = torch.empty(7, 45, dtype=dtype)
    assert decoder(dense, scale, bits, 45, out) is out
    assert torch.equal(out, exact.to(dtype))


@pytest.mark.parametrize("decoder", [decode, decode_reference])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_that_is_not_contiguous_is_filled_in_its_own_order(decoder, dtype):
    dense, scale, exact = random_packed(6, 10, 2)
    out = torch.zeros(10, 6, dtype=dtype).T
    decoder(dense, scale, 2, 10, out)
    assert torch.equal(out, exact.to(dtype))


@pytest.mark.parametrize("decoder", [decode, decode_reference])
def test_codes_and_scale_are_only_read(decoder):
    dense, scale, _ = random_packed(4, 21, 3)
    before = dense.clone(), scale.clone()
    decoder(dense, scale, 3, 21, torch.empty(4, 21))
    assert torch.equal(dense, before[0]) and torch.equal(scale, before[1])


@pytest.mark.parametrize("shape", [(4, 18), (4, 2, 3, 3)])
@pytest.mark.parametrize("decoder", [decode_weight, decode_to_scratch])
def test_the_weight_has_the_shape_and_dtype_asked_for(decoder, shape):
    dense, scale, exact = random_packed(4, 18, 1)
    weight = decoder(dense, scale, 1, shape, torch.bfloat16)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, exact.view(shape).bfloat16())


def test_decode_weight_gives_memory_of_its_own():
    dense, scale, exact = random_packed(4, 18, 2)
    first = decode_weight(dense, scale, 2, (4, 18), torch.float32)
    decode_weight(dense, scale, 2, (4, 18), torch.float32).zero_()
    decode_to_scratch(dense, scale, 2, (4, 18), torch.float32).zero_()
    assert torch.equal(first, exact)


def test_the_scratch_is_reused_for_layers_that_fit():
    large, small = random_packed(40, 50, 1), random_packed(3, 7, 4)
    first = decode_to_scratch(*large[:2], 1, (40, 50), torch.float32)
    second = decode_to_scratch(*small[:2], 4, (3, 7), torch.bfloat16)
    third = decode_to_scratch(*large[:2], 1, (40, 50), torch.float32)
    assert first.data_ptr() == second.data_ptr() == third.data_ptr()
    assert torch.equal(third, large[2])


def test_a_larger_layer_gets_a_larger_scratch():
    def grow():
        small, large = random_packed(2, 3, 2), random_packed(50, 70, 2)
        first = decode_to_scratch(*small[:2], 2, (2, 3), torch.float32)
        second = decode_to_scratch(*large[:2], 2, (50, 70), torch.float32)
        return torch.equal(first, small[2]) and torch.equal(second, large[2])

    assert in_new_thread(grow)


def test_the_scratch_serves_inside_and_after_inference_mode():
    def use():
        dense, scale, exact = random_packed(5, 9, 3)
        with torch.inference_mode():
            inside = decode_to_scratch(dense, scale, 3, (5, 9), torch.float32)
            same_inside = torch.equal(inside, exact)
        x = torch.randn(2, 9, requires_grad=True)
        weight = decode_to_scratch(dense, scale, 3, (5, 9), torch.float32)
        F.linear(x, weight).sum().backward()  # saves the weight, which inference tensors refuse
        return same_inside and torch.allclose(x.grad, exact.sum(0).expand(2, 9), atol=1e-5)

    assert in_new_thread(use)


def test_the_scratch_serves_inference_mode_after_grad_mode():
    dense, scale, exact = random_packed(5, 9, 3)
    decode_to_scratch(dense, scale, 3, (5, 9), torch.float32)
    with torch.inference_mode():
        assert torch.equal(decode_to_scratch(dense, scale, 3, (5, 9), torch.float32), exact)


def test_two_threads_hold_their_weights_at_once():
    barrier = threading.Barrier(2, timeout=30)
    same = {}

    def work(seed):
        dense, scale, exact = random_packed(64, 100, 2, seed)
        matches = []
        for _ in range(20):
            weight = decode_to_scratch(dense, scale, 2, (64, 100), torch.float32)
            barrier.wait()  # both have decoded, neither has looked
            matches.append(torch.equal(weight, exact))
            barrier.wait()
        same[seed] = all(matches)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == {1: True, 2: True}


def test_layers_large_enough_for_several_workers_decode_in_two_threads_at_once():
    cases = {seed: random_packed(64, 1 << 13, 2, seed) for seed in (1, 2)}
    same = {}

    def work(seed):
        dense, scale, exact = cases[seed]
        decoded = (decode_to_scratch(dense, scale, 2, exact.shape, torch.float32) for _ in range(5))
        same[seed] = all(torch.equal(weight, exact) for weight in decoded)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == {1: True, 2: True}


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("decoder", [decode, decode_reference])
def test_int8_asks_for_the_codes_alone(decoder, bits):
    codes, scale = random_codes(6, 53, bits)
    out = torch.empty(6, 53, dtype=torch.int8)
    assert torch.equal(decoder(pack_dense(codes, bits), scale, bits, 53, out), codes)


@pytest.mark.parametrize("rows", [1, 2, 3, 700])
def test_plain_torch_decodes_rows_in_blocks(monkeypatch, rows):
    monkeypatch.setattr(decode_module, "native_library", lambda: None)
    monkeypatch.setattr(decode_module, "_PLAIN_BLOCK", 100)
    dense, scale, exact = random_packed(rows, 45, 2)
    assert torch.equal(decode(dense, scale, 2, 45, torch.empty(rows, 45)), exact)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_torchs_defaults_change_nothing(default):
    codes, scale = torch.randint(0, 81, (5, 30), dtype=torch.uint8), torch.rand(5) / 3
    kept = {dtype: decode_weight(codes, scale, 1, (5, 150), dtype) for dtype in (torch.float16, torch.float64)}
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):  # stands for a GPU
            found = {dtype: decode_weight(codes, scale, 1, (5, 150), dtype) for dtype in kept}
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[dtype], weight) for dtype, weight in kept.items())
