"""Full precision beside quantized, in the browser: both images, sizes, times and the difference.

    python examples/app.py --pipeline PATH_OR_ID --quantized PATH_OR_ID

Without arguments it shows the shapes pipeline beside its UNet that was trained in about 2 bits. As a Space, where
nobody gives arguments, the variables APP_PIPELINE and APP_QUANTIZED name the pipelines (docs/USING.md). The same as
`bitsfusion app`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import gradio as gr

from diffusers_bitsfusion.app.models import fetch, quantize
from diffusers_bitsfusion.app.page import LAUNCH, build_app

SHAPES = Path(__file__).parent / "shapes" / "pipeline"
TRAINED = Path(__file__).parent / "shapes" / "unet-2bit"
PROMPTS = ("three green hearts", "a red circle", "a blue square and a green triangle", "a heart to the left of a ring")


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line, of the environment where it is silent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    quantized = os.environ.get("APP_QUANTIZED")
    parser.add_argument(
        "--pipeline", default=os.environ.get("APP_PIPELINE"), help="folder or Hub id, in full precision"
    )
    parser.add_argument(
        "--quantized",
        action="append",
        help="folder or Hub id of a quantized pipeline, or of a UNet for the pipeline; can be repeated",
    )
    parser.add_argument(
        "--target-bits", type=float, help="instead: round the pipeline to so many bits a weight (default: 3)"
    )
    parser.add_argument("--server-port", type=int, help="7860, or the next free one")
    arguments = parser.parse_args()
    if arguments.quantized and arguments.target_bits is not None:
        parser.error("--target-bits says how to round the pipeline, which --quantized makes needless: give one.")
    if not arguments.quantized and arguments.target_bits is None and quantized:
        arguments.quantized = [quantized]
    return arguments


def build(arguments: argparse.Namespace) -> gr.Blocks:
    """Return the page of the pipelines that the arguments name.

    Raises:
        OSError: one of them is neither a folder nor on the Hub.
        ValueError: one is quantized that should not be, or the reverse.
    """
    full = SHAPES if arguments.pipeline is None else fetch(arguments.pipeline)
    chosen = [fetch(source) for source in arguments.quantized or []]
    if not chosen and arguments.pipeline is None and arguments.target_bits is None:
        chosen = [TRAINED]
    with tempfile.TemporaryDirectory() as scratch:
        if not chosen:
            chosen = [quantize(full, Path(scratch, "rounded"), arguments.target_bits or 3.0)]
        return build_app(full, *chosen, examples=PROMPTS if full == SHAPES else ())


def main() -> None:
    """Serve the page."""
    arguments = parse_arguments()
    try:
        app = build(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"Error: {error}")
    app.launch(server_port=arguments.server_port, **LAUNCH)


if __name__ == "__main__":
    main()
