"""Fuzzing of every reader of files by seeded mutations; it prints the number of inputs of each outcome.

    python tests/fuzz/run.py --inputs 100000

It exits with 1 if a reader raised another exception than ValueError and OSError ("raw"), hung, or accepted other
values than were written ("different").
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for part in (Path(__file__).parent, Path(__file__).parents[2], Path(__file__).parents[2] / "examples"):
    sys.path.insert(0, str(part))

import transformers  # noqa: E402
from diffusers.utils import logging  # noqa: E402
from targets import Target, read_settings, targets  # noqa: E402

# Seconds of this process on a processor after which a reader hangs: its files have some kilobytes.
_HANG = 30


def outcome(target: Target, seed: int, work: Path) -> tuple[str, str]:
    """Return (outcome, message of the exception) of one input.

    Args:
        target: reader.
        seed: seed of the mutation.
        work: folder for the mutated files.
    """
    folder = target.mutate(random.Random(seed), work)
    started = time.process_time()
    try:
        content = target.read(folder)
    except UnicodeError as error:
        return "raw", f"{type(error).__name__}: {error}"
    except (ValueError, OSError) as error:
        if not _is_printable(str(error)):
            return "raw", f"not printable: {error!r}"
        return _unless_slow("refused", started), str(error)
    except BaseException as error:
        return "raw", f"{type(error).__name__}: {error}"
    if target.same is not None and not target.same(content):
        return "different", ""
    return _unless_slow("accepted", started), ""


def _is_printable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unless_slow(result: str, started: float) -> str:
    return "hang" if time.process_time() - started > _HANG else result


def fuzz(inputs: int, first_seed: int = 0, only: str = "") -> dict[str, Counter[str]]:
    """Return the number of outcomes by reader; print failures with the seed that reproduces them.

    Args:
        inputs: number of inputs.
        first_seed: seed of the first input.
        only: part of the names of the readers to fuzz.
    """
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        chosen = [target for target in targets(work) if only in target.name]
        for target in chosen:
            assert target.same is None or target.same(target.read(target.folder)), target.name
        for seed in range(first_seed, first_seed + inputs):
            target = chosen[seed % len(chosen)]
            result, message = outcome(target, seed, work)
            counts.setdefault(target.name, Counter())[result] += 1
            if result not in ("refused", "accepted"):
                print(f"{target.name}, seed {seed}: {result} {message[:300]}", flush=True)
            if "settings".startswith(only or "settings"):
                counts.setdefault("settings", Counter())[_settings_outcome(seed)] += 1
    return counts


def _settings_outcome(seed: int) -> str:
    problem: BaseException
    try:
        read_settings(random.Random(seed))
    except UnicodeError as error:
        problem = error
    except (ValueError, OSError):
        return "refused"
    except BaseException as error:
        problem = error
    else:
        return "accepted"
    print(f"settings, seed {seed}: raw {type(problem).__name__}: {str(problem)[:300]}", flush=True)
    return "raw"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000, help="Number of inputs.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the first input.")
    parser.add_argument("--only", default="", help="Part of the names of the readers.")
    arguments = parser.parse_args()
    counts = fuzz(arguments.inputs, arguments.seed, arguments.only)
    for name, outcomes in counts.items():
        print(f"{name:<20} {sum(outcomes.values()):>7} inputs: {dict(sorted(outcomes.items()))}")
    total = sum(counts.values(), Counter())
    print(f"{'all':<20} {sum(total.values()):>7} inputs: {dict(sorted(total.items()))}")
    sys.exit(bool(total.keys() - {"refused", "accepted"}))


if __name__ == "__main__":
    main()
