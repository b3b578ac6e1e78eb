"""Every code block of README, docs and examples runs in order, or says why it does not.

Tiny models stand in for the Hub's: folders of the working directory that bear the ids of the pages.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from code_blocks import NEVER_RUN, PAGES, REPOSITORY, RUN, blocks, commands, page_blocks, run
from safetensors.torch import save_file
from tiny import tiny_lora, tiny_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CLIP = "openai/clip-vit-base-patch32"
EVERY_BLOCK = [block for page in PAGES for block in page_blocks(page)]
RUNNING = [page for page in PAGES if any(block.runs for block in page_blocks(page))]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, clip_folder) -> Path:
    """A folder with what the pages' blocks name: models under their Hub ids, prompts, an adapter, configs."""
    folder = tmp_path_factory.mktemp("stand-ins")
    # A narrow time embedding: at 8 bits a wider one would keep so small a model from the default's 1.99 bits.
    pipe = tiny_pipeline(tmp_path_factory.mktemp("tokenizer"), time_embedding_dim=8, block_out_channels=(16, 32))
    pipe.save_pretrained(folder / STABLE_DIFFUSION)
    lora = tiny_lora(pipe.unet, targets=("to_q", "to_v"))
    save_file({f"unet.{name}": tensor for name, tensor in lora.items()}, folder / "lora.safetensors")
    shutil.copytree(clip_folder, folder / CLIP)
    shutil.copytree(REPOSITORY / "docs" / "configs", folder / "docs" / "configs")
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    (folder / "prompts.txt").write_text("a cat in a hat\na red car\n")
    (folder / "prompts.tsv").write_text("Prompt\tCategory\na cat\tone\na red car\tone\n")
    return folder


@pytest.fixture
def hub(monkeypatch) -> None:
    """Pushes arrive in the working directory, under the repository's id."""

    class Repository:
        def __init__(self, repo_id, **_):
            self.repo_id = repo_id

    def upload_folder(*, repo_id, folder_path, **_):
        shutil.copytree(folder_path, repo_id)

    replacements = {"create_repo": Repository, "upload_folder": upload_folder}
    for name, module in list(sys.modules.items()):
        if name.startswith(("diffusers.", "diffusers_bitsfusion")):
            for function in replacements.keys() & vars(module).keys():
                monkeypatch.setattr(module, function, replacements[function])


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_the_blocks_of_a_page_run_in_order(page, stand_ins, tmp_path, monkeypatch, hub):
    shutil.copytree(stand_ins, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    run(page_blocks(page))


def test_pages_with_blocks_to_run_are_found():
    assert REPOSITORY / "README.md" in RUNNING and len(RUNNING) > 6
    assert sum(block.runs for block in EVERY_BLOCK) > 30


def test_every_block_is_of_a_known_language():
    assert [block.where for block in EVERY_BLOCK if block.language not in RUN + NEVER_RUN] == []


def test_a_block_that_is_not_run_says_why():
    source = "<!-- not run: it needs a GPU -->\n```bash\nmake\n```\n\n```python\nx\n```\n"
    first, second = blocks(source, "page.md")
    assert first.reason == "it needs a GPU" and not first.runs
    assert second.reason is None and second.runs and second.where == "page.md:6"


@pytest.mark.parametrize(
    "source",
    [
        "```python\nundefined\n```",
        "```python\nx = 1\n```\n```python\nassert x == 2\n```",
        "```bash\nbitsfusion inspect nowhere\n```",
        "```bash\nmake test\n```",
        "<!-- not run: -->\n```bash\nmake test\n```",
    ],
)
def test_a_block_that_fails_is_named(source):
    with pytest.raises(RuntimeError, match=r"^page\.md:\d+ fails: "):
        run(list(blocks(source, "page.md")))


def test_a_block_that_is_not_closed_is_named():
    with pytest.raises(ValueError, match=r"page.md:1"):
        list(blocks("```python\nx = 1\n", "page.md"))


def test_commands_are_split_as_a_shell_does():
    source = 'bitsfusion a "b c" \\\n    --d   # why\n\n# nothing\nbitsfusion e'
    assert commands(source) == [["bitsfusion", "a", "b c", "--d"], ["bitsfusion", "e"]]
