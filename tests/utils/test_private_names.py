"""A canary: the private names of other packages that this package reads are still there."""

from __future__ import annotations

import inspect
import pkgutil

import pytest
from architecture import REPOSITORY

from diffusers_bitsfusion.utils import private_names
from diffusers_bitsfusion.utils.private_names import PrivateName

NAMES = {key: name for key, name in vars(private_names).items() if isinstance(name, PrivateName)}


@pytest.mark.parametrize("key", NAMES)
def test_the_installed_version_has_the_name(key):
    name = NAMES[key]
    owner = pkgutil.resolve_name(name.module)
    assert hasattr(owner, name.name) or name.name in inspect.getsource(owner), (
        f"utils/private_names.py, {key}: {name.missing()}"
    )


def test_a_name_that_is_gone_is_said_with_what_needs_it():
    gone = PrivateName("torch.nn", "_gone_in_2027", "counting sheep")
    torch_like = object()
    assert gone.read(torch_like, default=3) == 3
    with pytest.raises(RuntimeError, match=r"torch \d.* has no _gone_in_2027 in torch.nn, .* for counting sheep"):
        gone.require(torch_like)


GONE = """
import sys
sys.path.insert(0, sys.argv[1])
import diffusers, peft
for owner, name in ((diffusers.DiffusionPipeline, "_upload_folder"), (peft.LoraModel, "_create_new_module")):
    for kind in owner.__mro__:
        if name in vars(kind):
            delattr(kind, name)
import torch
from diffusers import StableDiffusionPipeline
from pathlib import Path
from tiny import tiny_pipeline
from diffusers_bitsfusion import BitsFusionConfig
import sys
src, out = sys.argv[2:]
Path(src).mkdir()
tiny_pipeline(Path(src)).save_pretrained(src)
config = BitsFusionConfig(recipe=2)
pipe = StableDiffusionPipeline.from_pretrained(src, quantization_config=config, safety_checker=None)
pipe.save_pretrained(out)
again = StableDiffusionPipeline.from_pretrained(out)
assert torch.equal(pipe.unet.conv_in.codes, again.unet.conv_in.codes)
"""


def test_importing_and_loading_survive_renamed_names(run_python, tmp_path):
    result = run_python(GONE, REPOSITORY / "examples", tmp_path / "source", tmp_path / "packed")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "has no _upload_folder" in result.stderr and "has no _create_new_module" in result.stderr
