"""What fails, is refused or interrupted leaves models as they were: modules, tensors, dtypes, hooks, attributes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from tiny import tiny_pipeline, tiny_unet
from torch import Tensor, nn

from diffusers_bitsfusion import BitsFusionConfig, Calibration, convert, prepare_qat, quantize_model, set_compute
from diffusers_bitsfusion import qat as qat_module
from diffusers_bitsfusion.calibration import denoising, tuning
from diffusers_bitsfusion.calibration import run as calibration_run
from diffusers_bitsfusion.nn import fake_quantized
from diffusers_bitsfusion.ops import dispatch
from diffusers_bitsfusion.packing import packer

pytestmark = pytest.mark.usefixtures("one_thread")

LAST = "up_blocks.1.attentions.1.proj_out"
# One block is quantized: rounding takes most of the time.
LEFT = ["down_blocks.1", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "layers.0"]
CONFIG = BitsFusionConfig(recipe=2, components=["unet", "text_encoder"], modules_to_not_convert=LEFT)


def everything(*models: nn.Module) -> list[object]:
    """Return all of models that a failure could change, comparable by `==`."""
    return [
        (
            name,
            type(module),
            sorted(vars(module)),
            module.training,
            [len(hooks) for key, hooks in sorted(vars(module).items()) if key.endswith("_hooks")],
            repr(vars(module).get("_internal_dict")),
            repr(vars(module).get("config")),
            {key: contents(tensor) for key, tensor in module._parameters.items()},
            {key: contents(tensor) for key, tensor in module._buffers.items()},
        )
        for model in models
        for name, module in model.named_modules()
    ]


def contents(tensor: Tensor | None) -> object:
    if tensor is None:
        return None
    raw = tensor.detach().cpu().contiguous().view(torch.uint8) if tensor.dim() else tensor.detach().reshape(1)
    return tensor.dtype, tensor.device, tensor.requires_grad, tuple(tensor.shape), raw.numpy().tobytes()


@pytest.fixture
def pipeline(tmp_path) -> StableDiffusionPipeline:
    return tiny_pipeline(tmp_path)


@pytest.fixture
def failing_at(monkeypatch) -> Callable[..., None]:
    """Makes the `call`-th call of a function raise `error`."""

    def fail(owner: object, name: str, call: int, error: BaseException) -> None:
        function, left = getattr(owner, name), call

        def counted(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                raise error
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    return fail


def calibration(**changes) -> Calibration:
    settings = {"prompts": ["a cat", "a dog"], "num_samples": 2, "num_inference_steps": 2, "batch_size": 1}
    return Calibration(**(settings | changes))


@pytest.mark.parametrize(
    ("owner", "name", "call", "dtype"),
    [
        (denoising.Denoising, "_sample", 2, torch.float16),
        (calibration_run, "quantize_layer", 3, torch.float32),
        (denoising.NoisyCalls, "repeat", 2, torch.float16),
        (packer, "packed_from_float", 4, torch.float16),
        (tuning, "_train_step", 2, torch.float32),
    ],
)
def test_an_interrupted_calibration_is_undone(pipeline, failing_at, owner, name, call, dtype):
    pipeline.to(dtype, silence_dtype_warnings=True)
    models = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    before = everything(*models)
    failing_at(owner, name, call, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        quantize_model(pipeline, CONFIG, progress=False, calibration=calibration(tuning_steps=3))
    assert everything(*models) == before


def test_a_loss_of_tuning_that_is_nan_is_undone(pipeline, monkeypatch):
    before = everything(pipeline.unet)
    monkeypatch.setattr(tuning, "LEARNING_RATE", float("nan"))
    with pytest.raises(ValueError, match="The loss is nan in step 2 of tuning"):
        quantize_model(pipeline, CONFIG, progress=False, calibration=calibration(tuning_steps=3))
    assert everything(pipeline.unet) == before


def test_what_was_undone_can_be_done_again(pipeline, failing_at, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        failing_at(packer, "packed_from_float", 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quantize_model(pipeline, CONFIG, progress=False)
        patched.undo()
    (tmp_path / "other").mkdir()
    other = tiny_pipeline(tmp_path / "other")
    for each in (pipeline, other):
        quantize_model(each, CONFIG, progress=False)
    assert everything(pipeline.unet, pipeline.text_encoder) == everything(other.unet, other.text_encoder)


def test_a_second_component_that_fails_leaves_the_first_one(pipeline):
    with torch.no_grad():
        weights = dict(pipeline.text_encoder.named_parameters())
        next(weight for name, weight in weights.items() if name.endswith("layers.1.mlp.fc2.weight"))[-1, -1] = (
            torch.nan
        )
    before = everything(pipeline.unet, pipeline.text_encoder)
    with pytest.raises(ValueError, match=r"Cannot quantize.*fc2\.weight holds NaN"):
        quantize_model(pipeline, CONFIG, progress=False)
    assert everything(pipeline.unet, pipeline.text_encoder) == before


@pytest.mark.parametrize("parameter", [f"{LAST}.weight", f"{LAST}.bias", "conv_norm_out.weight", "conv_in.weight"])
@pytest.mark.parametrize("prepare", [prepare_qat, quantize_model])
def test_nan_in_a_late_layer_is_refused_before_anything_is_changed(prepare, parameter):
    unet = tiny_unet()
    with torch.no_grad():
        unet.get_parameter(parameter).view(-1)[-1] = torch.nan
    before = everything(unet)
    with pytest.raises(ValueError, match=rf"Cannot quantize.*{parameter} holds NaN"):
        prepare(unet, BitsFusionConfig(recipe=2))
    assert everything(unet) == before


def test_a_nan_is_refused_before_the_calibration(pipeline, monkeypatch):
    with torch.no_grad():
        pipeline.unet.get_parameter(f"{LAST}.weight").view(-1)[-1] = torch.inf
    monkeypatch.setattr(denoising.Denoising, "_sample", None)
    with pytest.raises(ValueError, match=rf"{LAST}\.weight holds NaN"):
        quantize_model(pipeline, CONFIG, progress=False, calibration=calibration())


def test_interrupted_preparation_and_conversion_are_undone(failing_at, monkeypatch):
    unet, config = tiny_unet(), BitsFusionConfig(recipe=2)
    before = everything(unet)
    failing_at(qat_module, "fake_quantized_from_float", 9, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prepare_qat(unet, config)
    assert everything(unet) == before
    prepare_qat(unet, config)
    before = everything(unet)
    failing_at(fake_quantized.QATConv2d, "codes_and_scale", 5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        convert(unet)
    assert everything(unet) == before
    failing_at(qat_module, "finish", 1, RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        convert(unet)
    assert everything(unet) == before
    assert convert(unet).is_quantized


@pytest.mark.parametrize("kind", ["packed", "int8"])
def test_a_cast_is_refused_before_other_models_are_cast(pipeline, kind):
    quantize_model(pipeline, BitsFusionConfig(recipe=2), progress=False)
    set_compute(pipeline.unet, "int8", kind)
    models = (pipeline.vae, pipeline.text_encoder, pipeline.unet)
    before = everything(*models)
    for cast in (
        lambda: pipeline.to(torch.float16),
        lambda: pipeline.to("cpu", torch.float16),
        lambda: pipeline.to(dtype=torch.float16),
        lambda: pipeline.unet.to("cpu", torch.float16),
        lambda: StableDiffusionImg2ImgPipeline.from_pipe(pipeline, dtype=torch.float16),
        lambda: StableDiffusionImg2ImgPipeline.from_pipe(pipeline, torch_dtype=torch.float16),
    ):
        with pytest.raises(ValueError, match="Casting a quantized model"):
            cast()
        assert everything(*models) == before
    pipeline.to("cpu", torch.float32)
    assert everything(*models) == before


@pytest.mark.parametrize("kind", ["packed", "int8"])
def test_a_device_without_integers_is_refused_before_anything_is_moved(pipeline, monkeypatch, kind):
    quantize_model(pipeline, BitsFusionConfig(recipe=2), progress=False)
    set_compute(pipeline.unet, "int8", kind)
    monkeypatch.setattr(dispatch, "why_no_int8", lambda device: "no integers" if device.type == "meta" else None)
    models = (pipeline.vae, pipeline.text_encoder, pipeline.unet)
    before = everything(*models)
    for move in (lambda: pipeline.to("meta"), lambda: pipeline.unet.to("meta"), lambda: pipeline.to(device="meta")):
        with pytest.raises(ValueError, match='compute="int8" is not possible here: no integers'):
            move()
        assert everything(*models) == before
    set_compute(pipeline.unet, "exact")
    assert pipeline.unet.to("meta").device.type == "meta"


@pytest.mark.parametrize("start", ["calibrate", "train"])
def test_integers_that_this_machine_lacks_are_refused_before_the_work(pipeline, monkeypatch, start):
    monkeypatch.setattr(dispatch, "why_no_int8", lambda device: "no integers")
    monkeypatch.setattr(denoising.Denoising, "_sample", None)
    config = BitsFusionConfig(recipe=2, compute="int8")
    before = everything(pipeline.unet)
    with pytest.raises(ValueError, match='compute="int8" is not possible here: no integers'):
        if start == "train":
            prepare_qat(pipeline.unet, config)
        else:
            quantize_model(pipeline, config, progress=False, calibration=calibration())
    assert everything(pipeline.unet) == before
