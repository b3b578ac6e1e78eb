"""On a GPU: kernels against the reference, and whole pipelines against what they do on the CPU."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import tiny_lora, tiny_unet
from torch import Tensor

from diffusers_bitsfusion import Calibration, convert, prepare_qat, quantize_model, set_compute
from diffusers_bitsfusion.codec.grid import half_range
from diffusers_bitsfusion.codec.radix import pack_dense
from diffusers_bitsfusion.nn.conversion import packed_from_float
from diffusers_bitsfusion.ops.activations import quantize_image_reference, quantize_tokens_reference
from diffusers_bitsfusion.ops.decode import decode, decode_channels_last, decode_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
if torch.cuda.is_available():
    from diffusers_bitsfusion.ops.triton.activations import quantize_image_triton, quantize_tokens_triton

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Convolutions of fp32 in fp32, or nothing could be compared with the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def load(folder, **arguments) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_images(pipe: StableDiffusionPipeline) -> Tensor:
    arguments = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
    return pipe("ab", generator=torch.Generator().manual_seed(1), **arguments).images.float().cpu()


@pytest.fixture
def folder(packed_folders):
    return packed_folders["table"]


@pytest.mark.parametrize(
    ("bits", "dtype"), [*itertools.product(range(1, 9), (torch.float32, torch.bfloat16, torch.float16, torch.int8))]
)
def test_decoding_equals_the_reference(bits, dtype):
    generator = torch.Generator().manual_seed(bits)
    half = half_range(bits)
    for rows, columns in ((3, 1), (7, 1001), (64, 1280)):
        codes = torch.randint(-half, half + 1, (rows, columns), dtype=torch.int8, generator=generator)
        dense, scale = pack_dense(codes, bits), torch.rand(rows, generator=generator) + 0.01
        expected = decode_reference(dense, scale, bits, columns, torch.empty(rows, columns, dtype=dtype))
        out = torch.empty(rows, columns, dtype=dtype, device=DEVICE)
        assert torch.equal(decode(dense.to(DEVICE), scale.to(DEVICE), bits, columns, out).cpu(), expected)


@pytest.mark.parametrize(
    ("bits", "dtype"), [*itertools.product(range(1, 9), (torch.float32, torch.bfloat16, torch.float16, torch.int8))]
)
def test_decoding_channels_last_equals_the_reference(bits, dtype):
    generator = torch.Generator().manual_seed(bits)
    half = half_range(bits)
    for shape in ((3, 4, 3, 3), (9, 320, 3, 3), (16, 70, 1, 2)):
        rows, columns = shape[0], math.prod(shape[1:])
        codes = torch.randint(-half, half + 1, (rows, columns), dtype=torch.int8, generator=generator)
        dense, scale = pack_dense(codes, bits), torch.rand(rows, generator=generator) + 0.01
        expected = decode_reference(dense, scale, bits, columns, torch.empty(rows, columns, dtype=dtype))
        found = decode_channels_last(dense.to(DEVICE), scale.to(DEVICE), bits, shape, dtype)
        assert torch.equal(found.cpu(), expected.view(shape))
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_few_tokens_give_what_many_give(tokens, dtype):
    layer = packed_from_float(torch.nn.Linear(320, 40), 2, torch.float32)
    half = half_range(2)
    codes = torch.randint(-half, half + 1, (40, 320), dtype=torch.int8)
    layer.set_codes(pack_dense(codes, 2), torch.rand(40) * 0.1)
    x = torch.randn(tokens, 320)
    expected = torch.nn.functional.linear(x, layer.weight.float(), layer.bias.float())
    found = layer.to(DEVICE)(x.to(DEVICE, dtype)).float().cpu()
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("values", [torch.zeros(1), torch.randn(1 << 12), torch.randn(1 << 12) * 100 + 300])
def test_activations_are_rounded_as_by_the_reference(values):
    tokens, image = values.view(-1, min(64, len(values))), values.view(1, -1, 1, min(16, len(values)))
    found, expected = quantize_tokens_triton(tokens.to(DEVICE)), quantize_tokens_reference(tokens)
    assert all(torch.equal(mine.cpu(), wanted) for mine, wanted in zip(found, expected, strict=True))
    image = image.to(memory_format=torch.channels_last)
    codes, *found = quantize_image_triton(image.to(DEVICE), (0, 0))
    expected_codes, *expected = quantize_image_reference(image)
    assert torch.equal(codes.cpu().int() + 128, expected_codes.int())
    assert all(torch.equal(mine.cpu(), wanted) for mine, wanted in zip(found, expected, strict=True))


def test_a_pipeline_samples_what_it_samples_on_the_cpu(folder):
    expected = sample_images(load(folder))
    torch.testing.assert_close(sample_images(load(folder).to(DEVICE)), expected, rtol=0, atol=1e-3)
    mapped = load(folder, device_map=DEVICE)
    torch.testing.assert_close(sample_images(mapped), expected, rtol=0, atol=1e-3)
    half = sample_images(load(folder, dtype=torch.float16).to(DEVICE))
    torch.testing.assert_close(half, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("resident", ["packed", "int8"])
def test_integers_give_what_they_give_on_the_cpu(packed_unet, call_unet, resident):
    set_compute(packed_unet, "int8", resident)
    expected = call_unet(packed_unet)
    packed_unet.to(DEVICE)
    generator = torch.Generator().manual_seed(7)
    sample = torch.randn(2, packed_unet.config.in_channels, 8, 8, generator=generator).to(DEVICE)
    states = torch.randn(2, 5, packed_unet.config.cross_attention_dim, generator=generator).to(DEVICE)
    with torch.no_grad():
        found = packed_unet(sample, 501, states).sample.cpu()
    # Sums in another order move a few activations to the next of the 255 levels.
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_offloading(folder, kind):
    expected, pipe = sample_images(load(folder).to(DEVICE)), load(folder)
    if kind == "group":
        pipe.enable_group_offload(torch.device(DEVICE), torch.device("cpu"), offload_type="leaf_level")
    else:
        getattr(pipe, f"enable_{kind}_cpu_offload")(device=DEVICE)
    assert torch.equal(sample_images(pipe), expected)


def test_a_lora_fuses_and_leaves_no_trace(folder):
    pipe = load(folder).to(DEVICE)
    plain = sample_images(pipe)
    lora = tiny_lora(pipe.unet, ("to_q", "to_k", "to_v", "to_out.0"))
    pipe.load_lora_weights({f"unet.{name}": value for name, value in lora.items()})
    adapted = sample_images(pipe)
    assert not torch.equal(adapted, plain)
    pipe.fuse_lora()
    torch.testing.assert_close(sample_images(pipe), adapted, rtol=0, atol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(sample_images(pipe), plain)


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_one_compiled_graph(folder, compute):
    unet = load(folder).unet.to(DEVICE)
    set_compute(unet, compute)
    sample = torch.randn(2, unet.config.in_channels, 8, 8, device=DEVICE)
    states = torch.randn(2, 5, unet.config.cross_attention_dim, device=DEVICE)
    with torch.no_grad():
        expected = unet(sample, 501, states).sample
        compiled = torch.compile(unet, fullgraph=True, dynamic=False)
        found = compiled(sample, 501, states).sample
    assert (found - expected).norm() < (0.05 if compute == "int8" else 1e-3) * expected.norm()


def test_quantizing_and_calibrating_there(source_folder, make_config):
    pipe = load(source_folder).to(DEVICE)
    calibration = Calibration(prompts=["ab", "ba"], num_samples=2, num_inference_steps=2)
    quantize_model(pipe, make_config(), calibration=calibration, progress=False)
    assert sample_images(pipe).isfinite().all()


def test_training_there_ends_in_the_packed_model_that_was_trained(make_config):
    model = prepare_qat(tiny_unet(), make_config()).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sample = torch.randn(2, model.config.in_channels, 8, 8, device=DEVICE)
    states = torch.randn(2, 5, model.config.cross_attention_dim, device=DEVICE)
    losses = []
    for _ in range(5):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(sample, 501, states).sample.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = model.eval()(sample, 501, states).sample
        packed = convert(model)(sample, 501, states).sample
    torch.testing.assert_close(packed, trained, rtol=1e-3, atol=1e-3)
