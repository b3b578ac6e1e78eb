"""Sensitivity analysis: the effect of rounding each layer alone (paper, section 4), and cheaper estimates."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..evaluation import Clip, load_pipeline
from ..evaluation.image_distances import require_image_metrics
from ..utils.durations import as_duration
from ..utils.fingerprints import hash_of_settings, hash_of_weights
from ..utils.processes import failing_together, process_state
from . import estimates, single_layer
from .header import Header, Item
from .journal import Journal, finish, open_journal, read_manifest, read_records
from .layer_cost import layer_cost
from .recording import Reference, record
from .results import Analysis
from .study import Record, Settings, Study, analysed_layers, denoiser, undecided_bits
from .time_estimate import estimate_seconds

# Numbers of bits that every layer is measured at (paper, section 4).
BITS = (1, 2, 3)

# Name of the file of reference images and calls.
_REFERENCE = "reference.pt"
# Names of the packages whose versions an analysis records.
_PACKAGES = ("diffusers_bitsfusion", "torch", "diffusers", "transformers")

# Time-out of processes that wait for each other's shares, which may take days.
_TIMEOUT = timedelta(days=7)

# Seconds below which an estimate names no number: writing the results takes as long as such an analysis.
_FEW_SECONDS = 5

DEFAULT_SETTINGS = Settings()


@dataclass(frozen=True)
class Method:
    """A method of measuring sensitivity.

    Attributes:
        measure: function that yields a record for each of the given (layer, bits).
        metrics: names of a record's metrics; the first one is the sensitivity.
        settings: names of the `Settings` that the result depends on.
    """

    measure: Callable[[Study, Iterable[Item]], Iterator[Record]]
    metrics: tuple[str, ...]
    settings: tuple[str, ...]

    @property
    def needs_sampling(self) -> bool:
        """True if the method needs images or calls of the full-precision model."""
        return "sampling" in self.settings


METHODS = {
    "full": Method(single_layer.measure, ("mse", "psnr", "ssim"), ("qat_steps", "learning_rate", "sampling", "lpips")),
    "calibrated": Method(estimates.measure_calibrated, ("calibrated_error",), ("calls", "sampling")),
    "prediction": Method(estimates.measure_prediction, ("prediction_error",), ("calls", "sampling")),
    "gradient": Method(estimates.measure_gradient, ("gradient_error",), ("calls", "sampling")),
    "output": Method(estimates.measure_output, ("output_error",), ("calls", "sampling")),
    "weight": Method(estimates.measure_weight, ("weight_error",), ()),
}


@failing_together()
def analyze(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    captions: Sequence[str] = (),
    *,
    method: str = "full",
    settings: Settings = DEFAULT_SETTINGS,
    clip: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Analysis:
    """Measure every layer whose bits a recipe decides, at 1, 2 and 3 bits.

    An analysis that was killed at any moment continues when it is called again with the same arguments. Under
    `accelerate launch` the processes share the work; `out` must then be a folder that all of them can read. The result
    does not depend on their number.

    Args:
        source: folder or Hub id of a pipeline in full precision.
        out: folder for the result, `analysis.jsonl`, and for the files that continuing needs.
        captions: prompts; not needed for "weight".
        method: "full": round the layer, train it, sample and compare, as the paper does. "calibrated": change of the
            predicted noise with the layer calibrated, for models that will be. Estimates for any other, from good to
            cheap: "prediction": change of the predicted noise with the layer rounded; "gradient": the same to second
            order, for all layers at once; "output": change of the layer's own output; "weight": of its weight.
        settings: settings of the measurement.
        clip: folder or Hub id of a CLIP for the full analysis; when left out, the folder `clip/` of the pipeline.
            Without either the CLIP score is not measured.
        progress: whether to show progress bars with the time left.

    Raises:
        ImportError: a package of the extra `eval`, which the full analysis needs, is not installed.
        OSError: the pipeline cannot be read, or the result cannot be written.
        ValueError: `out` holds an analysis of another model or other settings, the pipeline is quantized already, the
            method is unknown, there are no captions, or "calibrated" has a single call.
    """
    chosen = _method(method, captions, settings)
    state = process_state(timeout=_TIMEOUT)
    progress = progress and state.is_local_main_process
    pipeline = load_pipeline(source, settings.sampling.scheduler, torch.float32)
    denoiser(pipeline).requires_grad_(False)
    scorer = _load_clip(source, clip) if method == "full" else None
    study = Study(pipeline, captions, settings, scorer, Reference.empty())
    undecided_bits(study.model)  # It refuses a quantized model, before time is spent on it.

    folder = Path(out)
    if progress and not (folder.is_dir() and any(folder.iterdir())):
        seconds = estimate_seconds(study, method, len(BITS), state.num_processes)
        told = "a few seconds" if seconds < _FEW_SECONDS else f"about {as_duration(seconds)}"
        tqdm.write(f"This analysis takes {told}.", file=sys.stderr)
    if state.is_main_process:
        open_journal(folder, _header(study, method, progress))
        if chosen.needs_sampling and not (folder / _REFERENCE).is_file():
            calls = settings.qat_steps if method == "full" else settings.calls
            record(pipeline, study.model, captions, settings.sampling, calls, progress).save(folder / _REFERENCE)
    state.wait_for_everyone()
    header = read_manifest(folder)
    if chosen.needs_sampling:
        study.reference = Reference.load(folder / _REFERENCE, study.model.device)
    done = read_records(folder, header)
    state.wait_for_everyone()  # No process adds lines before every process has read them.
    _measure_share(study, chosen, folder, header, done.keys(), state, progress)
    state.wait_for_everyone()
    if state.is_main_process:
        finish(folder, header)
    state.wait_for_everyone()
    return Analysis.load(folder)


def _method(name: str, captions: Sequence[str], settings: Settings) -> Method:
    """Return the method of a name, and refuse before hours of work what cannot be measured."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}.")
    if METHODS[name].needs_sampling and not captions:
        raise ValueError(f"The method {name!r} generates images, but there are no prompts.")
    if name == "full":
        require_image_metrics(settings.lpips)
    return METHODS[name]


def _load_clip(source: str | os.PathLike[str], clip: str | os.PathLike[str] | None) -> Clip | None:
    beside = Path(source) / "clip"
    if clip is None and not beside.is_dir():
        return None
    return Clip.from_pretrained(beside if clip is None else clip)


def _measure_share(
    study: Study,
    method: Method,
    folder: Path,
    header: Header,
    done: Container[Item],
    state: PartialState,
    progress: bool,
) -> None:
    """Measure this process's share of what is not done."""
    left = [item for item in header.items if item not in done]
    share = left[state.process_index :: state.num_processes]
    journal = Journal(folder, header, state.process_index)
    total = len(header.items)
    with tqdm(total=total, initial=total - len(left), desc="layers × bits", disable=not progress) as bar:
        for item, metrics in method.measure(study, share):
            journal.append(item, metrics)
            bar.update(min(state.num_processes, total - bar.n))  # Other processes have done about as much.
    journal.close()


def _header(study: Study, method: str, progress: bool) -> Header:
    """Return the header of an analysis, with the cost of every layer."""
    model = study.model
    layers = analysed_layers(model)
    fixed, weights = undecided_bits(model)
    bar = tqdm(layers.items(), desc="packing layers", disable=not progress)
    described = {"class": type(model).__name__, "fingerprint": hash_of_weights(model)}
    settings = _settings(study, method)
    metrics = METHODS[method].metrics
    if method == "full":
        metrics += ("lpips",) if study.settings.lpips else ()
        metrics += ("clip_drop",) if study.clip is not None else ()
    identity = [method, described, settings, metrics]
    return Header(
        method=method,
        metrics=metrics,
        bits=BITS,
        model=described,
        layers={name: layer_cost(layer.weight) for name, layer in bar},
        fixed_bits=fixed,
        weights=weights,
        settings=settings,
        versions={name: version(name) for name in _PACKAGES},
        run=hash_of_settings(identity)[:12],
    )


def _settings(study: Study, method: str) -> dict[str, Any]:
    """Return what the numbers depend on besides the model, JSON-safe."""
    chosen = METHODS[method]
    settings = {name: value for name, value in asdict(study.settings).items() if name in chosen.settings}
    if chosen.needs_sampling:
        sampling = settings.pop("sampling") | {"scheduler": type(study.pipeline.scheduler).__name__}
        settings |= sampling | {"prompts": list(study.captions)}
    return settings
