"""Sensitivity analysis: how much it hurts to round each layer alone (paper, section 4), and cheaper estimates."""

from __future__ import annotations

import os
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
from ..utils.fingerprints import hash_of_settings, hash_of_weights
from ..utils.processes import process_state
from . import estimates, single_layer
from .journal import Journal, finish, open_journal, read_manifest, read_records
from .layer_cost import layer_cost
from .recording import Reference, record
from .results import Analysis, Header, Item
from .study import Record, Settings, Study, analysed_layers, denoiser, undecided_bits

# Numbers of bits that every layer is measured at; the paper's.
BITS = (1, 2, 3)

_REFERENCE = "reference.pt"
_PACKAGES = ("diffusers_bitsfusion", "torch", "diffusers", "transformers")

# Processes wait for each other's shares, which no time-out of a training step fits.
_PATIENCE = timedelta(days=7)

DEFAULT_SETTINGS = Settings()


@dataclass(frozen=True)
class Method:
    """A way to measure sensitivity.

    Attributes:
        measure: yields a record for each of the given (layer, bits).
        metrics: what a record holds, the one that stands for damage first.
        settings: names of the `Settings` that it depends on.
    """

    measure: Callable[[Study, Iterable[Item]], Iterator[Record]]
    metrics: tuple[str, ...]
    settings: tuple[str, ...]

    @property
    def draws(self) -> bool:
        """Whether it looks at the full-precision model drawing."""
        return "sampling" in self.settings


METHODS = {
    "full": Method(single_layer.measure, ("mse", "psnr", "ssim"), ("qat_steps", "learning_rate", "sampling", "lpips")),
    "calibrated": Method(estimates.measure_calibrated, ("calibrated_error",), ("calls", "sampling")),
    "prediction": Method(estimates.measure_prediction, ("prediction_error",), ("calls", "sampling")),
    "gradient": Method(estimates.measure_gradient, ("gradient_error",), ("calls", "sampling")),
    "output": Method(estimates.measure_output, ("output_error",), ("calls", "sampling")),
    "weight": Method(estimates.measure_weight, ("weight_error",), ()),
}


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

    Killed at any moment, it goes on where it stopped when called again with the same arguments. Under `accelerate
    launch` the processes share the work; `out` must then be a folder that all of them see. The result is the same,
    however many they are.

    Args:
        source: folder or Hub id of a pipeline in full precision.
        out: folder for the result, `analysis.jsonl`, and what is needed to go on.
        captions: what to draw; not needed for "weight".
        method: "full": round the layer, train it, draw and compare, as the paper does. "calibrated": change of the
            predicted noise with the layer calibrated, for models that will be. Estimates for any other, from good to
            cheap: "prediction": change of the predicted noise with the layer rounded; "gradient": the same to second
            order, for all layers at once; "output": change of the layer's own output; "weight": of its weight.
        settings: numbers of pictures, steps and so on.
        clip: folder or Hub id of a CLIP for the full analysis; when left out, the folder `clip/` of the pipeline,
            and without one the CLIP score is not measured.
        progress: whether to show progress bars with the time left.

    Raises:
        ImportError: the full analysis needs a package of the extra `eval`.
        OSError: the pipeline cannot be read, or the result not written.
        ValueError: `out` holds an analysis of another model or other settings, the pipeline is quantized already, an
            unknown method, there are no captions, or "calibrated" has a single call to look at.
    """
    way = _method(method, captions, settings)
    state = process_state(timeout=_PATIENCE)
    progress = progress and state.is_local_main_process
    pipeline = load_pipeline(source, settings.sampling.scheduler, torch.float32)
    denoiser(pipeline).requires_grad_(False)
    scorer = _load_clip(source, clip) if method == "full" else None
    study = Study(pipeline, captions, settings, scorer, Reference.empty())

    folder = Path(out)
    if state.is_main_process:
        open_journal(folder, _header(study, method, progress))
        if way.draws and not (folder / _REFERENCE).is_file():
            calls = settings.qat_steps if method == "full" else settings.calls
            record(pipeline, study.model, captions, settings.sampling, calls, progress).save(folder / _REFERENCE)
    state.wait_for_everyone()
    header = read_manifest(folder)
    if way.draws:
        study.reference = Reference.load(folder / _REFERENCE, study.model.device)
    done = read_records(folder, header)
    state.wait_for_everyone()  # nobody adds to the lines before everyone has read them
    _measure_share(study, way, folder, header, done.keys(), state, progress)
    state.wait_for_everyone()
    if state.is_main_process:
        finish(folder, header)
    state.wait_for_everyone()
    return Analysis.load(folder)


def _method(name: str, captions: Sequence[str], settings: Settings) -> Method:
    """Everything that can be refused before hours of work."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}.")
    if METHODS[name].draws and not captions:
        raise ValueError(f"The method {name!r} draws pictures, but there are no prompts.")
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
    way: Method,
    folder: Path,
    header: Header,
    done: Container[Item],
    state: PartialState,
    progress: bool,
) -> None:
    """Measure what is not done, as far as it falls to this process."""
    left = [item for item in header.items if item not in done]
    share = left[state.process_index :: state.num_processes]
    journal = Journal(folder, header, state.process_index)
    total = len(header.items)
    with tqdm(total=total, initial=total - len(left), desc="layers × bits", disable=not progress) as bar:
        for item, metrics in way.measure(study, share):
            journal.append(item, metrics)
            bar.update(min(state.num_processes, total - bar.n))  # the others are as far as this one
    journal.close()


def _header(study: Study, method: str, progress: bool) -> Header:
    model = study.model
    way = METHODS[method]
    layers = analysed_layers(model)
    fixed, weights = undecided_bits(model)
    bar = tqdm(layers.items(), desc="packing layers", disable=not progress)
    described = {"class": type(model).__name__, "fingerprint": hash_of_weights(model)}
    settings = _settings(study, method)
    metrics = way.metrics
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
    """What the numbers depend on besides the model, JSON-safe."""
    way = METHODS[method]
    settings = {name: value for name, value in asdict(study.settings).items() if name in way.settings}
    if way.draws:
        sampling = settings.pop("sampling") | {"scheduler": type(study.pipeline.scheduler).__name__}
        settings |= sampling | {"prompts": list(study.captions)}
    return settings
