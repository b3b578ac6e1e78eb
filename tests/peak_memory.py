"""Peak memory of files that are refused beside that of the right ones; as a script, the file prints it.

    python tests/peak_memory.py ["PART OF: READER, CHANGE"]

Each file is read in a forked child, whose resident memory is measured from the fork on: by how much it grows, and
where it ends with all that is imported. Every hostile file must be refused by ValueError or OSError.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for part in (".", "fuzz", "../examples", ".."):
        sys.path.insert(0, str(Path(__file__).parent / part))

import torch
import transformers
from diffusers import UNet2DConditionModel
from diffusers.utils import logging
from hostile_files import CALIBRATION, CONFIG, HEADER, LINES, MODEL, RECIPE, TIME, TRAINING, Change
from targets import targets
from tiny import tiny_unet

from diffusers_bitsfusion import BitsFusionConfig, quantize_model, size_report
from diffusers_bitsfusion.reporting.verification import verify_checkpoint

# Ratio that no refused file may exceed.
BOUND = 1.2

# Address space that a child may add, so that a reader without bounds fails instead of filling the machine.
_ROOM = 6 << 30

Read = Callable[[Path], Any]


@dataclass
class Reading:
    """Memory of one reading, in bytes, and whether the file was refused.

    Attributes:
        growth: resident memory at its highest, over that at the start.
        peak: the same, with all that was there at the start.
        refused: whether a ValueError or OSError was raised.
    """

    growth: int
    peak: int
    refused: bool


def measure(read: Read, folder: Path) -> Reading:
    """Read a folder in a forked child, and return the memory that it took.

    Raises:
        AssertionError: it raised anything but ValueError and OSError, or died.
    """
    ctypes.CDLL(None).malloc_trim(0)
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        os.close(receiver)
        outcome = "raw"
        start = _status("VmRSS")
        room = _status("VmSize") + _ROOM
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        try:
            read(folder)
            outcome = "accepted"
        except (ValueError, OSError):
            outcome = "refused"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {str(error)[:200]}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        os.write(sender, json.dumps([peak - start, peak, outcome]).encode())
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as stream:
        content = stream.read()
    os.waitpid(child, 0)
    assert content, f"the process that read {folder} died"
    growth, peak, outcome = json.loads(content)
    assert outcome in ("refused", "accepted"), outcome
    return Reading(growth, peak, outcome == "refused")


def _status(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) * 1024


# Changes by the name of a target of the fuzzer.
_CHANGES = {
    "load text encoder": MODEL,
    "calibration": CALIBRATION,
    "training": TRAINING,
    "recipe": RECIPE,
    "analysis": LINES,
}


@dataclass
class Reader:
    """Reader with sound files and the changes that make them hostile."""

    name: str
    folder: Path
    read: Read
    changes: dict[str, Change]


def readers(work: Path, only: str) -> list[Reader]:
    """Write sound files; return the readers of them whose names contain `only`, and those of a model."""
    model, small = work / "model", work / "small"
    unet = tiny_unet(block_out_channels=(128, 256), cross_attention_dim=64, attention_head_dim=8)
    config = BitsFusionConfig(recipe=4, time_embedding="table")
    quantize_model(unet, config, progress=False).save_pretrained(model)
    small.mkdir()
    wanted = {name: changes for name, changes in _CHANGES.items() if _chosen(name, changes, only)}
    found = targets(small) if wanted else []
    return [
        Reader("load", model, UNet2DConditionModel.from_pretrained, MODEL | TIME),
        Reader("inspect --verify", model, verify_checkpoint, MODEL | TIME | CONFIG),
        Reader("inspect", model, size_report, HEADER | CONFIG),
        *(
            Reader(target.name, target.folder, target.read, wanted[target.name])
            for target in found
            if target.name in wanted
        ),
    ]


def _chosen(reader: str, changes: dict[str, Change], only: str) -> dict[str, Change]:
    """Return the changes for a reader whose name, "reader, change", contains `only`."""
    return {name: change for name, change in changes.items() if only in f"{reader}, {name}"}


def compare(reader: Reader, work: Path) -> tuple[Reading, dict[str, Reading]]:
    """Return the readings of the right files and of each change of them."""
    readings = {}
    for name, change in reader.changes.items():
        copied = work / "changed"
        shutil.copytree(reader.folder, copied)
        change(copied)
        readings[name] = measure(reader.read, copied)
        shutil.rmtree(copied)
    return measure(reader.read, reader.folder), readings


def main(only: str) -> bool:
    """Print the memory of each reader and change that `only` chooses; return whether all is within the bound."""
    torch.set_num_threads(1)  # Forked children have no other threads.
    logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    ratios, refused = [], True
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for reader in readers(work, only):
            reader.changes = _chosen(reader.name, reader.changes, only)
            if not reader.changes:
                continue
            right, readings = compare(reader, work)
            print(f"{reader.name}: right {right.growth / 1e6:.0f} MB more, {right.peak / 1e6:.0f} in all", flush=True)
            for name, reading in readings.items():
                ratio = reading.peak / right.peak
                ratios.append(ratio)
                refused &= reading.refused
                print(
                    f"  {'refused' if reading.refused else 'ACCEPTED':<9} {name:<34} "
                    f"{reading.growth / 1e6:>6.0f} MB more, {ratio:.2f} times in all",
                    flush=True,
                )
    print(f"{len(ratios)} files, {'all refused' if refused else 'NOT ALL REFUSED'}: at most {max(ratios):.2f} times")
    return refused and max(ratios) <= BOUND


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1] if len(sys.argv) > 1 else ""))
