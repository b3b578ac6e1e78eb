"""On a GPU: kernels against the reference, and whole pipelines against what they do on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import tiny_lora, tiny_unet
from torch import Tensor

from diffusers_bitsfusion import Calibration, convert, prepare_qat, quantize_model, set_compute
from diffusers_bitsfusion.codec.grid import half_range
from diffusers_bitsfusion.codec.radix import pack_dense
from diffusers_bitsfusion.ops.decode import decode, decode_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Convolutions of fp32 in fp32, or nothing could be compared with the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def load(folder, **arguments) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusionPipeline) -> Tensor:
    arguments = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
    return pipe("ab", generator=torch.Generator().manual_seed(1), **arguments).images.float().cpu()


@pytest.fixture
def folder(packed_folders):
    return packed_folders["table"]


@pytest.mark.parametrize(
    ("bits", "dtype"), itertools.product(range(1, 9), (torch.float32, torch.bfloat16, torch.float16, torch.int8))
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


def test_a_pipeline_draws_what_it_draws_on_the_cpu(folder):
    expected = draw(load(folder))
    torch.testing.assert_close(draw(load(folder).to(DEVICE)), expected, rtol=0, atol=1e-3)
    mapped = load(folder, device_map=DEVICE)
    torch.testing.assert_close(draw(mapped), expected, rtol=0, atol=1e-3)
    half = draw(load(folder, dtype=torch.float16).to(DEVICE))
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
    expected, pipe = draw(load(folder).to(DEVICE)), load(folder)
    if kind == "group":
        pipe.enable_group_offload(torch.device(DEVICE), torch.device("cpu"), offload_type="leaf_level")
    else:
        getattr(pipe, f"enable_{kind}_cpu_offload")(device=DEVICE)
    assert torch.equal(draw(pipe), expected)


def test_a_lora_fuses_and_leaves_no_trace(folder):
    pipe = load(folder).to(DEVICE)
    plain = draw(pipe)
    lora = tiny_lora(pipe.unet, ("to_q", "to_k", "to_v", "to_out.0"))
    pipe.load_lora_weights({f"unet.{name}": value for name, value in lora.items()})
    adapted = draw(pipe)
    assert not torch.equal(adapted, plain)
    pipe.fuse_lora()
    torch.testing.assert_close(draw(pipe), adapted, rtol=0, atol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)


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
    assert draw(pipe).isfinite().all()


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
