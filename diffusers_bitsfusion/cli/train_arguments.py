"""Arguments of a training run; names are those of diffusers' training scripts where they have one."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence

TIMESTEP_SAMPLING = ("beta", "uniform", "error")


# Smallest valid value of each numeric argument.
_MIN_VALUES = {
    "max_train_steps": 1,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 1,
    "drawing_steps": 1,
    "redraw_every": 1,
    "resolution": 1,
    "max_train_samples": 1,
    "timestep_error_samples": 1,
    "num_inference_steps": 1,
    "validation_grid": 1,
    "validation_steps": 0,
    "dataloader_num_workers": 0,
    "lr_warmup_steps": 0,
    "learning_rate": 0,
    "feature_weight": 0,
    "rate_weight": 0,
    "target_bytes": 1,
    "guidance_scale": 0,
    "validation_guidance_scale": 0,
    "seed": 0,
}


class _Help(argparse.HelpFormatter):
    """A formatter that ends the help of every option with its default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or "efault:" in text:
            return text
        return f"{text} [default: %(default)s]".lstrip()


def parse_args(arguments: Sequence[str], program: str, launched_as: str) -> argparse.Namespace:
    """Return the arguments of a run; a wrong combination ends the program with a message.

    Args:
        arguments: of the command line.
        program: what a message calls the program.
        launched_as: the command line before its arguments, as the model card shows it.
    """
    parser = argparse.ArgumentParser(
        program,
        description="Two-stage training of a Stable Diffusion UNet at about 2 bits.",
        allow_abbrev=False,  # A shortened --hub_token would end in the card.
        formatter_class=_Help,
        usage="%(prog)s --pretrained_model_name_or_path PIPELINE [options]  (--help lists them)",
    )
    _add_model(parser)
    _add_data(parser)
    _add_method(parser)
    _add_optimization(parser)
    _add_output(parser)
    _add_validation(parser)
    args = parser.parse_args(arguments)
    _check(parser, args)
    args.command = _command(arguments, launched_as)
    return args


def _command(arguments: Sequence[str], launched_as: str) -> str:
    """Return the command line as the model card shows it, without the token."""
    shown = re.sub(r"--hub_token[ =]\S+ ?", "", shlex.join(arguments)).replace(" --", " \\\n    --")
    return f"{launched_as} \\\n    {shown}"


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and precision")
    group.add_argument("--pretrained_model_name_or_path", required=True, help="Full-precision pipeline, the teacher.")
    group.add_argument("--revision", help="Revision of the pipeline on the Hub.")
    group.add_argument("--variant", help="Variant of its files, for example fp16.")
    group.add_argument("--recipe", default="auto", help='"auto", a shipped name, a JSON file, a Hub id, or 1 to 8.')
    group.add_argument("--target_bits", type=float, default=1.99, help="Average bits that allocation aims at.")
    group.add_argument("--in_out_bits", type=int, default=8, help="Bits of the first and last layer.")
    group.add_argument("--time_embedding", default="auto", help='"auto", "table", "cache" or "keep".')
    group.add_argument("--freeze_time_embedding", action="store_true", help="Do not train the time embedding.")
    group.add_argument(
        "--full_precision", action="store_true", help="Train without quantizing: the control of an experiment."
    )
    group.add_argument("--no_balance", action="store_true", help="Plain grids of 2**n levels instead of 2**n + 1.")
    group.add_argument("--scale_init", default="alternating", help='"alternating" or "minmax".')
    group.add_argument(
        "--init",
        choices=("rounding", "calibrated"),
        default="rounding",
        help="What Stage I starts from: rounded weights, or weights rounded for the inputs that layers see while the "
        "teacher samples a few images.",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="Hub id or folder of a captioned dataset.")
    group.add_argument("--dataset_config_name", help="Configuration of the dataset.")
    group.add_argument(
        "--train_data_dir",
        help="Instead, a folder: images with metadata.jsonl or a .txt beside each, WebDataset shards (*.tar), or "
        "images.npy with captions.json.",
    )
    group.add_argument("--prompts", help="Text file of prompts, one a line: Stage I then needs no images.")
    group.add_argument("--image_column", help="Column of the images; usual names are found.")
    group.add_argument("--caption_column", help="Column of the captions; usual names are found.")
    group.add_argument("--max_train_samples", type=int, help="Use the first so many images only.")
    group.add_argument("--cache_dir", help="Where datasets are kept.")
    group.add_argument("--resolution", type=int, help="Side of the images; default: the pipeline's own.")
    group.add_argument("--center_crop", action="store_true", help="Cut from the middle instead of anywhere.")
    group.add_argument("--random_flip", action="store_true", help="Mirror half of the images.")
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that read images.")


def _add_method(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    group.add_argument("--stage", choices=("1", "2", "both"), default="both", help="The stages to run.")
    group.add_argument(
        "--init_from",
        help="Where --stage 2 starts: a checkpoint of Stage I, or 'rounding' for none. Default: the last in "
        "OUTPUT_DIR/stage1; with --full_precision the original where there is none.",
    )
    group.add_argument("--feature_weight", type=float, default=0.01, help="Lambda of Stage I; 0 for no features.")
    group.add_argument(
        "--rate_weight",
        type=float,
        default=0.0,
        help="Price of a bit a weight in Stage I's loss, for a smaller file; 0 for none.",
    )
    group.add_argument(
        "--target_bytes",
        type=int,
        help="Size of the UNet's file: bits beyond it have the price of --rate_weight, in both stages.",
    )
    group.add_argument(
        "--timestep_sampling",
        choices=TIMESTEP_SAMPLING,
        default="beta",
        help="Distribution that timesteps are sampled from.",
    )
    group.add_argument("--timestep_alpha", type=float, default=3.0, help="Alpha of Beta(alpha, 1).")
    group.add_argument(
        "--measure_timestep_error", action="store_true", help="Measure and plot the error along the timesteps; end."
    )
    group.add_argument("--timestep_error_samples", type=int, default=2560, help="Samples for that.")
    group.add_argument(
        "--proportion_empty_prompts", type=float, default=0.1, help="Probability of training on the empty text."
    )
    group.add_argument(
        "--drawing_steps", type=int, default=10, help="Inference steps of the teacher's latents, with --prompts."
    )
    group.add_argument("--guidance_scale", type=float, default=7.5, help="Of those latents.")
    group.add_argument(
        "--redraw_every",
        type=int,
        default=10,
        help="Training steps that a batch of latents serves, with new noise at each.",
    )
    group.add_argument("--prediction_type", choices=("epsilon", "v_prediction", "sample"), help="If not as saved.")


def _add_optimization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimization")
    group.add_argument("--max_train_steps", type=int, default=20_000, help="Optimizer steps of a stage.")
    group.add_argument("--stage2_max_train_steps", type=int, help="Those of Stage II, where they differ.")
    group.add_argument("--train_batch_size", type=int, default=16, help="Of one device in one forward pass.")
    group.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="Forward passes of one optimizer step."
    )
    group.add_argument("--stage2_gradient_accumulation_steps", type=int, help="Those of Stage II, where they differ.")
    group.add_argument("--gradient_checkpointing", action="store_true", help="Less memory, about a quarter slower.")
    group.add_argument("--learning_rate", type=float, default=1e-5, help="Peak of the schedule.")
    group.add_argument(
        "--stage2_learning_rate",
        type=float,
        help="That of Stage II. Default: --learning_rate, after Stage I 1e-5 at most.",
    )
    group.add_argument("--lr_scheduler", default="constant", help="As in diffusers.optimization.")
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="Steps in which the rate rises.")
    group.add_argument(
        "--shard", action="store_true", help="Share weights, gradients and optimizer out over the processes (FSDP)."
    )
    group.add_argument("--use_8bit_adam", action="store_true", help="Needs bitsandbytes.")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="Decay of the first moment.")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="Decay of the second moment.")
    group.add_argument("--adam_weight_decay", type=float, default=1e-2, help="Of AdamW.")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="Of AdamW.")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="Gradients are scaled down to it.")
    group.add_argument("--use_ema", action="store_true", help="Average the weights, and save the average.")
    group.add_argument("--ema_decay", type=float, default=0.9999, help="Of that average.")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="Default: as accelerate configured.")
    group.add_argument("--allow_tf32", action="store_true", help="Multiply in TF32 on GPUs that have it.")
    group.add_argument("--seed", type=int, default=0, help="Of everything random.")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir", default="bitsfusion-model", help="For checkpoints, logs and the packed pipeline."
    )
    group.add_argument("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints.")
    group.add_argument("--checkpoints_total_limit", type=int, help="Keep so many of each stage. Default: all.")
    group.add_argument(
        "--resume_from_checkpoint",
        help='"latest", or the path of a checkpoint or its name in OUTPUT_DIR/stage1 or stage2.',
    )
    group.add_argument("--estimate_only", action="store_true", help="Print the time and memory of the run; end.")
    group.add_argument("-q", "--quiet", action="store_true", help="Print results and errors only.")
    group.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="Print what diffusers and transformers log, and where an error arose.",
    )
    group.add_argument("--report_to", help='"tensorboard", "wandb", ... or "all". Default: none.')
    group.add_argument("--logging_dir", default="logs", help="Within OUTPUT_DIR.")
    group.add_argument("--tracker_project_name", default="train_bitsfusion", help="Of the trackers.")
    group.add_argument("--push_to_hub", action="store_true", help="Push the packed pipeline as well.")
    group.add_argument("--hub_model_id", help="Repository to push to. Default: the name of OUTPUT_DIR.")
    group.add_argument("--hub_token", help="Token for it. Default: the one of `hf auth login`.")


def _add_validation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("validation")
    group.add_argument("--validation_prompts", nargs="+", help="Prompts for teacher and student, side by side.")
    group.add_argument("--validation_file", help="Instead, a tab-separated file as for `bitsfusion evaluate`.")
    group.add_argument("--validation_scorer", help="MODULE:FUNCTION that judges images by the file's Spec.")
    group.add_argument("--validation_steps", type=int, default=500, help="Steps between validations.")
    group.add_argument(
        "--validation_guidance_scale", type=float, default=7.5, help="Of classifier-free guidance in validation."
    )
    group.add_argument("--num_inference_steps", type=int, default=50, help="Of a validation image.")
    group.add_argument("--validation_grid", type=int, default=8, help="Prompts in the image; all are scored.")


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    _check_data(parser, args)
    _check_combinations(parser, args)
    _check_values(parser, args)


def _check_data(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    has_images = args.dataset_name is not None or args.train_data_dir is not None
    if not has_images and args.prompts is None:
        parser.error("Need either a dataset name, a training folder or a file of prompts.")
    if not has_images and args.stage != "1":
        parser.error("Stage II learns from images: give --dataset_name or --train_data_dir, or run --stage 1.")


def _check_combinations(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.quiet and args.verbose:
        parser.error("--quiet and --verbose exclude each other.")
    if args.validation_scorer is not None and args.validation_file is None:
        parser.error("--validation_scorer needs --validation_file, whose Spec column it reads.")
    if args.init_from is not None and args.stage != "2":
        parser.error("--init_from says where Stage II starts: use it with --stage 2.")
    if args.init == "calibrated" and (args.full_precision or args.stage == "2"):
        parser.error("--init says how Stage I starts: use it neither with --full_precision nor with --stage 2 alone.")
    if args.full_precision and (args.timestep_sampling == "error" or args.measure_timestep_error):
        parser.error("In full precision there is no error of quantization to measure along the timesteps.")
    if args.rate_weight and (args.full_precision or args.shard):
        parser.error("--rate_weight prices codes that each process has whole: not with --full_precision or --shard.")
    if args.target_bytes is not None and not args.rate_weight:
        parser.error("--target_bytes needs --rate_weight, the price of a bit a weight beyond it, such as 0.05.")
    if args.shard and args.use_8bit_adam:
        parser.error("--shard and --use_8bit_adam do not go together; --shard saves more.")


def _check_values(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name, minimum in _MIN_VALUES.items():
        for argument in (name, f"stage2_{name}"):
            value = getattr(args, argument, None)
            if value is not None and value < minimum:
                parser.error(f"--{argument} must be at least {minimum}.")
    if not 0 <= args.proportion_empty_prompts <= 1:
        parser.error("--proportion_empty_prompts must be in the range [0, 1].")
