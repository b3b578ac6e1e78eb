"""Text encoders packed through transformers' own loading: saved, reloaded, equal to their dequantized copies."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import PipelineQuantizationConfig, StableDiffusionPipeline, UNet2DConditionModel
from helpers import all_packed_layers, packed_layers
from peft import LoraConfig
from tiny import tiny_pipeline
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from diffusers_bitsfusion import BitsFusionConfig, quantize_model, size_report
from diffusers_bitsfusion.codec.state_dict import decode_state_dict, encode_state_dict
from diffusers_bitsfusion.integrations.peft_lora import PackedLoraLayer

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = {"target_bits": 3}


def clip(kind=CLIPTextModel) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return kind(CLIPTextConfig(vocab_size=60, projection_dim=24, **sizes)).eval()


def t5() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 60}
    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes)).eval()


ENCODERS = {"CLIP": clip, "CLIP with projection": lambda: clip(CLIPTextModelWithProjection), "T5": t5}


def encode(model: nn.Module) -> Tensor:
    tokens = torch.randint(0, 59, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens)[0]


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@pytest.fixture(params=ENCODERS)
def encoder(request) -> PreTrainedModel:
    return ENCODERS[request.param]()


@pytest.fixture
def packed(encoder) -> PreTrainedModel:
    return quantize_model(copy.deepcopy(encoder), BitsFusionConfig(**CONFIG), progress=False)


def test_every_linear_layer_is_packed_and_no_embedding(encoder, packed):
    assert list(packed_layers(packed)) == linears(encoder)
    tables = [m for m in packed.modules() if isinstance(m, nn.Embedding)]
    assert tables and all(table.weight.is_floating_point() for table in tables)
    assert (encode(packed) - encode(encoder)).norm() > 1e-3 * encode(encoder).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_packed_encoder_encodes_as_dequantized_and_comes_back_from_its_folder(encoder, tmp_path, dtype):
    encoder.to(dtype).save_pretrained(tmp_path / "source")
    plain = type(encoder).from_pretrained(tmp_path / "source", dtype=dtype)
    config = BitsFusionConfig(**CONFIG)
    model = type(encoder).from_pretrained(tmp_path / "source", dtype=dtype, quantization_config=config)
    found = encode(model)
    assert found.dtype == encode(plain).dtype and found.isfinite().all()
    assert {name: layer.weight_dtype for name, layer in all_packed_layers(model).items()} == {
        name: plain.get_submodule(name).weight.dtype for name in linears(plain)
    }
    assert not config.is_resolved  # the user's own
    model.save_pretrained(tmp_path / "packed")
    again = type(encoder).from_pretrained(tmp_path / "packed", dtype=dtype)
    for name, layer in all_packed_layers(model).items():
        other = again.get_submodule(name)
        assert torch.equal(other.codes, layer.codes) and torch.equal(other.scale, layer.scale)
    assert torch.equal(encode(again), found)
    again.dequantize()
    assert not packed_layers(again)
    assert torch.equal(encode(again.requires_grad_(False)), found)


@pytest.mark.parametrize("family", ["CLIP", "SigLIP"])
def test_an_image_encoder_comes_back_with_what_no_file_holds(tmp_path, family):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"image_size": 16, "patch_size": 4}
    torch.manual_seed(0)
    encoders = {
        "CLIP": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=24, **sizes)),
        "SigLIP": lambda: SiglipVisionModel(SiglipVisionConfig(**sizes)),
    }
    encoder = quantize_model(encoders[family]().eval(), BitsFusionConfig(recipe=4), progress=False)
    encoder.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.full((1000, 1000), float("nan"))  # freed again: memory that is not initialised is not zero by luck
        again = type(encoder).from_pretrained(tmp_path)
        assert torch.equal(again(pixels)[0], encoder(pixels)[0])
    for name, buffer in encoder.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer), name
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in again.state_dict().items())


class OnADevice(Tensor):
    """Like a tensor on a GPU: numpy gets it by given of the CPU only."""

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def cpu(self):
        return self.as_subclass(Tensor)


@pytest.mark.parametrize("compression", ["zstd", None])
def test_codes_that_were_read_onto_a_device_are_decoded(compression):
    packed = quantize_model(clip(), BitsFusionConfig(**CONFIG, compression=compression), progress=False)
    schema = packed.hf_quantizer.quantization_config.schema
    state = encode_state_dict(packed.state_dict(), schema)
    on_device = {name: value.as_subclass(OnADevice) for name, value in state.items()}
    decoded = decode_state_dict(on_device, schema)
    assert all(torch.equal(decoded[f"{name}.codes"], layer.codes) for name, layer in all_packed_layers(packed).items())


def test_a_lora_on_a_packed_encoder_equals_that_on_the_dequantized_one(packed):
    dequantized = copy.deepcopy(packed).dequantize()
    plain = encode(packed)
    for model in (packed, dequantized):
        torch.manual_seed(2)
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "q", "wi_0", "fc1"], init_lora_weights=False))
    assert any(isinstance(module, PackedLoraLayer) for module in packed.modules())
    torch.testing.assert_close(encode(packed), encode(dequantized), rtol=1e-4, atol=1e-5)
    assert (encode(packed) - plain).norm() > 1e-3 * plain.norm()


def test_an_encoder_with_an_adapter_saves_the_adapter(packed, tmp_path):
    plain = encode(packed)
    packed.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "q", "wi_0", "fc1"], init_lora_weights=False))
    expected = encode(packed)
    assert not torch.equal(expected, plain)
    packed.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    packed.delete_adapter("default")
    assert torch.equal(encode(packed), plain)
    packed.load_adapter(str(tmp_path))
    torch.testing.assert_close(encode(packed), expected)


@pytest.mark.parametrize("fused", [True, False])
def test_a_pipeline_saves_an_encoder_that_has_an_adapter(fused, source_folder, tmp_path):
    config = BitsFusionConfig(recipe=4, components=["unet", "text_encoder"])
    pipe = StableDiffusionPipeline.from_pretrained(source_folder, quantization_config=config)
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    layer = pipe.text_encoder.get_submodule("encoder.layers.0.mlp.fc1")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(2, layer.in_features, generator=generator),
        f"{name}.lora_up.weight": torch.randn(layer.out_features, 2, generator=generator),
        f"{name}.alpha": torch.tensor(2.0),
    }
    plain = encode(pipe.text_encoder)
    pipe.load_lora_weights(tensors)
    if fused:
        pipe.fuse_lora(components=["text_encoder"])
    expected = encode(pipe.text_encoder) if fused else plain
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(again.text_encoder.hf_quantizer.quantization_config, BitsFusionConfig)
    torch.testing.assert_close(encode(again.text_encoder), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(encode(again.text_encoder), plain) != fused


def test_a_dequantized_encoder_saves_plain(packed, tmp_path):
    expected = encode(packed)
    packed.dequantize()
    packed.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(encode(type(packed).from_pretrained(tmp_path)), expected)


def test_an_encoder_may_be_cast_and_dequantized_in_another_dtype(packed):
    half = copy.deepcopy(packed).to(torch.bfloat16)
    expected = encode(half)
    assert expected.dtype == torch.bfloat16
    torch.testing.assert_close(encode(half.dequantize()), expected)
    other = packed.dequantize(dtype=torch.float16)
    kept = {"wo"} if isinstance(packed, T5EncoderModel) else set()  # which transformers keeps in fp32
    found = {(name.split(".")[-2] in kept, parameter.dtype) for name, parameter in other.named_parameters()}
    assert found == {(False, torch.float16)} | ({(True, torch.float32)} if kept else set())


def test_an_encoder_comes_back_from_shards(packed, tmp_path):
    packed.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(encode(type(packed).from_pretrained(tmp_path)), encode(packed))


def test_the_report_of_an_encoder(packed, encoder, tmp_path):
    packed.save_pretrained(tmp_path)
    report = size_report(tmp_path)
    assert report.weights == sum(encoder.get_submodule(name).weight.numel() for name in linears(encoder))
    assert report.average_bits.paper <= 3.001
    assert report.original_parameters == sum(p.numel() for p in encoder.parameters())


# In a pipeline.


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny_pipeline(tmp_path_factory.mktemp("tokenizer")).save_pretrained(folder)
    return folder


def sample_latents(pipe: StableDiffusionPipeline) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    return pipe("ab", generator=torch.Generator().manual_seed(1), **arguments).images


@pytest.mark.parametrize("given", ["while loading", "in memory", "mapping"])
def test_the_whole_pipeline_shrinks(source, tmp_path, given):
    config = BitsFusionConfig(**CONFIG, components=["unet", "text_encoder"], time_embedding="keep")
    if given == "in memory":
        pipe = quantize_model(StableDiffusionPipeline.from_pretrained(source), config, progress=False)
    else:
        mapping = PipelineQuantizationConfig(
            quant_mapping={"unet": BitsFusionConfig(**CONFIG, time_embedding="keep"), "text_encoder": config}
        )
        asked = mapping if given == "mapping" else config
        pipe = StableDiffusionPipeline.from_pretrained(source, quantization_config=asked)
    assert packed_layers(pipe.unet) and packed_layers(pipe.text_encoder) and not packed_layers(pipe.vae)
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(sample_latents(again), sample_latents(pipe))
    assert set(size_report(tmp_path).quantized) == {"unet", "text_encoder"}
    card = (tmp_path / "README.md").read_text()
    assert "bits_text_encoder.png" in card and (tmp_path / "bits_text_encoder.png").is_file()
    again.unet.dequantize().requires_grad_(False)
    again.text_encoder.dequantize().requires_grad_(False)
    assert torch.equal(sample_latents(again), sample_latents(pipe))


def test_a_pipeline_of_which_only_the_text_encoder_is_packed(source, tmp_path):
    config = BitsFusionConfig(**CONFIG, components=["text_encoder"])
    pipe = StableDiffusionPipeline.from_pretrained(source, quantization_config=config)
    assert type(pipe.unet) is UNet2DConditionModel
    pipe.save_pretrained(tmp_path)
    assert "import diffusers_bitsfusion" in (tmp_path / "README.md").read_text()
    assert torch.equal(sample_latents(StableDiffusionPipeline.from_pretrained(tmp_path)), sample_latents(pipe))


def test_by_default_the_text_encoder_is_left_alone(source):
    pipe = StableDiffusionPipeline.from_pretrained(source, quantization_config=BitsFusionConfig(**CONFIG))
    assert not packed_layers(pipe.text_encoder)


# Bad input.


def test_quantizing_twice_is_refused(packed):
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(packed, BitsFusionConfig(**CONFIG), progress=False)


def test_a_device_map_of_several_devices_is_refused(packed, tmp_path):
    packed.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one device only"):
        type(packed).from_pretrained(tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "offload")


@pytest.mark.parametrize(("kind", "damage"), [("codes", "cut"), ("codes", "missing"), ("scale", "missing")])
def test_a_damaged_file_is_refused_by_tensor_name(tmp_path, kind, damage):
    quantize_model(clip(), BitsFusionConfig(**CONFIG), progress=False).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith(f"q_proj.{kind}"))
    if damage == "cut":
        tensors[name] = tensors[name][:-5].clone()
    else:
        del tensors[name]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"q_proj.{kind}"):
        CLIPTextModel.from_pretrained(tmp_path)
