"""The model card: where its licence and base model come from, and what is added to it. Pushed ones: test_hub.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from tiny import tiny_unet

from diffusers_bitsfusion import quantize_model
from diffusers_bitsfusion.reporting.model_card import add_section

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
