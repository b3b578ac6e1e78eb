import platform
from types import SimpleNamespace

import pytest
import torch

from diffusers_bitsfusion.ops import dispatch as select
from diffusers_bitsfusion.ops import products
from diffusers_bitsfusion.ops.dispatch import check_settings, choose_way, fuses_decoding, why_no_int8

CPU = torch.device("cpu")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("compute", ["auto", "exact"])
def test_auto_is_exact_and_says_so(compute, bits):
    way = choose_way(compute, "packed", bits, CPU)
    assert way.arithmetic == "exact"
    assert f'compute="{compute}"' in way.reason


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("bits", range(1, 9 if torch.cpu._is_vnni_supported() else 8))
def test_this_machine_multiplies_integers(bits, linear):
    assert choose_way("int8", "packed", bits, CPU, linear=linear).arithmetic == "int8"
    assert "kept" in choose_way("int8", "int8", bits, CPU, linear=linear).weights


def test_the_way_names_how_weights_are_decoded(monkeypatch):
    assert "compiled" in choose_way("exact", "packed", 2, CPU).weights
    monkeypatch.setattr(select, "native_library", lambda: None)
    assert "plain torch" in choose_way("exact", "packed", 2, CPU).weights


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_that_overflow_without_vnni_stay_exact(monkeypatch, bits):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    way = choose_way("int8", "int8", bits, CPU)
    assert way.arithmetic == ("exact" if bits == 8 else "int8")
    assert ("VNNI" in way.reason) == (bits == 8)


def test_linear_layers_stay_exact_where_integers_are_multiplied_slowly(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert choose_way("int8", "packed", 2, CPU, linear=True).arithmetic == "int8"
    for library, reason in ((None, "no C compiler"), (SimpleNamespace(multiply=None), "neither VNNI nor AVX2")):
        monkeypatch.setattr(products, "native_library", lambda library=library: library)
        way = choose_way("int8", "int8", 2, CPU, linear=True)
        assert way.arithmetic == "exact" and reason in way.reason
        assert choose_way("int8", "int8", 2, CPU).arithmetic == "int8"  # a convolution
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert choose_way("int8", "packed", 8, CPU, linear=True).arithmetic == "int8"


@pytest.mark.parametrize(
    ("machine", "device", "reason"),
    [("aarch64", "cpu", "aarch64"), ("x86_64", "mps", 'device type "mps"'), ("x86_64", "xpu", 'device type "xpu"')],
)
def test_where_integers_are_impossible_the_error_says_why_and_what_to_do(monkeypatch, machine, device, reason):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert reason in why_no_int8(torch.device(device))
    with pytest.raises(ValueError, match=f'{reason}.*Use compute="exact"'):
        choose_way("int8", "packed", 2, torch.device(device))
    assert choose_way("auto", "packed", 2, torch.device(device)).arithmetic == "exact"


def test_without_onednn_there_are_no_integers(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="oneDNN"):
        choose_way("int8", "packed", 2, CPU)


def test_a_gpu_needs_triton_and_tensor_cores(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old one")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(select, "has_triton", lambda: False)
    assert "Triton" in why_no_int8(gpu) and "plain torch" in choose_way("exact", "packed", 2, gpu).weights
    monkeypatch.setattr(select, "has_triton", lambda: True)
    assert "an old one" in why_no_int8(gpu) and "Triton" in choose_way("exact", "packed", 2, gpu).weights
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert choose_way("int8", "packed", 8, gpu).arithmetic == "int8"
    assert "16 tokens" in choose_way("exact", "packed", 2, gpu, linear=True).weights
    assert "tokens" not in choose_way("int8", "packed", 2, gpu, linear=True).weights


def test_few_tokens_on_a_gpu_are_multiplied_with_codes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(select, "has_triton", lambda: True)
    gpu = torch.device("cuda")
    assert fuses_decoding(gpu, torch.float16, 1) and fuses_decoding(gpu, torch.bfloat16, 16)
    assert not fuses_decoding(gpu, torch.float16, 17) and not fuses_decoding(gpu, torch.float16, 0)
    assert not fuses_decoding(gpu, torch.float32, 1) and not fuses_decoding(CPU, torch.float16, 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not fuses_decoding(gpu, torch.float16, 1)


def test_offloaded_codes_cannot_stay_resident():
    meta = torch.device("meta")
    assert choose_way("int8", "packed", 2, meta).arithmetic == "int8"
    with pytest.raises(ValueError, match="offloaded"):
        choose_way("int8", "int8", 2, meta)


@pytest.mark.parametrize(
    ("compute", "resident", "message"),
    [
        ("fp8", "packed", "compute must be one of .*'fp8'"),
        ("int8", "fp16", "resident must be one of .*'fp16'"),
        ("auto", "int8", 'resident="int8" is for compute="int8" only'),
    ],
)
def test_settings_that_do_not_exist_or_fit_are_refused(compute, resident, message):
    with pytest.raises(ValueError, match=message):
        check_settings(compute, resident)
