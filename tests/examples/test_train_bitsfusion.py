"""The training script as a user runs it: every data source, both stages, what it saves and refuses."""

import json
import re
import shutil
import sys
from functools import partial

import datasets
import numpy as np
import pytest
import torch
import train_bitsfusion
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_unet
from train_runs import CAPTIONS, losses

from diffusers_bitsfusion import BitsFusionConfig, Calibration, convert, prepare_qat, quantize_model
from diffusers_bitsfusion.training.checkpoints import fingerprint, load_weights
from diffusers_bitsfusion.training.run import models as train_models
from diffusers_bitsfusion.training.run import stages

pytestmark = pytest.mark.usefixtures("one_thread")


def test_both_stages_end_in_a_packed_pipeline(command, data, tmp_path, capsys):
    prompts = tmp_path / "prompts.tsv"
    prompts.write_text('Prompt\tCategory\tSpec\na b\tx\t{"bright": true}\nc\ty\t{"bright": false}\n')
    train_bitsfusion.main(
        command(
            *("--train_data_dir", data, "--use_ema", "--gradient_checkpointing", "--report_to", "tensorboard"),
            *("--hub_token", "hf_secret"),
            *("--validation_file", prompts, "--validation_scorer", f"{__name__}:is_bright"),
            *("--num_inference_steps", 2, "--validation_steps", 2),
            quiet=False,
        )
    )
    out = tmp_path / "out"
    printed = capsys.readouterr().out
    assert "Stage 1, 2 samples a step: about" in printed and "memory of each process" in printed
    assert "stage2, step 2: compositional score" in printed
    assert set(losses(out / "stage1")[0]) == {"step", "loss", "noise", "feature", "lr", "grad_norm"}
    assert "feature" not in losses(out / "stage2")[0]
    with Image.open(out / "validation" / "stage1-2.png") as images:
        assert images.width > 2 * 192
    assert list((out / "logs").rglob("events.out.tfevents.*"))
    assert tracked_steps(out / "logs", "stage2/loss") == [3, 4]
    assert tracked_steps(out / "logs", "stage2/compositional") == [4]

    pipeline = StableDiffusionPipeline.from_pretrained(out, dtype=torch.float32)
    assert pipeline.unet.is_quantized and pipeline.unet.config.quantization_config.target_bits == 2.6
    card = (out / "README.md").read_text()
    assert "Stage 1: 2 steps of 2 samples. Stage 2: 2 steps of 2 samples." in card and "--use_ema" in card
    assert not [file for file in out.rglob("*") if file.is_file() and b"hf_secret" in file.read_bytes()]
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a b", num_inference_steps=2, output_type="np").images
    assert np.isfinite(image).all()


def tracked_steps(folder, tag):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    runs = {str(file.parent) for file in folder.rglob("events.out.tfevents.*")}  # accelerate's settings are one too
    loaded = [event_accumulator.EventAccumulator(run).Reload() for run in runs]
    return [event.step for run in loaded if tag in run.Tags()["scalars"] for event in run.Scalars(tag)]


def is_bright(images, specs):
    return [(image.mean() > 127) == spec["bright"] for image, spec in zip(images, specs, strict=True)]


_scores = iter(())


def by_turns(images, specs):
    """A scorer whose verdict on all images is the next that a test has given."""
    return [next(_scores)] * len(images)


@pytest.mark.parametrize(("of_stages", "resumed"), [((1.0, 0.5), False), ((0.5, 1.0), False), ((0.5, 1.0), True)])
def test_stage_2_is_kept_only_where_it_does_not_lower_the_score(
    command, data, tmp_path, capsys, monkeypatch, of_stages, resumed
):
    prompts = tmp_path / "prompts.tsv"
    prompts.write_text("Prompt\tCategory\tSpec\na b\tx\t1\n")
    scored = ("--validation_file", prompts, "--validation_scorer", f"{__name__}:by_turns", "--validation_steps", 2)
    arguments = ("--train_data_dir", data, *scored, "--num_inference_steps", 2)
    if resumed:  # A Stage II alone is scored before the end of Stage I is.
        train_bitsfusion.main(command("--train_data_dir", data, "--stage", 1))
        arguments = (*arguments, "--stage", 2)
    monkeypatch.setattr(sys.modules[__name__], "_scores", iter(reversed(of_stages) if resumed else of_stages))
    train_bitsfusion.main(command(*arguments))
    kept = 1 if of_stages[1] < of_stages[0] else 2
    saved = packed_tensors(UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet"))
    for stage in (1, 2):
        student = UNet2DConditionModel.from_pretrained(command()[1], subfolder="unet")
        prepare_qat(student, BitsFusionConfig(target_bits=2.6))
        load_weights(student, tmp_path / "out" / f"stage{stage}" / "checkpoint-2", fingerprint(student))
        end = packed_tensors(convert(student))
        assert all(torch.equal(saved[name], end[name]) for name in saved) == (stage == kept)
    assert ("Stage II lowered the compositional score" in capsys.readouterr().out) == (kept == 1)
    assert ("weights are those of Stage 1" in (tmp_path / "out" / "README.md").read_text()) == (kept == 1)


def packed_tensors(unet):
    return {name: tensor for name, tensor in unet.state_dict().items() if name.endswith((".codes", ".scale"))}


def test_stage_2_does_not_take_over_a_high_rate(command, data, tmp_path):
    train_bitsfusion.main(command("--train_data_dir", data))
    rates = [losses(tmp_path / "out" / f"stage{stage}")[0]["lr"] for stage in (1, 2)]
    assert rates == [1e-3, 1e-5]


def write_image_folder(folder):
    rng = np.random.default_rng(1)
    for i in range(len(CAPTIONS)):
        Image.fromarray(rng.integers(0, 255, (20, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"broken")
    lines = [json.dumps({"file_name": f"{i}.png", "text": caption}) for i, caption in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def test_two_steps_on_an_image_folder_with_a_broken_image(command, tmp_path, caplog):
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_image_folder(folder)
    cache = ("--cache_dir", tmp_path / "cache")
    with caplog.at_level("WARNING"):
        train_bitsfusion.main(command("--train_data_dir", folder, *cache, "--stage", 1, batch=4))
    assert "1 images did not decode and were skipped" in caplog.text
    assert len(losses(tmp_path / "out" / "stage1")) == 2


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps the precision of a process's first run."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize("source", ["prompts in bf16", "dataset"])
def test_two_steps_of_stage_one(source, command, data, tmp_path, fresh_accelerate):
    if source == "prompts in bf16":
        arguments = ("--prompts", data / "prompts.txt", "--drawing_steps", 2, "--mixed_precision", "bf16")
    else:
        pictures = [Image.fromarray(image) for image in np.load(data / "images.npy")]
        saved = tmp_path / "saved"
        dataset = datasets.Dataset.from_dict({"image": pictures, "caption": CAPTIONS})
        dataset.cast_column("image", datasets.Image()).save_to_disk(saved)
        arguments = ("--dataset_name", saved)
    train_bitsfusion.main(command(*arguments, "--stage", 1))
    assert len(losses(tmp_path / "out" / "stage1")) == 2
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "out").unet.is_quantized


def test_stage_one_can_start_from_calibrated_rounding(command, data, source_folder, tmp_path, monkeypatch):
    """With a rate that changes nothing, what comes out is what calibrated quantization gives."""
    brief = partial(Calibration, num_inference_steps=2)
    monkeypatch.setattr(train_models, "Calibration", brief)
    given = ("--train_data_dir", data, "--stage", 1, "--init", "calibrated")
    train_bitsfusion.main(command(*given, "--learning_rate", 1e-12, steps=1))
    order = torch.randperm(len(CAPTIONS), generator=torch.Generator().manual_seed(0))
    calibration = brief([CAPTIONS[index] for index in order], seed=0)
    pipeline = StableDiffusionPipeline.from_pretrained(source_folder)
    quantize_model(pipeline, BitsFusionConfig(target_bits=2.6), progress=False, calibration=calibration)
    expected = {name: value for name, value in pipeline.unet.state_dict().items() if not value.is_floating_point()}
    unet = StableDiffusionPipeline.from_pretrained(tmp_path / "out").unet
    trained = unet.state_dict()
    assert expected and all(torch.equal(trained[name], value) for name, value in expected.items())
    assert unet.config.quantization_config.calibration == calibration.summary()


def test_stage_two_in_a_run_of_its_own_goes_on_from_a_calibrated_start(command, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_models, "Calibration", partial(Calibration, num_inference_steps=2))
    whole, apart = tmp_path / "out", tmp_path / "apart"
    calibrated = ("--train_data_dir", data, "--init", "calibrated")
    train_bitsfusion.main(command(*calibrated, "--stage2_learning_rate", 1e-3))
    stage_one = whole / "stage1" / "checkpoint-2"
    train_bitsfusion.main(command("--train_data_dir", data, "--stage", 2, "--init_from", stage_one, output=apart.name))
    assert losses(apart / "stage2") == losses(whole / "stage2")
    records = [config_of(folder)["calibration"] for folder in (whole, apart)]
    assert records[0] == records[1] and records[0]["prompts"] == f"{len(CAPTIONS)} of the user's"

    again = ("--stage", 1, "--resume_from_checkpoint", stage_one)
    train_bitsfusion.main(command(*calibrated, *again, output="resumed", steps=3))
    assert config_of(tmp_path / "resumed")["calibration"] == records[0]


def config_of(folder):
    return json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]


def test_every_part_can_be_switched_off(command, data, tmp_path):
    plain = ("--no_balance", "--scale_init", "minmax", "--recipe", 2, "--time_embedding", "keep")
    less = ("--feature_weight", 0, "--timestep_sampling", "uniform", "--proportion_empty_prompts", 0)
    train_bitsfusion.main(command("--train_data_dir", data, "--stage", 1, *plain, *less, "--freeze_time_embedding"))
    out = tmp_path / "out"
    assert set(losses(out / "stage1")[0]) == {"step", "loss", "noise", "lr", "grad_norm"}
    config = StableDiffusionPipeline.from_pretrained(out).unet.config.quantization_config
    assert config.balance is False and config.scale_init == "minmax" and config.recipe == 2
    assert config.layers["conv_in"]["bits"] == 8 and config.layers["mid_block.resnets.0.conv1"]["bits"] == 2


def test_with_a_price_of_bits_scales_have_16(command, data, tmp_path):
    train_bitsfusion.main(command("--train_data_dir", data, "--stage", 1, "--rate_weight", 0.1, steps=1))
    (step,) = losses(tmp_path / "out" / "stage1")
    assert step["loss"] > 0.1 * step["bits"] > 0
    tensors = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    layers = config_of(tmp_path / "out")["layers"]
    assert layers and all(tensors[f"{name}.scale"].dtype == torch.int16 for name in layers)


def test_the_control_in_full_precision(command, data, tmp_path):
    train_bitsfusion.main(command("--train_data_dir", data, "--full_precision", "--stage", 2, steps=1))
    unet = StableDiffusionPipeline.from_pretrained(tmp_path / "out").unet
    assert "quantization_config" not in unet.config and type(unet.conv_in) is torch.nn.Conv2d


def test_v_prediction_and_timesteps_by_measured_error(command, data, source_folder, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(source_folder)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    pipeline.save_pretrained(tmp_path / "v")
    sampling = ("--timestep_sampling", "error", "--timestep_error_samples", 16)
    arguments = command("--train_data_dir", data, "--init_from", "rounding", "--stage", 2, *sampling)
    arguments[1] = str(tmp_path / "v")
    train_bitsfusion.main(arguments)
    assert len(losses(tmp_path / "out" / "stage2")) == 2
    curve = json.loads((tmp_path / "out" / "timestep_error.json").read_text())
    assert len(curve["errors"]) == len(curve["timesteps"]) > 3


def test_the_prediction_type_asked_for_is_that_of_the_trained_pipeline(command, data, tmp_path):
    asked = ("--prediction_type", "v_prediction", "--stage", 2, "--init_from", "rounding")
    train_bitsfusion.main(command("--train_data_dir", data, *asked, steps=1))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_continuing_in_stage_two_leaves_stage_one_alone(command, data, tmp_path):
    steps = ("--train_data_dir", data, "--checkpointing_steps", 1)
    train_bitsfusion.main(command(*steps))
    train_bitsfusion.main(command(*steps, output="whole"))
    out = tmp_path / "out"
    with pytest.raises(FileExistsError, match="stage2 holds checkpoints that came from another end of Stage I"):
        train_bitsfusion.main(command(*steps, "--resume_from_checkpoint", out / "stage1" / "checkpoint-1"))
    shutil.rmtree(out / "stage2" / "checkpoint-2")
    before = {file: file.stat().st_mtime_ns for file in (out / "stage1").rglob("*")}
    train_bitsfusion.main(command(*steps, "--resume_from_checkpoint", "checkpoint-1"))  # the last stage's
    assert {file: file.stat().st_mtime_ns for file in (out / "stage1").rglob("*")} == before
    assert losses(out / "stage2") == losses(tmp_path / "whole" / "stage2")


# Dynamo instantiates the functions of autograd that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_accelerates_compiling_leaves_no_trace_in_what_is_saved(
    command, data, tmp_path, monkeypatch, fresh_accelerate
):
    arguments = ("--train_data_dir", data, "--stage", 2, "--init_from", "rounding")
    train_bitsfusion.main(command(*arguments, output="plain", steps=1))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    train_bitsfusion.main(command(*arguments, output="compiled", steps=1))
    found, expected = (losses(tmp_path / name / "stage2") for name in ("compiled", "plain"))
    assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in expected], rel=1e-5)
    checkpoints = (tmp_path / name / "stage2" / "checkpoint-1" for name in ("compiled", "plain"))
    compiled, plain = (load_file(checkpoint / "model.safetensors") for checkpoint in checkpoints)
    assert compiled.keys() == plain.keys()
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "compiled").unet.is_quantized


@pytest.mark.parametrize("arguments", [(), ("--stage", 2, "--init_from", "rounding", "--full_precision")])
def test_what_is_pushed_is_the_pipeline_alone(command, data, tmp_path, monkeypatch, uploads, arguments):
    cards = []
    monkeypatch.setattr(ModelCard, "push_to_hub", lambda self, repo_id, **_: cards.append((repo_id, str(self))))
    hub = ("--push_to_hub", "--hub_model_id", "me/trained", "--hub_token", "hf_secret")
    train_bitsfusion.main(command("--train_data_dir", data, *arguments, *hub, steps=1))
    ((repository, files),) = uploads
    assert repository == "me/trained" and "model_index.json" in files
    assert not [file for file in files if "checkpoint" in file or "stage" in file or "logs" in file]
    if not arguments:
        ((repository, card),) = cards
        assert repository == "me/trained" and "## Training" in card and 'from_pretrained("me/trained"' in card
    assert (tmp_path / "out" / "model_index.json").exists()


def test_a_hub_that_refuses_says_so_before_training(command, data, tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError("401")

    monkeypatch.setattr(stages, "create_repo", refuse)
    with pytest.raises(OSError, match="401"):
        train_bitsfusion.main(command("--train_data_dir", data, "--push_to_hub"))
    assert not (tmp_path / "out" / "stage1").exists()


def test_the_error_curve_alone(command, data, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ("--train_data_dir", data, "--measure_timestep_error", "--timestep_error_samples", 8)
    train_bitsfusion.main(command(*arguments))
    with Image.open(tmp_path / "out" / "timestep_error.png") as plot:
        assert plot.width > 100
    assert not (tmp_path / "out" / "stage1").exists()


def test_stage_two_starts_from_stage_one(command, data, tmp_path):
    stage_two = ("--train_data_dir", data, "--stage", 2)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint to start Stage II from. Run Stage I"):
        train_bitsfusion.main(command(*stage_two))
    train_bitsfusion.main(command("--train_data_dir", data, "--stage2_learning_rate", 1e-3))
    train_bitsfusion.main(
        command(*stage_two, "--init_from", tmp_path / "out" / "stage1" / "checkpoint-2", output="apart")
    )
    assert losses(tmp_path / "apart" / "stage2") == losses(tmp_path / "out" / "stage2")
    with pytest.raises(FileExistsError, match="stage1 holds checkpoints of an earlier run"):
        train_bitsfusion.main(command("--train_data_dir", data))
    checkpoint = tmp_path / "out" / "stage2" / "checkpoint-2"
    with pytest.raises(ValueError, match="its stage is 2, this run's is 1"):
        arguments = ("--stage", 1, "--resume_from_checkpoint", checkpoint)
        train_bitsfusion.main(command("--train_data_dir", data, *arguments, output="other"))


def test_only_an_estimate_of_calibration_steps_and_validation(command, data, tmp_path, capsys):
    validation = ("--validation_prompts", "a", "b", "--validation_steps", 2, "--num_inference_steps", 2)
    train_bitsfusion.main(
        command("--train_data_dir", data, "--init", "calibrated", *validation, "--estimate_only", steps=5)
    )
    printed = capsys.readouterr().out
    order = ("Calibration takes about", "Stage 1, 2 samples", "Stage 2, 2 samples", "In all about")
    assert sorted(order, key=printed.index) == list(order)
    # Of each stage the teacher's images, and the student's after 2, 4 and 5 steps.
    assert printed.count("memory of each process") == 2 == printed.count("4 samplings of validation images")
    assert not (tmp_path / "out" / "unet").exists() and not (tmp_path / "out" / "stage1" / "losses.jsonl").exists()


def test_quiet_training_prints_its_results_alone(command, data, capsys):
    arguments = command("--train_data_dir", data, "--stage", 1, "--quiet")
    train_bitsfusion.main(arguments)
    told = capsys.readouterr()
    assert "packed weights" in told.out and "about" not in told.out and "stage1" not in told.err
    with pytest.raises(SystemExit):
        train_bitsfusion.main([*arguments, "--verbose"])
    assert "--quiet and --verbose exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Need either a dataset name, a training folder or a file of prompts"),
        (("--prompts", "p.txt"), "Stage II learns from images"),
        (("--train_data_dir", "d", "--validation_scorer", "a:b"), "--validation_scorer needs --validation_file"),
        (("--train_data_dir", "d", "--train_batch_size", 0), "--train_batch_size must be at least 1"),
        (("--train_data_dir", "d", "--proportion_empty_prompts", 2), r"must be in the range \[0, 1\]"),
        (("--train_data_dir", "d", "--init_from", "rounding"), "--init_from says where Stage II starts"),
        (
            ("--prompts", "p", "--stage", 1, "--full_precision", "--init", "calibrated"),
            "--init says how Stage I starts",
        ),
        (("--train_data_dir", "d", "--stage", 2, "--init", "calibrated"), "--init says how Stage I starts"),
        (("--train_data_dir", "d", "--shard", "--use_8bit_adam"), "--shard and --use_8bit_adam do not go together"),
        (("--prompts", "p.txt", "--stage", 1, "--redraw_every", 0), "--redraw_every must be at least 1"),
        (("--train_data_dir", "d", "--resolution", -8), "--resolution must be at least 1"),
        (("--train_data_dir", "d", "--max_train_samples", -1), "--max_train_samples must be at least 1"),
        (("--train_data_dir", "d", "--checkpoints_total_limit", -1), "--checkpoints_total_limit must be at least 1"),
        (("--train_data_dir", "d", "--learning_rate", -1), "--learning_rate must be at least 0"),
        (
            ("--train_data_dir", "d", "--stage2_gradient_accumulation_steps", 0),
            "--stage2_gradient_accumulation_steps must be at least 1",
        ),
        (
            ("--train_data_dir", "d", "--full_precision", "--timestep_sampling", "error"),
            "there is no error of quantization to measure",
        ),
    ],
)
def test_wrong_combinations_of_arguments(arguments, message, command, capsys):
    with pytest.raises(SystemExit):
        train_bitsfusion.main(command(*arguments))
    assert re.search(message, capsys.readouterr().err)


def test_pipelines_of_another_kind(command, data, tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(8, block_out_channels=(8,), norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "other")
    arguments = command("--train_data_dir", data)
    arguments[1] = str(tmp_path / "other")
    with pytest.raises(ValueError, match="DDPMPipeline is not a Stable Diffusion pipeline"):
        train_bitsfusion.main(arguments)


def test_a_unet_with_more_inputs_than_latents(command, data, source_folder, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(source_folder, unet=tiny_unet(in_channels=9))
    pipeline.save_pretrained(tmp_path / "inpainting")
    arguments = command("--train_data_dir", data)
    arguments[1] = str(tmp_path / "inpainting")
    with pytest.raises(ValueError, match="takes 9 channels where the VAE has 4: inpainting"):
        train_bitsfusion.main(arguments)
