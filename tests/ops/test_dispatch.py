import platform
from types import SimpleNamespace

import pytest
import torch

from diffusers_bitsfusion.ops import kernels
from diffusers_bitsfusion.ops.dispatch import check_settings, fuses_decoding, select_for_layer, why_no_int8

CPU = torch.device("cpu")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("compute", ["auto", "exact"])
def test_auto_is_exact_and_says_so(compute, bits):
    selection = select_for_layer(compute, "packed", bits, CPU)
    assert selection.arithmetic == "exact"
    assert f'compute="{compute}"' in selection.reason


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("bits", range(1, 9 if torch.cpu._is_vnni_supported() else 8))
def test_this_machine_multiplies_integers(bits, linear):
    assert select_for_layer("int8", "packed", bits, CPU, linear=linear).arithmetic == "int8"
    assert "kept" in select_for_layer("int8", "int8", bits, CPU, linear=linear).weights


def test_the_selection_names_how_weights_are_decoded(monkeypatch):
    assert "compiled" in select_for_layer("exact", "packed", 2, CPU).weights
    monkeypatch.setattr(kernels, "native_library", lambda: None)
    assert "plain torch" in select_for_layer("exact", "packed", 2, CPU).weights


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_that_overflow_without_vnni_stay_exact(monkeypatch, bits):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    selection = select_for_layer("int8", "int8", bits, CPU)
    assert selection.arithmetic == ("exact" if bits == 8 else "int8")
    assert ("VNNI" in selection.reason) == (bits == 8)


def test_linear_layers_stay_exact_where_integers_are_multiplied_slowly(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert select_for_layer("int8", "packed", 2, CPU, linear=True).arithmetic == "int8"
    for library, reason in ((None, "no C compiler"), (SimpleNamespace(multiply=None), "neither VNNI nor AVX2")):
        monkeypatch.setattr(kernels, "native_library", lambda library=library: library)
        selection = select_for_layer("int8", "int8", 2, CPU, linear=True)
        assert selection.arithmetic == "exact" and reason in selection.reason
        assert select_for_layer("int8", "int8", 2, CPU).arithmetic == "int8"  # a convolution
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert select_for_layer("int8", "packed", 8, CPU, linear=True).arithmetic == "int8"


@pytest.mark.parametrize(
    ("machine", "device", "reason"),
    [("aarch64", "cpu", "aarch64"), ("x86_64", "mps", 'device type "mps"'), ("x86_64", "xpu", 'device type "xpu"')],
)
def test_where_integers_are_impossible_the_error_says_why_and_what_to_do(monkeypatch, machine, device, reason):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert reason in why_no_int8(torch.device(device))
    with pytest.raises(ValueError, match=f'{reason}.*Use compute="exact"'):
        select_for_layer("int8", "packed", 2, torch.device(device))
    assert select_for_layer("auto", "packed", 2, torch.device(device)).arithmetic == "exact"


def test_without_onednn_there_are_no_integers(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="oneDNN"):
        select_for_layer("int8", "packed", 2, CPU)


def test_a_gpu_needs_triton_and_tensor_cores(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old one")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    assert "Triton" in why_no_int8(gpu) and "plain torch" in select_for_layer("exact", "packed", 2, gpu).weights
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    assert "an old one" in why_no_int8(gpu) and "Triton" in select_for_layer("exact", "packed", 2, gpu).weights
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert select_for_layer("int8", "packed", 8, gpu).arithmetic == "int8"
    assert "16 tokens" in select_for_layer("exact", "packed", 2, gpu, linear=True).weights
    assert "tokens" not in select_for_layer("int8", "packed", 2, gpu, linear=True).weights


def test_few_tokens_on_a_gpu_are_multiplied_with_codes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    gpu = torch.device("cuda")
    assert fuses_decoding(gpu, torch.float16, 1) and fuses_decoding(gpu, torch.bfloat16, 16)
    assert not fuses_decoding(gpu, torch.float16, 17) and not fuses_decoding(gpu, torch.float16, 0)
    assert not fuses_decoding(gpu, torch.float32, 1) and not fuses_decoding(CPU, torch.float16, 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not fuses_decoding(gpu, torch.float16, 1)


def test_offloaded_codes_cannot_stay_resident():
    meta = torch.device("meta")
    assert select_for_layer("int8", "packed", 2, meta).arithmetic == "int8"
    with pytest.raises(ValueError, match="offloaded"):
        select_for_layer("int8", "int8", 2, meta)


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


def test_the_first_kernel_that_can_is_selected_and_the_others_say_why_not(monkeypatch):
    assert kernels.select(kernels.DECODING, CPU) is kernels.DECODE_COMPILED
    assert kernels.DECODE_TRITON.why_not(CPU) == 'Triton is not for the device type "cpu"'
    monkeypatch.setattr(kernels, "native_library", lambda: None)
    assert kernels.select(kernels.DECODING, CPU) is kernels.DECODE_TORCH
    assert kernels.DECODE_COMPILED.why_not(CPU) == "there is no C compiler"
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    gpu = torch.device("cuda")
    assert kernels.select(kernels.DECODING, gpu, torch.float16) is kernels.DECODE_TRITON
    assert kernels.select(kernels.DECODING, gpu, torch.float64) is kernels.DECODE_TORCH
    assert kernels.DECODE_TRITON.why_not(gpu, torch.float64) == "Triton is not for torch.float64"
    assert kernels.MULTIPLY_COMPILED.why_not(CPU, bits=8) == "compiled C is for codes of up to 7 bits"


GONE = """
import torch
import torch.cpu

for name in ("_is_vnni_supported", "_is_amx_tile_supported"):
    delattr(torch.cpu, name)
del torch._C.__file__
from torch import nn
from diffusers_bitsfusion.codec.quantize_dense import quantize_to_dense
from diffusers_bitsfusion.nn.linear import BitsFusionLinear
from diffusers_bitsfusion.ops.dispatch import why_no_bf16_attention

layer = BitsFusionLinear.from_float(nn.Linear(300, 200), 2, torch.float32)
layer.set_codes(*quantize_to_dense(torch.randn(200, 300), 2))
x = torch.randn(4, 300)
torch.testing.assert_close(layer(x), x @ layer.decode(torch.float32).T + layer.bias)
print(why_no_bf16_attention(torch.device("cpu")))
try:
    layer.set_compute("int8", "packed")
except ValueError as error:
    print(error)
"""


def test_exact_computing_survives_renamed_names_of_torch(run_python):
    process = run_python(GONE)
    assert process.returncode == 0, process.stderr
    assert "has no _is_amx_tile_supported in torch.cpu" in process.stdout
    assert 'compute="int8" is not possible here: torch' in process.stdout
    assert "has no _is_vnni_supported in torch.cpu" in process.stdout
    assert "Compiled loops run on one thread: torch" in process.stderr


def test_onednn_is_given_no_weight_in_bf16_where_it_has_no_bf16(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert "oneDNN has no bf16" in kernels.PREPACKED_BF16.why_not(CPU)
