"""Saves killed at every step that changes the disk; as a script, the file prints the number of each outcome.

A save runs in a forked child that ends, without any clean-up, before its n-th opening, renaming, removing, making or
flushing of a file or folder. The folder must then hold the old files or the new ones, byte for byte, or be refused by
loading with the command that finishes the save; that command must give the new files, and the next save must leave
nothing hidden. Where the save pushes as well, to a Hub on loopback, the Hub must never have seen a hidden file.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as found:
        PORT = found.getsockname()[1]
    # huggingface_hub reads them when it is imported.
    os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{PORT}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_kills"}
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for part in (".", "../examples", ".."):
        sys.path.insert(0, str(Path(__file__).parent / part))

import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from fresh_process import flush_nothing
from hub_server import Hub, content
from tiny import tiny_pipeline, tiny_unet

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.integrations.folder_commit import PREFIX, finish_saves, repair

# Names of the audit events of Python that count as steps.
_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"}

# Repository that one of the saves is pushed to.
_REPOSITORY = "me/unet"

# Exit code of a child that ended at its step.
_KILLED = 77

Save = Callable[[Path], None]


def killed_at(step: int, save: Save, folder: Path) -> bool:
    """Save in a child that ends before its `step`-th change of the disk; return whether it has that many."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == _KILLED
    try:
        _end_before(step)
        save(folder)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def _end_before(step: int) -> None:
    left = step
    fsync = os.fsync

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os._exit(_KILLED)

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and not (event == "open" and _is_reading(arguments)):
            count()

    def counting_fsync(fd: Any) -> None:
        count()
        fsync(fd)

    os.fsync = counting_fsync
    sys.addaudithook(on_event)


def _is_reading(arguments: tuple[Any, ...]) -> bool:
    """Return whether an audited opening changes nothing; flags are None where Python gives a mode only."""
    mode, flags = arguments[1], arguments[2]
    if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return False
    return mode is None or not set(mode) & set("wax+")


def outcomes(old: Save, new: Save, load: Callable[[Path], None], work: Path, every: int = 1) -> Iterator[str]:
    """Yield the outcome of a kill at every `every`-th step of saving `new` over `old`: old, new or refused.

    Args:
        old: first save.
        new: save that is killed.
        load: function that loads a folder.
        work: empty folder to work in.
        every: distance of the steps.

    Raises:
        AssertionError: a folder is a mixture, or hidden files are left after the next save.
    """
    before, after = work / "before" / "model", work / "after" / "model"  # The cards name the folder.
    for folder, saves in ((before, [old]), (after, [old, new])):
        for save in saves:
            save(folder)
    files = {"old": visible(before), "new": visible(after)}
    step = 1
    while True:
        folder = work / "killed" / "model"
        shutil.copytree(before, folder)
        if not killed_at(step, new, folder):
            shutil.rmtree(folder)
            return
        yield _outcome(folder, files, load, new)
        shutil.rmtree(folder)
        step += every


def visible(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder without those of unfinished saves."""
    return {name: data for name, data in content(folder).items() if PREFIX not in name}


def _outcome(folder: Path, files: dict[str, dict[str, bytes]], load: Callable[[Path], None], new: Save) -> str:
    content = visible(folder)
    outcome = next((name for name, expected in files.items() if content == expected), "refused")
    if outcome == "refused":
        with pytest.raises(ValueError, match=f"{re.escape(str(folder))}.*--repair"):
            load(folder)
        repaired = folder.parent.with_name("repaired") / folder.name
        repaired.parent.mkdir(exist_ok=True)
        os.rename(folder, repaired)  # The save into a moved folder can be finished, too.
        assert repair(repaired) == 1
        assert visible(repaired) == files["new"]
        os.rename(repaired, folder)
    new(folder)
    assert visible(folder) == files["new"]
    assert not list(folder.glob(f"{PREFIX}*")), "hidden files are left"
    assert finish_saves(folder) == 0
    return outcome


def scenarios(work: Path) -> dict[str, tuple[Save, Save, Callable[[Path], None]]]:
    """Return (old save, new save, function that loads) of each scenario, by its name."""
    source, tokenizer = work / "source", work / "tokenizer"
    tokenizer.mkdir()
    tiny_pipeline(tokenizer).save_pretrained(source)
    config = BitsFusionConfig(recipe=2)
    first, second = (quantize_model(tiny_unet(seed=seed), config, progress=False) for seed in (0, 1))
    plain = tiny_unet()
    pipes = [StableDiffusionPipeline.from_pretrained(source, quantization_config=config) for _ in range(2)]
    pipes[1].unet = second

    def copy_source(folder: Path) -> None:
        shutil.copytree(source, folder, dirs_exist_ok=True)

    def load_unet(folder: Path) -> None:
        UNet2DConditionModel.from_pretrained(folder)

    def load_pipeline(folder: Path) -> None:
        StableDiffusionPipeline.from_pretrained(folder)

    def push(folder: Path) -> None:
        second.save_pretrained(folder, push_to_hub=True, repo_id=_REPOSITORY)

    return {
        "single over single": (first.save_pretrained, second.save_pretrained, load_unet),
        "single over sharded": (_sharded(first), second.save_pretrained, load_unet),
        "sharded over sharded": (_sharded(first), _sharded(second), load_unet),
        "packed over full precision": (plain.save_pretrained, second.save_pretrained, load_unet),
        "pipeline over pipeline": (pipes[0].save_pretrained, pipes[1].save_pretrained, load_pipeline),
        "pipeline over full precision": (
            copy_source,
            pipes[1].save_pretrained,
            load_pipeline,
        ),
        "single over single, pushed": (first.save_pretrained, push, load_unet),
    }


def _sharded(model: UNet2DConditionModel) -> Save:
    return lambda folder: model.save_pretrained(folder, max_shard_size="60KB")


def main(every: int, only: str) -> None:
    """Print the outcomes of every scenario whose name contains `only`."""
    torch.set_num_threads(1)  # Forked children have no other threads.
    flush_nothing()  # A flush is a step to be killed at, and otherwise nothing that the end of a process undoes.
    gc.freeze()  # Each child would copy what it walks.
    logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    hub = Hub()
    with tempfile.TemporaryDirectory() as folder, hub.running(PORT):
        for number, (name, saves) in enumerate(scenarios(Path(folder)).items()):
            if only not in name:
                continue
            work = Path(folder) / str(number)
            work.mkdir()
            counts = Counter(outcomes(*saves, work, every))
            if name.endswith("pushed"):
                assert hub.repositories[_REPOSITORY].files == visible(work / "after" / "model")
            print(f"{name:<30} {sum(counts.values()):>4} kills: {dict(sorted(counts.items()))}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1, sys.argv[2] if len(sys.argv) > 2 else "")
