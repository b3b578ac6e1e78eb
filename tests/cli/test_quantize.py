"""`bitsfusion quantize`, `draw` and `inspect`: what they take, refuse before any work, and say."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from single_file import write_single_file
from typer.testing import CliRunner, Result

from diffusers_bitsfusion import BitsFusionConfig, size_report
from diffusers_bitsfusion.cli import app
from diffusers_bitsfusion.integrations import finish
from diffusers_bitsfusion.nn import PackedWeight

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def quantize(*arguments: object) -> str:
    """What the command prints on standard output."""
    result = run("quantize", *arguments, "--target-bits", 2.6)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: object) -> str:
    """The one line that a failing command writes."""
    result = run(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    (line,) = [line for line in result.stderr.splitlines() if line]
    return line


def packed_names(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, PackedWeight)}


def test_the_end_says_what_was_saved_how_large_and_how_to_draw(source_folder, tmp_path):
    out = tmp_path / "packed"
    printed = quantize(source_folder, out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert f"Saved StableDiffusionPipeline in {out} ({size / 1e6:.1f} MB in all)." in printed
    lines = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    names: dict[str, object] = {}
    exec("\n".join(lines[:2]), names)
    assert isinstance(names["pipe"], StableDiffusionPipeline) and names["pipe"].unet.is_quantized
    assert re.fullmatch(r'pipe\(".+"\)\.images\[0\]\.save\("image\.png"\)', lines[2])


def test_quiet_prints_results_only_and_json_prints_nothing_else(source_folder, tmp_path):
    assert "Saved" not in quantize(source_folder, tmp_path / "quiet", "--quiet")
    figures = json.loads(quantize(source_folder, tmp_path / "json", "--json"))
    assert figures == json.loads(json.dumps(size_report(tmp_path / "json").to_dict()))
    quantize(source_folder, tmp_path / "file", "--json", tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text()).keys() == figures.keys()
    assert run("quantize", source_folder, tmp_path / "no", "--quiet", "--verbose").exit_code == 2


def test_verbose_shows_where_an_error_arose(tmp_path):
    (tmp_path / "empty").mkdir()
    result = run("inspect", tmp_path / "empty", "--verbose")
    assert result.exit_code == 1 and "Traceback" in result.stderr and "holds neither" in result.stderr


def test_parts_can_be_left_alone_and_text_encoders_packed(source_folder, tmp_path):
    asked = ("--not-convert", "attn2", "--not-convert", "conv_in", "--in-out-bits", 6, "--text-encoder-bits", 4)
    quantize(source_folder, tmp_path / "out", *asked)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    names = packed_names(pipe.unet)
    assert "conv_in" not in names and not [name for name in names if "attn2" in name] and "conv_out" in names
    assert pipe.unet.conv_out.bits == 6
    assert {layer.bits for layer in pipe.text_encoder.modules() if isinstance(layer, PackedWeight)} == {4}
    assert not packed_names(pipe.vae)


def test_components(source_folder, tmp_path):
    quantize(source_folder, tmp_path / "out", "--components", "text_encoder", "--recipe", 4)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert packed_names(pipe.text_encoder) and not packed_names(pipe.unet)
    line = fails("quantize", source_folder, tmp_path / "no", "--components", "text_encoder", "--text-encoder-bits", 4)
    assert "not both" in line
    line = fails("quantize", source_folder / "unet", tmp_path / "no", "--text-encoder-bits", 4)
    assert "has no text encoder" in line and not (tmp_path / "no").exists()


@pytest.mark.parametrize("option", [(), ("--variant", "fp16")])
def test_a_folder_of_fp16_files(source_folder, tmp_path, option):
    half = StableDiffusionPipeline.from_pretrained(source_folder, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    quantize(tmp_path / "half", tmp_path / "out", *option)
    expected = DiffusionPipeline.from_pretrained(
        source_folder, quantization_config=BitsFusionConfig(target_bits=2.6), dtype=torch.float16
    )
    found = DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float16)
    for name, tensor in expected.unet.state_dict().items():
        assert torch.equal(found.unet.state_dict()[name], tensor), name


def test_a_variant_that_is_not_there_is_named(source_folder, tmp_path):
    assert "fp8" in fails("quantize", source_folder, tmp_path / "out", "--variant", "fp8")


def test_a_single_file(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    write_single_file(tmp_path / "pipeline", tmp_path / "tokenizer", tmp_path / "model.safetensors")
    quantize(tmp_path / "model.safetensors", tmp_path / "out", "--config", tmp_path / "pipeline")
    quantize(tmp_path / "pipeline", tmp_path / "expected")
    found, expected = ((tmp_path / name / "unet") for name in ("out", "expected"))
    weights = "diffusion_pytorch_model.safetensors"
    assert (found / weights).read_bytes() == (expected / weights).read_bytes()
    line = fails("quantize", tmp_path / "pipeline", tmp_path / "no", "--config", tmp_path / "pipeline")
    assert "--config is for a single file" in line


@pytest.mark.parametrize("name", ["same", "./same/.", "linked"])
def test_the_source_is_never_the_destination(source_folder, tmp_path, monkeypatch, name):
    shutil.copytree(source_folder, tmp_path / "same")
    (tmp_path / "linked").symlink_to(tmp_path / "same")
    monkeypatch.chdir(tmp_path)
    before = {file: file.read_bytes() for file in Path("same").rglob("*") if file.is_file()}
    assert "SRC and DST are one folder" in fails("quantize", "same", name, "--overwrite")
    assert {file: file.read_bytes() for file in Path("same").rglob("*") if file.is_file()} == before


def test_what_is_there_is_replaced_only_when_asked(source_folder, tmp_path):
    quantize(source_folder, tmp_path / "out")
    before = (tmp_path / "out" / "unet" / "config.json").read_bytes()
    line = fails("quantize", source_folder, tmp_path / "out", "--recipe", 4)
    assert "is there already" in line and "--overwrite" in line
    assert (tmp_path / "out" / "unet" / "config.json").read_bytes() == before
    quantize(source_folder, tmp_path / "out", "--recipe", 4, "--overwrite")
    assert (tmp_path / "out" / "unet" / "config.json").read_bytes() != before
    (tmp_path / "empty").mkdir()
    quantize(source_folder, tmp_path / "empty")


def test_a_file_in_place_of_the_folder_is_found_before_calibrating(source_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    line = fails("quantize", source_folder, tmp_path / "file", "--calibrate", "--samples", 1, "--steps", 1)
    assert "is a file: choose another DST" in line and (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "file.calibration").exists()


@pytest.mark.parametrize("command", ["quantize", "inspect", "evaluate", "draw", "compare", "analyze"])
def test_a_name_that_is_nothing_is_named_in_one_line(command, tmp_path):
    rest = {
        "quantize": (tmp_path / "out",),
        "draw": ("a circle", "--out", tmp_path / "x.png"),
        "compare": ("--prompt", "a", "--out", tmp_path / "x.png"),
        "analyze": ("--out", tmp_path / "out", "--method", "weight"),
    }
    assert "There is no folder nope" in fails(command, "nope", *rest.get(command, ()))


def test_no_warning_that_a_cpu_cannot_compute_in_float16(source_folder, tmp_path, caplog):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        asked = ("--calibrate", "--samples", 1, "--steps", 1, "--dtype", "float16", "--device", "cpu")
        quantize(source_folder, tmp_path / "out", *asked)
    finally:
        logger.removeHandler(handler)
    assert not [message for message in messages if "cannot run" in message]


def test_the_warning_of_noise_comes_only_where_it_is_true(source_folder, tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(finish, "_warn_once", lambda: warned.append(True))

    def warns(*arguments: object) -> bool:
        warned.clear()
        quantize(source_folder, tmp_path / "out", "--overwrite", *arguments)
        return bool(warned)

    assert warns("--recipe", 2)
    assert not warns("--recipe", 3) and not warns("--recipe", 6)
    assert not warns("--recipe", 2, "--components", "vae")
    assert not warns("--recipe", 2, "--calibrate", "--samples", 1, "--steps", 1)
    assert not warns("--recipe", 2, "--quiet")


def test_draw(source_folder, packed_folders, tmp_path):
    out = tmp_path / "new" / "x.png"
    asked = ("--steps", 2, "--seed", 5, "--guidance-scale", 2)
    result = run("draw", packed_folders["keep"], "a red circle", "--out", out, *asked)
    assert result.exit_code == 0, result.output
    pipe = StableDiffusionPipeline.from_pretrained(packed_folders["keep"])
    generator = torch.Generator().manual_seed(5)
    expected = pipe("a red circle", num_inference_steps=2, guidance_scale=2, generator=generator).images[0]
    assert Image.open(out).tobytes() == expected.tobytes()
    drawn = ("draw", source_folder, "a red circle", "--unet", packed_folders["keep"] / "unet", *asked)
    assert run(*drawn, "--out", tmp_path / "y.png").exit_code == 0
    assert Image.open(tmp_path / "y.png").tobytes() == expected.tobytes()


def test_draw_refuses_before_it_samples(source_folder, packed_folders, tmp_path):
    out = tmp_path / "x.png"
    out.write_bytes(b"mine")
    assert "is there already" in fails("draw", source_folder, "a", "--out", out)
    assert "does not end like an image" in fails("draw", source_folder, "a", "--out", tmp_path / "x.doc")
    assert "give the model by --unet" in fails("draw", source_folder / "unet", "a", "--out", tmp_path / "y.png")
    line = fails("draw", source_folder, "a", "--unet", source_folder / "vae", "--out", tmp_path / "y.png")
    assert "is of AutoencoderKL, the pipeline's own unet of UNet2DConditionModel" in line
    assert out.read_bytes() == b"mine"


def test_compare_checks_every_path_before_it_samples(source_folder, packed_folders, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_bitsfusion.evaluation.generate_images", lambda *a, **k: pytest.fail("drawn"))
    (tmp_path / "empty").mkdir()
    out = ("--prompt", "a", "--out", tmp_path / "x.png")
    assert "holds no pipeline" in fails("compare", source_folder, packed_folders["keep"], tmp_path / "empty", *out)


def test_compare_samples_plain_prompts_with_pipelines_and_bare_unets(source_folder, packed_folders, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    paths = (source_folder, packed_folders["keep"] / "unet")
    asked = ("--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "x.png", "--steps", 1, "--json")
    result = run("compare", *paths, *asked)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["prompts"] == ["a red circle", "a blue square"]
    assert "16 bits" in said["columns"][0] and re.search(r"2\.\d\d bits, 0\.\d+ MB", said["columns"][1])


def test_inspect_predicts_for_a_pipeline_and_refuses_what_it_would_ignore(source_folder, packed_folders, tmp_path):
    asked = ("--plan", "--target-bits", 2.6, "--json")
    whole, part = (run("inspect", path, *asked) for path in (source_folder, source_folder / "unet" / "config.json"))
    assert whole.exit_code == 0 and json.loads(whole.stdout) == json.loads(part.stdout)
    ignored = run("inspect", packed_folders["keep"], "--target-bits", 3)
    assert ignored.exit_code == 2 and "only with --plan" in ignored.output
