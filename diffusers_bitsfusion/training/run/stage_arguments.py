"""What the arguments say of a stage, and which checkpoint of it a run goes on from."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checkpoints import checkpoints, find_checkpoint, read_settings

# Highest learning rate of Stage II after Stage I, unless it is given: the higher its rate, the further Stage II leaves
# the teacher.
STAGE_2_RATE = 1e-5


def stages(args: argparse.Namespace) -> tuple[int, ...]:
    """Return the stages to run, in order."""
    return (1, 2) if args.stage == "both" else (int(args.stage),)


def of_stage(args: argparse.Namespace, name: str, stage: int) -> int:
    """Return the value of an argument that Stage II may have its own value of."""
    own: int | None = getattr(args, f"stage2_{name}") if stage == 2 else None
    value: int = getattr(args, name) if own is None else own
    return value


def learning_rate(args: argparse.Namespace, stage: int) -> float:
    """Return the peak of a stage's rate; a Stage II after Stage I does not take over a higher rate."""
    if stage == 2 and args.stage2_learning_rate is not None:
        return float(args.stage2_learning_rate)
    if stage == 2 and args.stage == "both":
        return min(float(args.learning_rate), STAGE_2_RATE)
    return float(args.learning_rate)


def stages_left(args: argparse.Namespace) -> tuple[int, ...]:
    """Return the stages to run: only the second where `--resume_from_checkpoint` names a checkpoint of it."""
    which = args.resume_from_checkpoint
    if which in (None, "latest") or args.stage != "both":
        return stages(args)
    path = find_checkpoint(Path(args.output_dir), which)
    assert path is not None
    named = read_settings(path)[1]["stage"]
    return (2,) if named == 2 else (1, 2)


def checkpoint_of(args: argparse.Namespace, stage: int) -> Path | None:
    """Return the checkpoint of this stage that `--resume_from_checkpoint` names, if any.

    Raises:
        FileExistsError: no run is to be continued, but the folder has an earlier run's checkpoints; or Stage I
            would continue to another end than the one that the existing Stage II started from.
    """
    run, which = Path(args.output_dir), args.resume_from_checkpoint
    folder = run / f"stage{stage}"
    if which is None and checkpoints(folder):
        raise FileExistsError(
            f"{folder} holds checkpoints of an earlier run. Continue it with --resume_from_checkpoint latest, or "
            "choose another --output_dir."
        )
    path = find_checkpoint(folder, which)
    # A path is a checkpoint of one stage, so that the other of two stages has none.
    if path is None or args.stage != "both":
        return path
    step, settings = read_settings(path)
    second = run / "stage2"
    if stage == settings["stage"] == 1 and step < args.max_train_steps and checkpoints(second):
        raise FileExistsError(
            f"{second} holds checkpoints that came from another end of Stage I. Delete them, continue one of "
            "them, or choose another --output_dir."
        )
    return path if settings["stage"] == stage else None


def end_of_stage_1(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint that Stage II starts from, if any."""
    start = args.init_from
    return None if start == "rounding" else find_checkpoint(Path(args.output_dir) / "stage1", start or "latest")
