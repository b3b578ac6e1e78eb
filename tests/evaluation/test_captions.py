from __future__ import annotations

import json

import pytest

from diffusers_bitsfusion.evaluation.suites.captions import read_caption_file


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def caption(number, image, text):
    return {"id": number, "image_id": image, "caption": text}


def test_cocos_annotations_give_the_first_caption_of_each_picture(tmp_path):
    content = {
        "info": {"year": 2014},
        "images": [{"id": 9, "file_name": "COCO_val2014_000000000009.jpg"}],
        "annotations": [
            caption(30, 9, "A later one."),
            caption(12, 42, " A  bike\n"),
            caption(20, 9, "The first one of nine."),
        ],
    }
    found = read_caption_file(write(tmp_path / "captions_val2014.json", content))
    assert [(p.caption, p.category) for p in found] == [("The first one of nine.", None), ("A bike", None)]


def test_files_as_large_as_cocos_training_captions_are_read(tmp_path):
    long = "a " * 1_000_000
    content = {"annotations": [caption(number, number, long) for number in range(46)]}
    file = write(tmp_path / "captions_train2017.json", content)
    assert file.stat().st_size > 92e6 and len(read_caption_file(file)) == 46


def test_parti_prompts_and_text_files(tmp_path):
    lines = "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\na cat\tAnimals\tBasic\tx\n"
    found = read_caption_file(write(tmp_path / "PartiPrompts.tsv", lines))
    assert [(p.caption, p.category) for p in found] == [("bond", "Abstract"), ("a cat", "Animals")]
    assert [p.caption for p in read_caption_file(write(tmp_path / "c.txt", "one\n\ntwo\n"))] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "is not a JSON object"),
        ({"images": [], "categories": []}, "there is no 'annotations'"),
        ({"annotations": [{"id": 1, "image_id": 2, "bbox": [0, 0, 1, 1]}]}, "annotation 1 .*there is no 'caption'"),
        ({"annotations": [caption(1, 1, "a"), caption(1, 2, "b")]}, "the id 1 is there twice"),
        ({"annotations": []}, "it holds no captions"),
        ("{", "it is damaged: it is not one JSON document"),
    ],
)
def test_other_json_is_refused_with_where_to_get_cocos(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_caption_file(write(tmp_path / "instances_val2014.json", content))
    assert "https://cocodataset.org" in str(caught.value)


def test_no_file_says_where_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"PartiPrompts is at https://github.com/google-research/parti"):
        read_caption_file(tmp_path / "PartiPrompts.tsv")
