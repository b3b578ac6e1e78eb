from __future__ import annotations

import re

import pytest

from diffusers_bitsfusion.evaluation import Prompt, read_captions, read_prompts, sample_prompts


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes):
        path = tmp_path / "prompts.tsv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_reads_the_layout_of_partiprompts(write):
    path = write("Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\nSalvador Dalí\tPeople\tBasic\tx\n")
    assert read_prompts(path) == [Prompt("bond", "Abstract"), Prompt("Salvador Dalí", "People")]


def test_column_names_in_any_case_and_order_with_mark_and_windows_lines(write):
    path = write('\ufeffSPEC\tprompt\r\n{"n": [1, null]}\ta cat\r\n\r\n\ta dog\r\n')
    assert read_prompts(path) == [Prompt("a cat", None, {"n": [1, None]}), Prompt("a dog")]


def test_captions_of_either_kind_of_file(write):
    assert read_captions(write("a cat\n\n  a dog \n")) == ["a cat", "a dog"]
    assert read_captions(write("Category\tPrompt\nanimals\ta cat\n")) == ["a cat"]
    assert read_captions(write('"Prompt"\t" Category "\n"a cat"\tanimals\n')) == ["a cat"]
    with pytest.raises(ValueError, match=r"prompts\.tsv holds no prompts"):
        read_captions(write("\n \n"))


def test_fields_quoted_as_in_csv_are_unquoted_and_an_opening_quote_is_text(write):
    path = write('Prompt\tSpec\n"a ""b"""\t"{""k"": 1}"\n"Stop" on a sign\t{"k": 2}\n"open\t\n')
    assert [(p.caption, p.spec) for p in read_prompts(path)] == [
        ('a "b"', {"k": 1}),
        ('"Stop" on a sign', {"k": 2}),
        ('"open', None),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ("Prompt\tCategory\n\n", "holds no prompts"),
        ("caption\tkind\na\tb\n", "has no column 'Prompt'; its first line names 'caption', 'kind'"),
        (b"Prompt\n\xff\xfe\n", "is not UTF-8 text"),
        ("Prompt\tCategory\na\tb\nc\n", "line 3: the category is empty"),
        ("Category\tPrompt\na\t \n", "line 2: the prompt is empty"),
        ("Prompt\tSpec\na\t{1}\n", "line 2: the spec is not JSON"),
    ],
)
def test_bad_files_are_named_with_the_reason(write, content, message):
    path = write(content)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_prompts(path)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"none\.tsv"):
        read_prompts(tmp_path / "none.tsv")


def test_samples_keep_the_order_and_are_the_same_every_time():
    prompts = [Prompt(str(i)) for i in range(100)]
    few = sample_prompts(prompts, 10)
    assert few == sample_prompts(prompts, 10)
    numbers = [int(p.caption) for p in few]
    assert numbers == sorted(set(numbers)) and numbers[-1] > 50
    assert sample_prompts(prompts, None) == sample_prompts(prompts, 100) == prompts


@pytest.mark.parametrize("count", [0, -1, 4])
def test_samples_of_impossible_size_are_refused(count):
    with pytest.raises(ValueError, match=f"Cannot take {count} of 3 prompts"):
        sample_prompts([Prompt("a")] * 3, count)
