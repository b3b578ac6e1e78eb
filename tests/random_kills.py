"""Calibrations, analyses and trainings killed at random moments, which go on to the bytes of an uninterrupted one.

    python tests/random_kills.py [KILLS_OF_EACH] [PART_OF_A_NAME] [SEED]

A run works in a forked child, which SIGKILL ends after a random share of the time that a whole run takes, once to
three times in a row. The same command then goes on to the end; what it leaves must be what an uninterrupted run left.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for part in (".", "../examples", ".."):
        sys.path.insert(0, str(Path(__file__).parent / part))

import numpy as np
import torch
import train_bitsfusion
import transformers
from accelerate.utils import load
from diffusers.utils import logging
from hub_server import content
from tiny import tiny_pipeline

from diffusers_bitsfusion.analysis.sensitivity import analyze
from diffusers_bitsfusion.analysis.study import Settings
from diffusers_bitsfusion.calibration import run as calibration_run
from diffusers_bitsfusion.cli.quantize import quantize
from diffusers_bitsfusion.evaluation import Sampling

_CAPTIONS = ["ab", "c", "d", "e f"]
_FEW_LAYERS: dict[str, Any] = {
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
}


@dataclass(frozen=True)
class Work:
    """Work that is killed.

    Attributes:
        name: name of the command.
        run: function that works in a folder, from the start or from where it was killed.
        result: function that returns what the work leaves in the folder, by name.
    """

    name: str
    run: Callable[[Path], object]
    result: Callable[[Path], Mapping[str, Any]]


@dataclass
class Outcome:
    """Outcome of the kills of one kind of work.

    Attributes:
        kills: number of kills.
        runs: number of runs that were killed and went on to the end.
        with_files: number of kills after which the work had files to go on from.
        seconds: seconds of an uninterrupted run.
    """

    kills: int = 0
    runs: int = 0
    with_files: int = 0
    seconds: float = 0.0


def kinds(work: Path) -> list[Work]:
    """Write what the work needs into a folder; return all kinds of it."""
    source, tokenizer, data = work / "source", work / "tokenizer", work / "data"
    for folder in (tokenizer, data):
        folder.mkdir()
    tiny_pipeline(tokenizer, **_FEW_LAYERS).save_pretrained(source)
    prompts = data / "prompts.txt"
    prompts.write_text("\n".join(_CAPTIONS))
    images = np.random.default_rng(0).integers(0, 255, (len(_CAPTIONS), 16, 16, 3), dtype=np.uint8)
    np.save(data / "images.npy", images)
    (data / "captions.json").write_text(json.dumps({"captions": _CAPTIONS}))
    settings = Settings(qat_steps=1, sampling=Sampling(steps=1, batch_size=2))

    def calibrate(folder: Path) -> None:
        options: dict[str, Any] = {"samples": 3, "steps": 2, "tuning_steps": 4, "overwrite": True}
        quantize(str(source), folder / "out", recipe="2", calibrate=True, prompts=prompts, dtype="float32", **options)

    def train(folder: Path) -> None:
        options = {
            "pretrained_model_name_or_path": source,
            "output_dir": folder / "out",
            "train_data_dir": data,
            "recipe": 2,
            "max_train_steps": 6,
            "train_batch_size": 2,
            "checkpointing_steps": 2,
            "resume_from_checkpoint": "latest",
        }
        train_bitsfusion.main([*(str(part) for key, value in options.items() for part in (f"--{key}", value))])

    return [
        Work("calibrate", calibrate, lambda folder: content(folder / "out")),
        Work("analyze", lambda folder: analyze(source, folder, _CAPTIONS, settings=settings), _measured),
        Work("train", train, _trained),
    ]


def _measured(folder: Path) -> dict[str, Any]:
    """Return the lines of an analysis without the seconds that each took."""
    lines = [json.loads(line) for line in (folder / "analysis.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    return {f"line {number}": line for number, line in enumerate(kept, start=1)}


def _trained(folder: Path) -> dict[str, Any]:
    """Return what a training leaves; of states of random generators the values.

    Their pickles, and so the checksums of these, depend on which of equal texts are one object.
    """
    found: dict[str, Any] = dict(content(folder / "out"))
    for name in found:
        if name.endswith(".pkl"):
            states = load(folder / "out" / name)
            states["torch_manual_seed"] = states["torch_manual_seed"].tolist()
            kind, keys, *rest = states["numpy_random_seed"]
            found[name] = states | {"numpy_random_seed": [kind, keys.tolist(), *rest]}
        elif name.endswith("run.json"):
            run = json.loads(found[name])
            run["files"] = {file: value for file, value in run["files"].items() if not file.endswith(".pkl")}
            del run["checksum"]
            found[name] = run
    return found


def start(work: Work, folder: Path) -> int:
    """Start the work in a child process, and return its id."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        work.run(folder)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def finish(work: Work, folder: Path) -> Mapping[str, Any]:
    """Work to the end, and return what that leaves.

    Raises:
        AssertionError: the work failed.
    """
    status = os.waitpid(start(work, folder), 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0, folder.with_suffix(".log").read_text()[-3000:]
    return work.result(folder)


def kill_at_random(work: Work, folder: Path, kills: int, generator: random.Random) -> Outcome:
    """Kill runs of the work until there were so many kills, and compare each with an uninterrupted run.

    Raises:
        AssertionError: a run did not go on, or not to the same bytes.
    """
    outcome = Outcome()
    folder.mkdir()
    killed = folder / "run"  # The cards name the folder, so that all runs work in the same.
    killed.mkdir()
    started = time.monotonic()
    expected = finish(work, killed)
    outcome.seconds = time.monotonic() - started
    shutil.rmtree(killed)
    while outcome.kills < kills:
        killed.mkdir()
        own = min(generator.randint(1, 3), kills - outcome.kills)
        while own:
            child = start(work, killed)
            time.sleep(generator.uniform(0, outcome.seconds))
            try:
                os.killpg(child, signal.SIGKILL)
            except ProcessLookupError:  # It has not made its group yet, or has ended.
                os.kill(child, signal.SIGKILL)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
                shutil.rmtree(killed)
                killed.mkdir()
                continue
            own -= 1
            outcome.kills += 1
            outcome.with_files += any(killed.rglob("*"))
        found = finish(work, killed)
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        assert not differing, f"{work.name} went on to another {', '.join(differing)}; {outcome.kills} kills"
        outcome.runs += 1
        shutil.rmtree(killed)
    return outcome


def main(kills: int, only: str, seed: int) -> None:
    """Print the outcome of each kind of work whose name contains `only`."""
    torch.set_num_threads(1)  # Forked children have no other threads.
    if only in "analyze":
        import torchmetrics  # noqa: F401 - Each child would import it, which takes as long as its work.
    gc.freeze()  # Children need not look through what is imported whenever they collect garbage.
    logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    calibration_run._SAVE_EVERY = 0  # Moments and the state of tuning are saved whenever they could be.
    with tempfile.TemporaryDirectory() as folder:
        for work in kinds(Path(folder)):
            if only in work.name:
                outcome = kill_at_random(work, Path(folder) / work.name, kills, random.Random(seed))
                print(
                    f"{work.name:<10} {outcome.kills:>3} kills of {outcome.runs} runs of {outcome.seconds:.1f} s, "
                    f"{outcome.with_files} with files to go on from: all to the same bytes",
                    flush=True,
                )


if __name__ == "__main__":
    arguments = dict(enumerate(sys.argv[1:]))
    main(int(arguments.get(0, 20)), arguments.get(1, ""), int(arguments.get(2, 0)))
