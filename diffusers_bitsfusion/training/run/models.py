"""Teacher and student of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DConditionModel

from ...calibration.run import calibrate
from ...calibration.time_estimate import CalibrationTime, estimate_time
from ...config.bitsfusion import BitsFusionConfig
from ...config.calibration import Calibration
from ...packing.file_budget import codes_rate
from ...packing.planning import matches
from ...qat import prepare_qat, qat_layers, start_calibrated

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_teacher(args: argparse.Namespace, accelerator: Accelerator) -> DiffusionPipeline:
    """Return the full-precision pipeline, frozen, in the dtype of mixed precision, on the device.

    Raises:
        ValueError: it is not Stable Diffusion with one text encoder, or its UNet requires more than latents.
    """
    pipeline = DiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        dtype=DTYPES[accelerator.mixed_precision],
    )
    lacking = {"unet", "vae", "text_encoder", "tokenizer"} - set(pipeline.components)
    if lacking or "text_encoder_2" in pipeline.components:
        raise ValueError(
            f"{type(pipeline).__name__} is not a Stable Diffusion pipeline with a UNet and one text encoder. "
            "Others can be trained with the parts in diffusers_bitsfusion.training."
        )
    channels, latents = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if channels != latents:
        raise ValueError(
            f"The UNet of {args.pretrained_model_name_or_path} takes {channels} channels where the VAE has {latents}: "
            "inpainting and the like cannot be trained by this command."
        )
    if args.prediction_type is not None:
        pipeline.scheduler.register_to_config(prediction_type=args.prediction_type)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # It would black out the noise that an untrained student generates.
    pipeline.set_progress_bar_config(disable=True)
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        model.requires_grad_(False).eval()
    return pipeline.to(accelerator.device)


def prepare_student(args: argparse.Namespace) -> UNet2DConditionModel:
    """Return the pipeline's UNet in fp32, with fake-quantized layers unless full precision is requested."""
    student = UNet2DConditionModel.from_pretrained(
        args.pretrained_model_name_or_path,
        subfolder="unet",
        revision=args.revision,
        variant=args.variant,
        dtype=torch.float32,
    )
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if args.full_precision:
        return student
    config = BitsFusionConfig(
        recipe=int(args.recipe) if args.recipe.isdecimal() else args.recipe,
        target_bits=args.target_bits,
        in_out_bits=args.in_out_bits,
        time_embedding=args.time_embedding,
        balance=not args.no_balance,
        scale_init=args.scale_init,
        scale_dtype="bfloat16" if args.rate_weight else None,  # The bits of scales count, too.
    )
    prepare_qat(student, config)
    if args.freeze_time_embedding:
        for name, parameter in student.named_parameters():
            if matches(name, ("time_embedding", "time_emb_proj")):
                parameter.requires_grad_(False)
    return student


def priced_from(args: argparse.Namespace, student: UNet2DConditionModel, teacher: DiffusionPipeline) -> float:
    """Return the bits a weight from which on the student's codes have a price: those of `--target_bytes`, else 0.

    Raises:
        ValueError: a file of so many bytes has no room for codes.
    """
    if args.target_bytes is None:
        return 0.0
    return codes_rate(student.qat_state.plan, teacher.unet, torch.float16, args.target_bytes)


def calibrate_student(
    args: argparse.Namespace, student: UNet2DConditionModel, teacher: DiffusionPipeline, prompts: Sequence[str]
) -> None:
    """Set the start of a prepared student to weights rounded for the layers' inputs while the teacher samples."""
    bits, calibration, config = _bits(student), Calibration(prompts, seed=args.seed), student.qat_state.config
    start_calibrated(student, calibrate(teacher, teacher.unet, bits, calibration, config.rounding, not args.quiet))
    config.calibration = calibration.summary()  # `prepare_qat` records it alike.


def calibration_time(
    args: argparse.Namespace, student: UNet2DConditionModel, teacher: DiffusionPipeline, prompts: Sequence[str]
) -> CalibrationTime:
    """Return the time that `calibrate_student` will take, by its arguments."""
    calibration, config = Calibration(prompts, seed=args.seed), student.qat_state.config
    return estimate_time(teacher, teacher.unet, _bits(student), calibration, config.rounding)


def _bits(student: UNet2DConditionModel) -> dict[str, int]:
    return {name: layer.bits for name, layer in qat_layers(student).items()}
