"""What commands say that they will take, beside what they then take, on the shapes pipeline.

    python -m benchmarks.time_estimates --work WORK [--only NAME ...]

Each command runs whole in a process of its own. The seconds run from the line with its estimate to its end, so that
they hold the saving of the result as well, and not the trial that the estimate comes from.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import REPOSITORY

PIPELINE = REPOSITORY / "examples" / "shapes" / "pipeline"
# Arguments of the commands, by what is estimated; {out} is a folder of its own for each.
COMMANDS = {
    "calibration": "quantize {pipeline} {out} --target-bits 3 --calibrate",
    "calibration, 24 tuning steps": "quantize {pipeline} {out} --target-bits 3 --calibrate --tuning-steps 24",
    "analysis, output": "analyze {pipeline} --out {out} --method output",
    "analysis, gradient": "analyze {pipeline} --out {out} --method gradient",
    "analysis, calibrated": "analyze {pipeline} --out {out} --method calibrated --calls 2 --num-images 4",
    "analysis, prediction": "analyze {pipeline} --out {out} --method prediction --calls 2 --num-images 4",
    "analysis, full": "analyze {pipeline} --out {out} --method full --num-images 1 --steps 2 --qat-steps 2",
    "training": "train --pretrained_model_name_or_path {pipeline} --prompts {pipeline}/prompts.tsv --output_dir {out} "
    "--target_bits 3 --stage 1 --max_train_steps 20",
    "training from calibrated weights": "train --pretrained_model_name_or_path {pipeline} --output_dir {out} "
    "--prompts {pipeline}/prompts.tsv --target_bits 3 --stage 1 --max_train_steps 20 --init calibrated",
}
# The line with an estimate, of a training that of all its parts; and the units of `utils.durations.as_duration`.
_ESTIMATE = r"{} about ([\d.]+) (s|min|hours|days)"
_UNITS = {"s": 1, "min": 60, "hours": 3600, "days": 86400}


def said_and_taken(command: str, work: Path) -> tuple[float, float]:
    """Run a command; return the seconds that it said and those that it took from then on.

    Raises:
        RuntimeError: it fails, or says no estimate.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    words = shlex.split(command.format(pipeline=PIPELINE, out=work / "out"))
    program = [sys.executable, "-u", "-m", "diffusers_bitsfusion", *words]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        program, cwd=work, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said, at, printed = None, 0.0, []
    estimate = re.compile(_ESTIMATE.format("In all" if words[0] == "train" else "takes"))
    for line in process.stdout:  # Universal newlines: each state of a progress bar is a line as well.
        printed.append(line)
        found = estimate.search(line)
        if found and said is None:
            said, at = float(found[1]) * _UNITS[found[2]], time.perf_counter()
    code, taken = process.wait(), time.perf_counter() - at
    if code or said is None:
        raise RuntimeError(f"{words} ended with {code}: {''.join(printed[-20:])}")
    return said, taken


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the results, which are removed")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    args = parser.parse_args()
    print("| | said, s | taken, s | taken of said |\n|---|---|---|---|")
    for name in args.only:
        said, taken = said_and_taken(COMMANDS[name], args.work.resolve() / "run")
        print(f"| {name} | {said:.3g} | {taken:.3g} | {taken / said:.2f} |", flush=True)


if __name__ == "__main__":
    main()
