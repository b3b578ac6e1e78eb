"""Calibration of a model: runs of the pipeline, rounding, and a cache of what is done."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from accelerate.utils import gather_object
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from tqdm.auto import tqdm

from ..codec.rounding import Rounding
from ..config.calibration import Calibration
from ..utils.fingerprints import hash_of_sums
from ..utils.processes import failing_together, process_state
from ..utils.tokenizers import unchanged_tokenizers
from .calls import Call
from .denoising import Denoising
from .folder import CalibrationFolder, TuningFolder, using_alone
from .layers import CalibratedLayer, quantize_layer
from .moments import InputMoments
from .passes import plan_passes
from .time_estimate import estimate_time
from .tuning import CALLS, tune

# Seconds of sampling that an interruption may cost; moments are large, so they are not written after every batch.
_SAVE_EVERY = 120.0
# Share of the time that writing moments may take where the disk is slow.
_SAVE_SHARE = 0.1


@failing_together()
def calibrate(
    pipeline: DiffusionPipeline,
    model: ModelMixin,
    bits: Mapping[str, int],
    calibration: Calibration,
    rounding: Rounding = Rounding(),
    progress: bool = True,
    rates: Mapping[str, float] | None = None,
) -> dict[str, CalibratedLayer]:
    """Quantize a model's layers for the inputs that they have while the pipeline samples.

    The model is not changed. Under `accelerate launch` the processes split the prompts, and then the layers; each must
    hold the same pipeline, on its own device, and each returns all layers.

    Args:
        pipeline: pipeline in full precision, on the device to use.
        model: component of the pipeline to calibrate.
        bits: bits by layer name; only these layers are calibrated.
        calibration: settings of the run.
        rounding: how scales are computed, and on which grid.
        progress: whether to show progress bars.
        rates: bits a weight that the codes of a layer may take in the file, by name; layers without are rounded to
            the least error and entropy.

    Returns:
        A calibrated layer for each name in `bits`, on the CPU.

    Raises:
        ValueError: an input or a weight holds NaN or infinite values, the memory does not suffice, or the cache folder
            belongs to another calibration.
        FolderInUseError: another calibration is using the cache folder.
    """
    with using_alone(calibration.cache_dir, process_state().process_index), unchanged_tokenizers(pipeline):
        return _calibrate(pipeline, model, bits, calibration, rounding, progress, rates or {})


def _calibrate(
    pipeline: DiffusionPipeline,
    model: ModelMixin,
    bits: Mapping[str, int],
    calibration: Calibration,
    rounding: Rounding,
    progress: bool,
    rates: Mapping[str, float],
) -> dict[str, CalibratedLayer]:
    layers = {name: model.get_submodule(name) for name in bits}
    passes = plan_passes(layers, calibration.memory_gb * 1e9)
    state = process_state()
    folder = None
    if calibration.cache_dir is not None:
        settings = _settings(pipeline, bits, calibration) | asdict(rounding)
        if rates:  # Folders of earlier versions have no such setting.
            settings["rates"] = dict(rates)
        folder = CalibrationFolder(calibration.cache_dir, settings, state.process_index)

    if _shows(progress) and (folder is None or folder.is_new):
        tqdm.write(str(estimate_time(pipeline, model, bits, calibration, rounding)), file=sys.stderr)
    done: dict[str, CalibratedLayer] = {}
    for index, names in enumerate(passes.groups):
        own = names[state.process_index :: state.num_processes]
        if folder is not None:
            found = {name: folder.load_layer(name, layers[name], bits[name]) for name in own}
            done |= {name: layer for name, layer in found.items() if layer is not None}
        missing = [name for name in own if name not in done]
        if not _any(bool(missing)):
            continue
        moments = {name: InputMoments(layers[name], passes.max_columns) for name in names}
        title = f"pass {index + 1} of {len(passes.groups)}"
        _gather(Denoising(pipeline, model, calibration), moments, folder, index, title, progress)
        moments = _summed(moments, missing)
        for name in tqdm(missing, desc=f"Rounding layers, {title}", disable=not _shows(progress)):
            done[name] = _round(layers[name], name, moments.pop(name), bits[name], rounding, rates.get(name))
            if folder is not None:
                folder.save_layer(name, done[name])
        if folder is not None:
            folder.drop_moments(index)
    return _of_all_processes(done)


@failing_together()
def record_calls(
    pipeline: DiffusionPipeline,
    model: ModelMixin,
    calibration: Calibration,
    timesteps: Sequence[float] | None = None,
    progress: bool = True,
) -> list[Call]:
    """Record predictions of the model on noisy latents of its own images, enough for each step of tuning.

    With a cache folder, `calibrate` must have been called before. Under `accelerate launch` the processes split the
    batches, and each returns all calls.

    Args:
        pipeline: pipeline in full precision, on the device to use.
        model: component of the pipeline that is calibrated.
        calibration: settings of the run.
        timesteps: timesteps that the quantized model will know; None for all.
        progress: whether to show a progress bar.

    Returns:
        The calls, on the CPU.

    Raises:
        ValueError: the model does not accept the latents alone.
    """
    denoising, state = Denoising(pipeline, model, calibration), process_state()
    with using_alone(calibration.cache_dir, state.process_index), unchanged_tokenizers(pipeline):
        own = _record_batches(denoising, _tuning_folder(calibration, timesteps), timesteps, progress)
    everyones = {batch: calls for part in gather_object([own]) for batch, calls in part.items()}
    return [call for batch in sorted(everyones) for call in everyones[batch]]


def _record_batches(
    denoising: Denoising, folder: TuningFolder | None, timesteps: Sequence[float] | None, progress: bool
) -> dict[int, list[Call]]:
    """Record this process's share of the batches, without those that the folder has already."""
    calibration, state = denoising.calibration, process_state()
    count = -(-calibration.tuning_steps * CALLS // denoising.num_batches)
    own: dict[int, list[Call]] = {}
    batches = range(state.process_index, denoising.num_batches, state.num_processes)
    for batch in tqdm(batches, desc="Sampling, to tune on", disable=not _shows(progress)):
        calls = None if folder is None else folder.load_calls(batch)
        if calls is None:
            calls = denoising.record(batch, count, timesteps)
            if folder is not None:
                folder.save_calls(batch, calls)
        own[batch] = calls
    return own


@failing_together()
def tune_packed(
    model: ModelMixin,
    calls: list[Call],
    calibration: Calibration,
    timesteps: Sequence[float] | None = None,
    progress: bool = True,
) -> None:
    """Tune a packed model in place on calls of `record_calls`; see `tuning.tune`.

    Under `accelerate launch` every process computes the same, and the first one saves the state.

    Args:
        model: packed model, on the device to use.
        calls: calls that `record_calls` has returned for the same timesteps.
        calibration: settings of the run.
        timesteps: timesteps that the packed model knows; None for all.
        progress: whether to show a progress bar.

    Raises:
        ValueError: see `tuning.tune`.
    """
    folder, state = _tuning_folder(calibration, timesteps), process_state()
    saved = time.monotonic()

    def save(reached: Mapping[str, Any]) -> None:
        nonlocal saved
        last = reached["step"] == calibration.tuning_steps
        if folder is not None and state.is_main_process and (last or time.monotonic() - saved > _SAVE_EVERY):
            folder.save_state(reached)
            saved = time.monotonic()

    with using_alone(calibration.cache_dir, state.process_index):
        tune(
            model,
            calls,
            calibration.tuning_steps,
            seed=calibration.seed,
            memory=calibration.memory_gb * 1e9,
            state=None if folder is None else folder.load_state(),
            save=save,
            progress=_shows(progress),
        )


def _tuning_folder(calibration: Calibration, timesteps: Sequence[float] | None) -> TuningFolder | None:
    if calibration.cache_dir is None:
        return None
    return TuningFolder(calibration.cache_dir, calibration.tuning_steps, timesteps)


def _gather(
    denoising: Denoising,
    moments: Mapping[str, InputMoments],
    folder: CalibrationFolder | None,
    index: int,
    title: str,
    progress: bool,
) -> None:
    """Gather moments over this process's share of the batches, without those that the folder has already."""
    state = process_state()
    batches = range(state.process_index, denoising.num_batches, state.num_processes)
    start = 0 if folder is None else folder.load_moments(index, moments, len(batches))
    steps = denoising.calibration.num_inference_steps
    pause, saved = _SAVE_EVERY, time.monotonic()
    with tqdm(
        total=len(batches) * steps, initial=start * steps, desc=f"Sampling, {title}", disable=not _shows(progress)
    ) as bar:
        for count, batch in enumerate(batches[start:], start=start + 1):
            denoising.gather(batch, moments, on_call=partial(_advance, bar, count * steps))
            bar.update(count * steps - bar.n)
            last = count == len(batches)
            if folder is not None and (last or time.monotonic() - saved > pause):
                started = time.monotonic()
                folder.save_moments(index, count, moments)
                saved = time.monotonic()
                pause = max(_SAVE_EVERY, (saved - started) / _SAVE_SHARE)


def _advance(bar: tqdm, goal: int) -> None:
    """Advance by a step, but not past `goal`: a scheduler may call the model more often than it has steps."""
    bar.update(min(1, goal - bar.n))


def _summed(moments: Mapping[str, InputMoments], names: Sequence[str]) -> dict[str, InputMoments]:
    """Return the moments over all processes, of the layers that this one rounds."""
    for moment in moments.values():
        moment.sum_over_processes()
    return {name: moments[name] for name in names}


def _round(
    layer: nn.Linear | nn.Conv2d,
    name: str,
    moments: InputMoments,
    bits: int,
    rounding: Rounding,
    rate: float | None,
) -> CalibratedLayer:
    try:
        return quantize_layer(layer, moments, bits, rounding, rate).to("cpu")
    except ValueError as error:
        raise ValueError(f"Cannot quantize {name}.weight: {error}.") from error


def _any(here: bool) -> bool:
    """Return whether `here` is true in any process."""
    return any(gather_object([here]))


def _of_all_processes(done: dict[str, CalibratedLayer]) -> dict[str, CalibratedLayer]:
    """Return the layers that all processes have calibrated."""
    return {name: layer for part in gather_object([done]) for name, layer in part.items()}


def _shows(progress: bool) -> bool:
    return progress and process_state().is_local_main_process


def _settings(pipeline: DiffusionPipeline, bits: Mapping[str, int], calibration: Calibration) -> dict[str, Any]:
    """Return all settings that the results depend on, JSON-safe."""
    settings = {key: value for key, value in calibration.to_dict().items() if key not in ("cache_dir", "tuning_steps")}
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return settings | {
        "pipeline": type(pipeline).__name__,
        "scheduler": json.loads(pipeline.scheduler.to_json_string()),
        "dtype": str(pipeline.dtype),
        "processes": process_state().num_processes,
        "weights": {name: hash_of_sums(part) for name, part in modules.items()},
        "bits": dict(bits),
    }
