"""The command `bitsfusion train`."""

from __future__ import annotations

import typer

from .common import loudness, user_errors
from .train_arguments import parse_args

LAUNCHED_AS = "accelerate launch -m diffusers_bitsfusion train"


def train(context: typer.Context) -> None:
    """Train a Stable Diffusion UNet in the precision that it will be packed in.

    On several devices: `accelerate launch -m diffusers_bitsfusion train ...`.
    """
    args = parse_args(context.args, "bitsfusion train", LAUNCHED_AS)
    with loudness(args.quiet, args.verbose), user_errors():
        from diffusers_bitsfusion.training.run.stages import Training

        Training(args).run()
