"""What is fuzzed: each target writes sound files once, has one of them mutated, and reads them.

A reader may refuse what it is given (ValueError, OSError). Whatever else it raises is raw. What it accepts must be
what was written, where files carry checksums.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from mutations import (
    ODD_VALUES,
    mutate_archive,
    mutate_bytes,
    mutate_json,
    mutate_lines,
    mutate_quantization_config,
    mutate_safetensors,
)
from tiny import tiny_pipeline, tiny_unet
from torch import Tensor
from transformers import CLIPTextModel

from diffusers_bitsfusion import BitsFusionConfig, Recipe, prepare_qat, quantize_model, size_report
from diffusers_bitsfusion.analysis.allocate import allocate
from diffusers_bitsfusion.analysis.journal import Journal, open_journal, read_manifest, read_records
from diffusers_bitsfusion.analysis.results import Analysis, Header, LayerCost
from diffusers_bitsfusion.calibration.calls import Call
from diffusers_bitsfusion.calibration.folder import CalibrationFolder, TuningFolder
from diffusers_bitsfusion.calibration.layers import quantize_layer
from diffusers_bitsfusion.calibration.moments import InputMoments
from diffusers_bitsfusion.config.calibration import Calibration
from diffusers_bitsfusion.reporting.size_prediction import model_from_config, predict_size
from diffusers_bitsfusion.reporting.verification import verify_checkpoint
from diffusers_bitsfusion.training.timestep_errors import TimestepErrors

WEIGHTS = "diffusion_pytorch_model.safetensors"

_MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": mutate_json,
    ".jsonl": mutate_lines,
    ".safetensors": mutate_safetensors,
    ".pt": mutate_archive,
}


@dataclass
class Target:
    """A reader.

    Attributes:
        name: of it.
        folder: with sound files.
        read: reads the folder.
        files: patterns of the files that are mutated.
        same: whether what was read is what was written; None where nothing can tell.
        mutation: of the files; that of their kind where None.
    """

    name: str
    folder: Path
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    same: Callable[[Any], bool] | None = None
    mutation: Callable[[bytes, random.Random], bytes] | None = None

    def mutate(self, seed: random.Random, work: Path) -> Path:
        """Return a copy of the folder with one file mutated."""
        copied = work / "mutated"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(self.folder, copied)
        file = seed.choice(sorted(file for pattern in self.files for file in copied.rglob(pattern)))
        mutate = self.mutation or _MUTATIONS[file.suffix]
        file.write_bytes(mutate(file.read_bytes(), seed))
        return copied


def equal(one: Any, other: Any) -> bool:
    """Whether nested values with tensors are the same, bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def targets(work: Path) -> list[Target]:
    """Write sound files into a folder; every reader of them."""
    return [*_checkpoints(work), *_small_files(work), *_calibration(work), *_analysis(work), *_training(work)]


def _checkpoints(work: Path) -> list[Target]:
    found, load = [], UNet2DConditionModel.from_pretrained
    for kind, compression, shard in (("table", "zstd", "10GB"), ("cache", None, "10GB"), ("keep", "zstd", "60KB")):
        folder = work / f"model-{kind}"
        config = BitsFusionConfig(recipe=2, time_embedding=kind, compression=compression)
        unet = quantize_model(tiny_unet(), config, progress=False)
        unet.save_pretrained(folder, max_shard_size=shard)
        state = unet.state_dict()

        def same(read: UNet2DConditionModel, state: dict[str, Tensor] = state) -> bool:
            return equal(read.state_dict(), state)

        found += [
            Target(f"load {kind}", folder, load, ("*.safetensors",), same),
            Target(f"config {kind}", folder, load, ("config.json",), same, mutate_quantization_config),
            Target(f"inspect {kind}", folder, _inspect, ("*.safetensors", "*.json")),
            Target(f"verify {kind}", folder, _verify, ("*.safetensors", "*.json"), None),
        ]
    return [*found, _text_encoder(work)]


def _text_encoder(work: Path) -> Target:
    tokenizer, plain, folder = (work / name for name in ("tokenizer", "plain", "text-encoder"))
    tokenizer.mkdir()
    tiny_pipeline(tokenizer).text_encoder.save_pretrained(plain)
    config = BitsFusionConfig(recipe=2, components=["text_encoder"])
    encoder = CLIPTextModel.from_pretrained(plain, quantization_config=config)
    encoder.save_pretrained(folder)
    state = encoder.state_dict()

    def same(read: CLIPTextModel) -> bool:
        return equal(read.state_dict(), state)

    return Target("load text encoder", folder, CLIPTextModel.from_pretrained, ("*.safetensors",), same)


def _inspect(folder: Path) -> str:
    report = size_report(folder)
    assert all(size >= 0 for size in report.parts.values())
    return str(report).encode().decode()


def _verify(folder: Path) -> None:
    str(verify_checkpoint(folder)).encode()


def _small_files(work: Path) -> list[Target]:
    folder = work / "small"
    folder.mkdir()
    unet = tiny_unet()
    Recipe({"conv_in": 8, "mid": 2}, source="somewhere", shapes={"mid": (3, 4)}).save(folder / "recipe.json")
    unet.save_config(folder / "plan")
    TimestepErrors([25.0, 75.0], [0.5, 0.25]).save(folder / "errors.json")
    return [
        Target("recipe", folder, lambda path: repr(Recipe.load(path / "recipe.json")).encode(), ("recipe.json",)),
        Target(
            "plan",
            folder,
            lambda path: str(predict_size(model_from_config(path / "plan"), BitsFusionConfig(recipe=2))),
            ("plan/config.json",),
        ),
        Target(
            "timestep errors",
            folder,
            lambda path: TimestepErrors.load(path / "errors.json").distribution(100),
            ("errors.json",),
        ),
    ]


def _calibration(work: Path) -> list[Target]:
    folder, settings = work / "calibration", {"seed": 1, "lambda": float("-inf")}
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 8)
    moments = InputMoments(layer, 16)
    moments.add(torch.randn(50, 24))
    calibrated = quantize_layer(layer, moments, 2, **_rounding())
    kept = CalibrationFolder(folder, settings, 0)
    kept.save_moments(0, 3, {"a": moments})
    kept.save_layer("a", calibrated)
    tuning = TuningFolder(folder, 4, None)
    calls = [Call((torch.randn(2, 4), 5), {"states": torch.randn(2, 3)}, torch.randn(2, 4))]
    tuning.save_calls(0, calls)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(3))])
    state = {"step": 2, "spreads": [0.5, None], "values": [torch.zeros(3)], "optimizer": optimizer.state_dict()}
    tuning.save_state(state | {"surplus": 0.5})

    def read(path: Path) -> list[Any]:
        opened, again = CalibrationFolder(path, settings, 0), InputMoments(layer, 16)
        batches = opened.load_moments(0, {"a": again}, 3)
        known = TuningFolder(path, 4, None)
        parts = [call.parts for call in known.load_calls(0) or []]
        return [batches, again.state_dict(), vars(opened.load_layer("a", layer, 2)), parts, known.load_state()]

    # A value that is changed together with its checksum is another sound one, as long as it can be.
    known = _same_as_now("calibration, bytes", folder, read, ("*.pt",))
    known.mutation = mutate_bytes
    return [known, Target("calibration", folder, read, ("*.json", "*.pt"))]


def _rounding() -> dict[str, Any]:
    import inspect

    from diffusers_bitsfusion.codec import rounding

    if "rounding" in inspect.signature(quantize_layer).parameters:
        return {"rounding": rounding.Rounding()}
    return {"scale_init": "alternating", "iterations": 10, "balance": True}


def _analysis(work: Path) -> list[Target]:
    folder = work / "analysis"
    costs = {name: LayerCost((40, 10), tuple(range(10, 17)), tuple(1.0 / n for n in range(1, 8))) for name in "abc"}
    header = Header(
        method="full",
        metrics=("mse",),
        bits=(1, 2, 3),
        model={"class": "UNet2DConditionModel", "fingerprint": "0" * 64},
        layers=costs,
        fixed_bits=0.0,
        weights=1200,
        settings={"seed": 1},
        versions={"torch": torch.__version__},
        run="r",
    )
    open_journal(folder, header)
    journal = Journal(folder, header, 0)
    records = {item: {"mse": 1.0 / (number + 1)} for number, item in enumerate(header.items)}
    for item, metrics in records.items():
        journal.append(item, metrics)
    journal.close()
    (work / "finished").mkdir()
    (work / "finished" / "analysis.jsonl").write_text(Analysis(header, records).to_text())

    def read_running(path: Path) -> None:
        read_records(path, read_manifest(path))

    def read_finished(path: Path) -> None:
        analysis = Analysis.load(path)
        analysis.damage(analysis.header.bits[0])
        allocate(analysis, 2.5)

    return [
        Target("analysis under way", folder, read_running, ("*.json", "*.jsonl")),
        Target("analysis", work / "finished", read_finished, ("*.jsonl",)),
    ]


def _training(work: Path) -> list[Target]:
    from accelerate import Accelerator

    from diffusers_bitsfusion.training.checkpoints import load_checkpoint, load_weights, save_checkpoint
    from diffusers_bitsfusion.training.loop import _LossLog

    accelerator = Accelerator(cpu=True)
    student = prepare_qat(tiny_unet(), BitsFusionConfig(recipe=2))
    model = accelerator.prepare(student)
    settings = {"model": "m", "seed": 1}
    state = {"lr_scheduler": {"last_epoch": 1}, "ema": None}
    checkpoint = save_checkpoint(accelerator, work / "training", 2, state, settings)
    (checkpoint / "losses.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n')
    expected = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    def read(path: Path) -> list[Any]:
        _LossLog(path / "losses.jsonl", 2)
        found = load_checkpoint(accelerator, path, settings)
        load_weights(model, path, "m")
        return [found, {name: tensor.clone() for name, tensor in student.state_dict().items()}]

    target = _same_as_now("training", checkpoint, read, ("*.json", "*.jsonl", "*.pt", "*.safetensors"))
    assert equal(read(work / "training" / "checkpoint-2")[1], expected)
    return [target]


def _same_as_now(name: str, folder: Path, read: Callable[[Path], Any], files: tuple[str, ...]) -> Target:
    now = read(folder)
    return Target(name, folder, read, files, lambda found: equal(found, now))


def read_settings(seed: random.Random) -> None:
    """Make a config from arguments of which one or two are odd."""
    kinds = {
        BitsFusionConfig: BitsFusionConfig().to_dict(),
        Calibration: Calibration().to_dict(),
    }
    kind = seed.choice(list(kinds))
    names = [name for name in kinds[kind] if name != "quant_method"]
    values = [value for value in ODD_VALUES if not isinstance(value, str) or len(value) < 100]
    config = kind(**{name: seed.choice(values) for name in seed.sample(names, seed.randint(1, 2))})
    if isinstance(config, BitsFusionConfig):
        config.to_dict()
