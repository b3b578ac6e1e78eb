"""Targets of fuzzing: each writes sound files once, has one of them mutated, and reads them.

A reader may refuse files by ValueError or OSError; other exceptions are raw. Where files have checksums, accepted
values must be the written ones.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
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
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline, tiny_unet
from torch import Tensor
from transformers import CLIPTextModel

from diffusers_bitsfusion import BitsFusionConfig, Recipe, prepare_qat, quantize_model, size_report
from diffusers_bitsfusion.analysis.allocate import allocate
from diffusers_bitsfusion.analysis.header import Header, LayerCost
from diffusers_bitsfusion.analysis.journal import Journal, open_journal, read_manifest, read_records
from diffusers_bitsfusion.analysis.results import Analysis
from diffusers_bitsfusion.analysis.study import Settings
from diffusers_bitsfusion.calibration.calls import Call
from diffusers_bitsfusion.calibration.folder import CalibrationFolder, TuningFolder
from diffusers_bitsfusion.calibration.layers import quantize_layer
from diffusers_bitsfusion.calibration.moments import InputMoments
from diffusers_bitsfusion.codec.checksums import checksums_metadata
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.config.calibration import Calibration
from diffusers_bitsfusion.evaluation import Sampling
from diffusers_bitsfusion.integrations.folder_commit import PREFIX, repair
from diffusers_bitsfusion.nn.packed import PackedWeight
from diffusers_bitsfusion.reporting.size_prediction import model_from_config, predict_size
from diffusers_bitsfusion.reporting.size_report import SizeReport, read_schema
from diffusers_bitsfusion.reporting.verification import verify_checkpoint
from diffusers_bitsfusion.training.timestep_errors import TimestepErrors
from diffusers_bitsfusion.utils.files import file_checksum
from diffusers_bitsfusion.utils.fingerprints import hash_of_settings
from diffusers_bitsfusion.utils.torch_files import tensors_of

WEIGHTS = "diffusion_pytorch_model.safetensors"

# A UNet of few layers, of which each reader's time is a multiple.
_UNET: dict[str, Any] = {
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
}

# Mutation by suffix of the file.
_MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": mutate_json,
    ".jsonl": mutate_lines,
    ".safetensors": mutate_safetensors,
    ".pt": mutate_archive,
    ".bin": mutate_archive,
    ".pkl": mutate_archive,
}


@dataclass
class Target:
    """Reader that is fuzzed.

    Attributes:
        name: name of the reader.
        folder: folder with sound files.
        read: function that reads a folder.
        files: patterns of the files that are mutated.
        same: function that returns whether the values read are the written ones; None where files have no checksums.
        mutation: mutation of the files; the one of their suffix where None.
        sign: function that makes the checksums of a mutated folder fit, as a hostile writer would.
    """

    name: str
    folder: Path
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    same: Callable[[Any], bool] | None = None
    mutation: Callable[[bytes, random.Random], bytes] | None = None
    sign: Callable[[Path], None] | None = None

    def mutate(self, seed: random.Random, work: Path) -> Path:
        """Return a copy of the folder with one file mutated."""
        copied = work / "mutated"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(self.folder, copied, copy_function=os.link)
        file = seed.choice(sorted(file for pattern in self.files for file in copied.rglob(pattern)))
        mutate = self.mutation or _MUTATIONS[file.suffix]
        content = mutate(file.read_bytes(), seed)
        file.unlink()  # Other files are the sound ones themselves; readers replace files rather than write into them.
        file.write_bytes(content)
        if self.sign is not None:
            self.sign(copied)
        return copied


def equal(one: Any, other: Any) -> bool:
    """Return whether nested values with tensors are the same, bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping)
            and one.keys() == other.keys()
            and all(equal(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def targets(work: Path) -> list[Target]:
    """Write sound files into a folder; return every reader of them."""
    return [*_checkpoints(work), *_small_files(work), *_calibration(work), *_analysis(work), *_training(work)]


def _checkpoints(work: Path) -> list[Target]:
    checkpoints: list[Target] = []
    load = UNet2DConditionModel.from_pretrained
    for kind, bits, compression, shard in (
        ("table", 2, "zstd", "10GB"),
        ("cache", 6, None, "10GB"),  # Its codes take as many bytes as those of 4, 5 and 7 bits.
        ("keep", 4, "zstd", "15KB"),
    ):
        folder = work / f"model-{kind}"
        scales = {"scale_dtype": "bfloat16"} if kind == "keep" else {}
        config = BitsFusionConfig(recipe=bits, time_embedding=kind, compression=compression, **scales)
        attention = {} if kind == "table" else {"mid_block_type": None}
        unet = quantize_model(tiny_unet(**_UNET, **attention), config, progress=False)
        unet.save_pretrained(folder, max_shard_size=shard)
        state = unet.state_dict()

        def same(read: UNet2DConditionModel, state: dict[str, Tensor] = state) -> bool:
            return equal(read.state_dict(), state)

        checkpoints += [
            Target(f"load {kind}", folder, load, ("*.safetensors", "*.index.json"), same),
            Target(f"signed {kind}", folder, load, ("*.safetensors",), _is_finite, sign=_sign_weights),
            Target(
                f"signed config {kind}",
                folder,
                load,
                ("config.json",),
                _is_finite,
                mutate_quantization_config,
                _sign_weights,
            ),
            Target(f"config {kind}", folder, load, ("config.json",), same, mutate_quantization_config),
            Target(f"inspect {kind}", folder, _inspect, ("*.safetensors", "*.json")),
            Target(f"verify {kind}", folder, _verify, ("*.safetensors", "*.json"), _same_files(folder)),
        ]
    return [*checkpoints, *_text_encoder(work), _unfinished(work)]


def _text_encoder(work: Path) -> list[Target]:
    tokenizer, plain, folder = (work / name for name in ("tokenizer", "plain", "text-encoder"))
    tokenizer.mkdir()
    tiny_pipeline(tokenizer).text_encoder.save_pretrained(plain)
    config = BitsFusionConfig(recipe=2, components=["text_encoder"])
    encoder = CLIPTextModel.from_pretrained(plain, quantization_config=config)
    encoder.save_pretrained(folder)
    state = encoder.state_dict()

    def same(read: CLIPTextModel) -> bool:
        return equal(read.state_dict(), state)

    load = CLIPTextModel.from_pretrained
    return [
        Target("load text encoder", folder, load, ("*.safetensors",), same),
        Target("config text encoder", folder, load, ("config.json",), same, mutate_quantization_config),
    ]


def _is_finite(model: UNet2DConditionModel) -> bool:
    """Return whether all values of a packed model are finite, weights decoded."""
    values = [
        *model.state_dict().values(),
        *(layer.weight for layer in model.modules() if isinstance(layer, PackedWeight)),
    ]
    return all(bool(torch.isfinite(value).all()) for value in values if value.is_floating_point())


def _sign_weights(folder: Path) -> None:
    """Write checksums that fit a mutated model, where its files can be read at all."""
    try:
        files = {file: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
        tensors = {name: tensor for content in files.values() for name, tensor in content.items()}
        metadata = checksums_metadata(tensors, read_schema(folder))
    except Exception:  # Readers of other targets are fuzzed; what they cannot read has no checksums.
        return
    for file, content in files.items():
        file.unlink()  # It may be a hard link.
        save_file(content, file, {"format": "pt"} | metadata)


def _unfinished(work: Path) -> Target:
    """Return the reader of the journal of a save that was cut off."""
    folder = work / "unfinished"
    files = folder / f"{PREFIX}abc" / "files"
    shutil.copytree(work / "model-table", files)
    names = sorted(file.name for file in files.iterdir())
    (folder / f"{PREFIX}abc" / "commit.json").write_text(json.dumps({"files": names}))
    return Target("repair", folder, repair, ("commit.json", "config.json"))


def _inspect(folder: Path) -> str:
    report = size_report(folder)
    assert isinstance(report, SizeReport)
    assert all(size >= 0 for size in report.parts.values())
    return str(report).encode().decode()


def _verify(folder: Path) -> Any:
    str(verify_checkpoint(folder)).encode()
    return _tensors(folder), read_schema(folder)


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _same_files(folder: Path) -> Callable[[Any], bool]:
    """Return a function that compares tensors, and what config.json says of them, with those of a folder."""
    tensors, schema = _tensors(folder), read_schema(folder)
    # An embedding's width is compared with the tensors; balance decides nothing once weights are codes.
    return lambda read: equal(read[0], tensors) and replace(read[1], balance=schema.balance) == schema


def _small_files(work: Path) -> list[Target]:
    folder = work / "small"
    folder.mkdir()
    unet = tiny_unet(**_UNET)
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
    calibrated = quantize_layer(layer, moments, 2, rounding=Rounding())
    written = CalibrationFolder(folder, settings, 0)
    written.save_moments(0, 3, {"a": moments})
    written.save_layer("a", calibrated)
    tuning = TuningFolder(folder, 4, None)
    calls = [Call((torch.randn(2, 4), 5), {"states": torch.randn(2, 3)}, torch.randn(2, 4))]
    tuning.save_calls(0, calls)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(3))])
    state = {"step": 2, "spreads": [0.5, None], "values": [torch.zeros(3)], "optimizer": optimizer.state_dict()}
    tuning.save_state(state | {"surplus": 0.5})

    def read(path: Path) -> list[Any]:
        opened, again = CalibrationFolder(path, settings, 0), InputMoments(layer, 16)
        batches = opened.load_moments(0, {"a": again}, 3)
        tuning = TuningFolder(path, 4, None)
        parts = [call.parts for call in tuning.load_calls(0) or []]
        return [batches, again.state_dict(), vars(opened.load_layer("a", layer, 2)), parts, tuning.load_state()]

    # Archives have checksums; where they are made to match, values within the limits are sound ones.
    target = _same_as_now("calibration, bytes", folder, read, ("*.pt",))
    target.mutation = mutate_bytes
    return [target, Target("calibration", folder, read, ("*.json", "*.pt"))]


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
        analysis.sensitivity(analysis.header.bits[0])
        allocate(analysis, 2.5)

    return [
        Target("running analysis", folder, read_running, ("*.json", "*.jsonl")),
        Target("analysis", work / "finished", read_finished, ("*.jsonl",)),
    ]


def _training(work: Path) -> list[Target]:
    from accelerate import Accelerator

    from diffusers_bitsfusion.training.checkpoints import load_checkpoint, load_weights, save_checkpoint
    from diffusers_bitsfusion.training.loop import _LossLog

    accelerator = Accelerator(cpu=True)
    student = prepare_qat(tiny_unet(**_UNET, mid_block_type=None), BitsFusionConfig(recipe=2))
    optimizer = torch.optim.Adam(student.parameters())
    model, optimizer = accelerator.prepare(student, optimizer)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    settings = {"model": "m", "seed": 1}
    state = {"lr_scheduler": {"last_epoch": 1}, "ema": None}
    checkpoint = save_checkpoint(accelerator, work / "training", 2, state, settings)
    (checkpoint / "losses.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n')
    expected = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    def read(path: Path) -> list[Any]:
        _LossLog(path / "losses.jsonl", 2)
        loaded = load_checkpoint(accelerator, path, settings)
        load_weights(model, path, "m")
        states = [state for state in optimizer.state_dict()["state"].values()]
        return [loaded, {name: tensor.clone() for name, tensor in student.state_dict().items()}, states]

    files = ("*.json", "*.jsonl", "*.pt", "*.bin", "*.pkl", "*.safetensors")
    target = _same_as_now("training", checkpoint, read, files)
    assert equal(read(work / "training" / "checkpoint-2")[1], expected)

    def is_finite(content: list[Any]) -> bool:
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(content))

    return [target, Target("signed training", checkpoint, read, files, is_finite, sign=_sign_training)]


def _sign_training(checkpoint: Path) -> None:
    """Write checksums that fit a mutated checkpoint, where its run.json can be read at all."""
    file = checkpoint / "run.json"
    try:
        run = json.loads(file.read_text())
        run["files"] = {name: file_checksum(checkpoint / name) for name in run["files"]}
        del run["checksum"]
        text = json.dumps(run | {"checksum": hash_of_settings(run)})
    except Exception:
        return
    file.unlink()
    file.write_text(text)


def _same_as_now(name: str, folder: Path, read: Callable[[Path], Any], files: tuple[str, ...]) -> Target:
    now = read(folder)
    return Target(name, folder, read, files, lambda content: equal(content, now))


def read_settings(seed: random.Random) -> None:
    """Make a config from arguments of which one or two are odd."""
    kinds = {
        BitsFusionConfig: BitsFusionConfig().to_dict(),
        Calibration: Calibration().to_dict(),
        Sampling: asdict(Sampling()),
        Settings: asdict(Settings()),
        Recipe: {"layers": {}, "source": None, "shapes": None},
        Rounding: asdict(Rounding()),
    }
    kind = seed.choice(list(kinds))
    names = [name for name in kinds[kind] if name != "quant_method"]
    values = [value for value in ODD_VALUES if not isinstance(value, str) or len(value) < 100]
    needed = {"layers": {}} if kind is Recipe else {}
    odd = {name: seed.choice(values) for name in seed.sample(names, seed.randint(1, 2))}
    config = kind(**(needed | odd))
    if isinstance(config, BitsFusionConfig):
        config.to_dict()
