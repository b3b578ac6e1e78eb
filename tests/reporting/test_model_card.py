"""The model card: where its licence and base model come from, and what is added to it. Pushed ones: test_hub.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from tiny import tiny_unet

from diffusers_bitsfusion import BitsFusionConfig, Calibration, convert, prepare_qat, quantize_model
from diffusers_bitsfusion.reporting.model_card import add_section, origin

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe(packed_folders) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(packed_folders["keep"])


@pytest.fixture
def save(pipe, tmp_path):
    """Saves the pipeline as if it had come from `source`, and reads its card."""

    def save(source: str | Path, what: str = "pipeline") -> ModelCard:
        saved = pipe if what == "pipeline" else pipe.unet
        saved.register_to_config(_name_or_path=str(source))
        saved.save_pretrained(tmp_path / "out")
        return ModelCard.load(tmp_path / "out" / "README.md")

    return save


@pytest.mark.parametrize("what", ["pipeline", "model"])
def test_the_licence_is_that_of_the_folder_it_was_made_from(save, tmp_path, what):
    base = tmp_path / "base"
    (base / "unet").mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: sdxl-turbo\nlicense_link: LICENSE.md\n---\n")
    card = save(base if what == "pipeline" else base / "unet", what)
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "sdxl-turbo", "LICENSE.md")
    assert card.data.base_model is None  # a folder says nothing to others


BROKEN = {
    "a colon": b"---\nHello: this is: my model\n---\n",
    "a list": b"---\n- one\n- two\n---\n",
    "a text": b"---\njust a line\n---\n",
    "a bracket": b"---\nfoo: [1\n---\n",
    "latin-1": "Modèle d'essai".encode("latin-1"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_card_of_the_original_gives_no_licence_and_stops_no_save(save, tmp_path, kind):
    (tmp_path / "README.md").write_bytes(BROKEN[kind])
    assert save(tmp_path).data.license is None


def test_a_users_own_card_stays_whatever_its_encoding(pipe, tmp_path):
    (tmp_path / "README.md").write_bytes(BROKEN["latin-1"])
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == BROKEN["latin-1"]


def test_the_card_says_how_to_load_and_how_many_bits(pipe, make_config, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "out", variant="fp16")
    line = 'pipe = StableDiffusionPipeline.from_pretrained("out", variant="fp16", dtype=torch.float32)'
    assert line in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "out")
    unet = quantize_model(tiny_unet(), make_config(recipe=8), progress=False)
    unet.save_pretrained(".")
    card = Path("README.md").read_text()
    assert 'UNet2DConditionModel.from_pretrained("out", dtype=torch.float32)' in card
    assert "packed at 8.00 bits each on average" in card


def test_a_folder_without_a_card_gives_no_licence(save, tmp_path):
    assert save(tmp_path).data.license is None


@pytest.mark.parametrize(
    "source", ["me/model", "/home/me/.cache/huggingface/hub/models--me--model/snapshots/0123abc/unet"]
)
def test_the_base_model_is_named_where_the_hub_cannot_be_asked(save, source):
    card = save(source)
    assert card.data.base_model == "me/model" and card.data.base_model_relation == "quantized"
    assert card.data.license is None


@pytest.mark.parametrize("source", ["runs/some model", "a/b/c", "model", "../model"])
def test_a_path_that_is_gone_is_no_base_model(save, source):
    assert save(source).data.base_model is None


def test_a_section_is_added_once_and_replaced(save, tmp_path):
    save(tmp_path)
    before = (tmp_path / "out" / "README.md").read_text()
    add_section(tmp_path / "out", "Training", "one")
    add_section(tmp_path / "out", "Scores", "two")
    add_section(tmp_path / "out", "Training", "three")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card == before.rstrip() + "\n\n## Scores\n\ntwo\n\n## Training\n\nthree\n"
    ModelCard(card)  # its metadata is still read


def test_a_section_is_not_added_to_a_users_own_card(tmp_path):
    for content in (None, "# My model\n"):
        if content:
            (tmp_path / "README.md").write_text(content)
        with pytest.raises(FileNotFoundError, match="no card written by diffusers_bitsfusion"):
            add_section(tmp_path, "Scores", "good")


NOISE, TRAINED = "generates noise", "trained in this precision"


def made(model, folder: Path) -> str:
    """What the card of a saved model or pipeline says between its code and its figures."""
    model.save_pretrained(folder)
    return (folder / "README.md").read_text().rpartition("```\n")[2].partition("## Size")[0]


@pytest.mark.parametrize(("recipe", "is_noise"), [(1, True), (2, True), (3, False), (5, False), (8, False)])
def test_a_rounded_model_is_said_to_give_noise_only_at_few_bits(tmp_path, recipe, is_noise):
    text = made(quantize_model(tiny_unet(), BitsFusionConfig(recipe=recipe), progress=False), tmp_path)
    assert "were rounded" in text and (NOISE in text) == is_noise and TRAINED not in text
    assert origin(tmp_path) == "rounded"


def test_a_rounded_vae_gives_no_noise(source_folder, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(source_folder)
    text = made(quantize_model(pipe.vae, BitsFusionConfig(recipe=2), progress=False), tmp_path)
    assert "were rounded" in text and NOISE not in text


def test_a_trained_model_is_said_to_be_trained_and_nothing_else_also_when_saved_again(tmp_path):
    unet = convert(prepare_qat(tiny_unet(), BitsFusionConfig(recipe=2)))
    text = made(unet, tmp_path / "first")
    assert TRAINED in text and NOISE not in text and "rounded" not in text
    add_section(tmp_path / "first", "Training", "Stage 1.")
    again = type(unet).from_pretrained(tmp_path / "first")
    assert made(again, tmp_path / "second") == text
    assert origin(tmp_path / "first") == origin(tmp_path / "second") == "trained"


@pytest.mark.parametrize(("tuning_steps", "kind"), [(0, "calibrated"), (2, "tuned")])
def test_a_calibrated_or_tuned_pipeline_says_on_what(source_folder, tmp_path, tuning_steps, kind):
    pipe = StableDiffusionPipeline.from_pretrained(source_folder)
    calibration = Calibration(["a", "b"], num_samples=2, num_inference_steps=3, seed=5, tuning_steps=tuning_steps)
    quantize_model(pipe, BitsFusionConfig(recipe=2), progress=False, calibration=calibration)
    text = made(pipe, tmp_path)
    assert "2 images of 3 steps, prompts: 2 of the user's, seed 5" in text and NOISE not in text
    assert ("tuned in 2 steps" in text) == (kind == "tuned")
    assert origin(tmp_path) == kind
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert made(again, tmp_path / "again") == text
