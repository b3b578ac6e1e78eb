"""Trains a Stable Diffusion UNet in the precision that it will be packed in, by BitsFusion's two stages.

    accelerate launch examples/train_bitsfusion.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --prompts prompts.txt --stage 1 --mixed_precision bf16 --output_dir sd15-1.99bit

The same as `bitsfusion train`, as a script to copy and change: derive from `Training`, or take the parts in
`diffusers_bitsfusion.training`. docs/TRAINING.md has the rest.
"""

from __future__ import annotations

import sys

from diffusers_bitsfusion.cli.common import loudness
from diffusers_bitsfusion.cli.train_arguments import parse_args
from diffusers_bitsfusion.training.run.stages import Training


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_args(arguments, "train_bitsfusion.py", "accelerate launch examples/train_bitsfusion.py")
    with loudness(args.quiet, args.verbose):
        Training(args).run()


if __name__ == "__main__":
    main()
