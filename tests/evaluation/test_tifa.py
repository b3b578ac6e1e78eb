"""TIFA on question files made here, with tiny random models and with a scripted one."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltImageProcessor,
    ViltProcessor,
)

from diffusers_bitsfusion.evaluation.suites import answers, tifa
from diffusers_bitsfusion.evaluation.suites.base import Scores

TEXTS = [
    {"id": "coco_1", "caption": "a white cat", "coco_val_id": "380711"},
    {"id": "drawbench_2", "caption": "two dogs on grass"},
    {"id": "paint_3", "caption": "never asked"},
]


def entry(name, question, choices, answer, kind):
    asked = {"question": question, "choices": choices, "answer": answer, "element_type": kind}
    return {"id": name, "caption": "c"} | asked


QUESTIONS = [
    entry("drawbench_2", "how many dogs?", ["1", "2", "3", "4"], "2", "counting"),
    entry("coco_1", "is this a cat?", ["yes", "no"], "yes", "animal/human"),
    entry("coco_1", "what color is the cat?", ["white", "black", "red", "blue"], "white", "color"),
    entry("drawbench_2", "are there dogs?", ["yes", "no"], "yes", "animal/human"),
    entry("drawbench_2", "what is it on?", ["grass", "sand"], "grass", "object"),
]


def write(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def texts(tmp_path):
    return tifa.read_texts(write(tmp_path / "texts.json", TEXTS), write(tmp_path / "questions.json", QUESTIONS))


def tokens(folder):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] [ENC] [DEC] yes no white black red blue is this a cat ? what color the"
    words = words.split()
    (folder / "vocab.txt").write_text("\n".join([*words, *"abcdefghijklmnopqrstuvwxyz1234"]))
    return BertTokenizer(str(folder / "vocab.txt")), len(words) + 30


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer, size = tokens(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=size, **tower)).save_pretrained(folder)
    return folder


def test_files_are_joined_by_id_and_texts_without_questions_are_left_out(texts):
    assert [text.caption for text in texts] == ["a white cat", "two dogs on grass"]
    assert [q.question for q in texts[1].questions] == ["how many dogs?", "are there dogs?", "what is it on?"]
    assert texts[0].questions[1] == tifa.Question(
        "what color is the cat?", ("white", "black", "red", "blue"), "white", "color"
    )


def test_scores_with_a_scripted_model(texts, encoder_folder, monkeypatch):
    module = ModuleType("scripted")
    said = {"is this a cat?": "no", "what color is the cat?": "white", "how many dogs?": "2", "are there dogs?": "yes"}
    seen = []

    def answer(images, questions):
        seen.append((len(images), images[0].size, list(questions)))
        return [said.get(question, "sand") for question in questions]

    module.answer = answer
    monkeypatch.setitem(sys.modules, "scripted", module)
    suite = tifa.Tifa(texts, "scripted:answer", str(encoder_folder))
    records, features = suite.load().score([0, 1], np.zeros((2, 6, 8, 3), np.uint8))
    assert features is None and seen[0] == (2, (8, 6), ["is this a cat?", "what color is the cat?"])
    assert [record["right"] for record in records] == [[False, True], [True, True, False]]
    values = suite.values(Scores(records))
    summary = {name: interval.value for name, interval in suite.summary(values)["tifa"].items()}
    # The mean over captions, not over questions; by element type the mean over questions.
    assert summary == pytest.approx(
        {"overall": (1 / 2 + 2 / 3) / 2, "animal/human": 1 / 2, "color": 1, "counting": 1, "object": 0}
    )
    module.answer = lambda images, questions: ["yes"]
    with pytest.raises(ValueError, match="must return 2 strings"):
        tifa.Tifa(texts, "scripted:answer", str(encoder_folder)).load().score([0], np.zeros((1, 6, 8, 3), np.uint8))


def test_an_answer_outside_the_choices_goes_to_the_nearest_in_meaning(encoder_folder, one_thread):
    choose = answers.load_chooser(str(encoder_folder))
    assert choose("no", ["yes", "no"]) == "no"
    model, tokenizer = BertModel.from_pretrained(encoder_folder).eval(), BertTokenizer.from_pretrained(encoder_folder)

    def embed(text):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double().numpy()
        return states.mean(0) / np.linalg.norm(states.mean(0))

    choices = ["white", "black", "red cat", "the color blue"]
    for answer in ("a cat", "the red", "bluish", "what is this"):
        expected = choices[int(np.argmax([embed(answer) @ embed(choice) for choice in choices]))]
        assert choose(answer, choices) == expected


def blip(folder):
    tokenizer, size = tokens(folder)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 6, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text = tower | special | {"vocab_size": size, "encoder_hidden_size": 16, "projection_dim": 8}
    config = BlipConfig(text_config=text, vision_config=tower | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    BlipForQuestionAnswering(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)


def vilt(folder):
    tokenizer, size = tokens(folder)
    labels = {0: "yes", 1: "no", 2: "white"}
    config = ViltConfig(
        vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16, id2label=labels, label2id={name: i for i, name in labels.items()},
    )  # fmt: skip
    ViltForQuestionAnswering(config).save_pretrained(folder)
    processor = ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=32)
    ViltProcessor(processor, tokenizer).save_pretrained(folder)


@pytest.mark.parametrize("make", [blip, vilt])
def test_any_model_of_transformers_answers(make, tmp_path, one_thread):
    torch.manual_seed(0)
    make(tmp_path)
    answer = answers.load_vqa(str(tmp_path))
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    asked = ["is this a cat ?", "what color is the cat ?", "is this red ?"]
    together = answer(image, asked)
    assert all(isinstance(text, str) for text in together)
    # Questions are padded to each other, which an answer must not depend on.
    assert together == [answer(image, [question])[0] for question in asked]
    if make is vilt:
        assert set(together) <= {"yes", "no", "white"}


@pytest.mark.parametrize(
    ("texts", "questions", "message"),
    [
        (QUESTIONS, QUESTIONS, "texts.json, entry 1 .*it has a 'question'"),
        (TEXTS, TEXTS, "questions.json, entry 1 .*there is no 'question'"),
        ([*TEXTS, TEXTS[0]], QUESTIONS, "entry 4 .*the id 'coco_1' is there twice"),
        (TEXTS[1:], QUESTIONS, "entry 2 .*its id 'coco_1' is not in"),
        ({"a": 1}, QUESTIONS, "it is not a list of entries"),
        ([{"id": 5, "caption": "a"}], QUESTIONS, "'id' is 5, not of type str"),
    ],
)
def test_other_files_are_refused_with_where_to_get_the_right_ones(tmp_path, texts, questions, message):
    with pytest.raises(ValueError, match=message) as caught:
        tifa.read_texts(write(tmp_path / "texts.json", texts), write(tmp_path / "questions.json", questions))
    assert "https://github.com/Yushi-Hu/tifa" in str(caught.value)
