"""Pushing to a Hub and loading from it, with the real client: fresh processes against a server on loopback."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hub_server import Fault, Hub, Repository, content
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_bitsfusion import size_report

TOKEN = "hf_TheTokenThatNobodyMustRead"
WEIGHTS = "diffusion_pytorch_model.safetensors"
BASE_CARD = "---\nlicense: creativeml-openrail-m\npipeline_tag: text-to-image\ntags:\n- diffusers\n---\n# Base\n"
STATUSES = (401, 403, 429, 500)

COMMON = """
import json
import os
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from typer.testing import CliRunner

from diffusers_bitsfusion import BitsFusionConfig
from diffusers_bitsfusion.cli import app

token, folder = sys.argv[1], Path(sys.argv[2])
time.sleep = lambda seconds: None  # the client waits between its attempts
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 10_000  # of 10 MB: what came of a smaller file would be thrown away
results = {}


def sample_latents(pipe):
    arguments = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    return pipe("ab", generator=torch.Generator().manual_seed(1), **arguments).images


def attempt(name, call):
    try:
        call()
        results[name] = None
    except Exception as error:
        results[name] = []
        while error is not None:  # diffusers' errors say less than what caused them
            results[name].append(f"{type(error).__name__}: {error}")
            error = error.__cause__ or error.__context__
"""

PUSH = """
config = BitsFusionConfig(target_bits=2.6)
pipe = StableDiffusionPipeline.from_pretrained("studio/base", quantization_config=config, token=token)
torch.save({"latents": sample_latents(pipe), "unet": pipe.unet.state_dict()}, folder / "expected.pt")
pipe.push_to_hub("me/pipe", token=token)
pipe.unet.push_to_hub("me/unet", token=token)
for status in (401, 403, 429, 500):
    attempt(str(status), lambda: pipe.unet.push_to_hub(f"me/push-{status}", token=token))
arguments = {"push_to_hub": True, "repo_id": "me/push-500", "token": token}
attempt("while saving", lambda: pipe.save_pretrained(folder / "saved", **arguments))
refused = {"repo_id": "me/unwelcome", "token": "hf_nobodys"}
attempt("pipeline, create", lambda: pipe.push_to_hub(**refused))
attempt("model, create", lambda: pipe.unet.push_to_hub(**refused))
attempt("pipeline, save", lambda: pipe.save_pretrained(folder / "refused", push_to_hub=True, **refused))
attempt("model, save", lambda: pipe.unet.save_pretrained(folder / "refused", push_to_hub=True, **refused))
(folder / "pushed.json").write_text(json.dumps(results))
"""

PULL = """
expected = torch.load(folder / "expected.pt")
pipe = StableDiffusionPipeline.from_pretrained("me/pipe", token=token)
assert torch.equal(sample_latents(pipe), expected["latents"])
unet = UNet2DConditionModel.from_pretrained("me/unet", token=token)
for state in (pipe.unet.state_dict(), unet.state_dict()):
    assert state.keys() == expected["unet"].keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected["unet"].items())
print("sampled alike, tensor by tensor alike")
for status in (401, 403, 429, 500):
    for kind, part in ((StableDiffusionPipeline, {}), (UNet2DConditionModel, {"subfolder": "unet"})):
        attempt(f"{kind.__name__} {status}", lambda: kind.from_pretrained(f"me/pull-{status}", token=token, **part))
attempt("no token", lambda: UNet2DConditionModel.from_pretrained("me/unet", token=False, force_download=True))
resumed = UNet2DConditionModel.from_pretrained("me/interrupted", token=token)
attempt("cut", lambda: UNet2DConditionModel.from_pretrained("me/cut", token=token))
cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
results["in the cache after the cut"] = [str(file) for file in cache.glob("models--me--cut/**/*.safetensors")]
again = UNet2DConditionModel.from_pretrained("me/cut", token=token)  # the fault is over
for unet in (resumed, again):
    assert all(torch.equal(tensor, expected["unet"][name]) for name, tensor in unet.state_dict().items())
pipe.save_pretrained(folder / "again")
pipe.push_to_hub("me/again", token=token)
os.environ["HF_TOKEN"] = token
for source in ("studio/base", "studio/unet", "me/unet"):
    done = CliRunner().invoke(app, ["quantize", source, str(folder / "quantized" / source), "--target-bits", "2.6"])
    results[f"quantize {source}"] = [str(done.exit_code), done.output]
(folder / "pulled.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def hub(source_folder):
    """A Hub that holds an unquantized pipeline with a licence, and asks for a token."""
    hub = Hub()
    hub.token = TOKEN
    files = content(source_folder)
    hub.repositories["studio/base"] = Repository(files | {"README.md": BASE_CARD.encode()})
    unet = {name.removeprefix("unet/"): data for name, data in files.items() if name.startswith("unet/")}
    hub.repositories["studio/unet"] = Repository(unet)
    with hub.running():
        yield hub


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def run(hub, work, run_python):
    """Runs a script as a user would at another machine: its own cache, all logging on."""

    def run(code: str, home: str):
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # the server has the older way of uploading only
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(work / home),
            "HF_HUB_VERBOSITY": "debug",
            "DIFFUSERS_VERBOSITY": "debug",
        }
        result = run_python(COMMON + code, TOKEN, work, environment=settings)
        assert result.returncode == 0, result.stderr[-3000:]
        return result

    return run


@pytest.fixture(scope="module")
def pushed(hub, work, run):
    """What pushing printed; its results are in pushed.json."""
    for status in STATUSES:
        hub.faults[f"me/push-{status}"] = Fault(status=status, requests="lfs/objects/batch|commit")
    return run(PUSH, "home-of-push")


@pytest.fixture(scope="module")
def pulled(hub, work, run, pushed):
    """What loading printed; its results are in pulled.json."""
    for status in STATUSES:
        hub.repositories[f"me/pull-{status}"] = hub.repositories["me/pipe"]
        hub.faults[f"me/pull-{status}"] = Fault(status=status)
    for name, times in (("me/interrupted", 1), ("me/cut", 6)):  # the client tries six times
        hub.repositories[name] = hub.repositories["me/unet"]
        hub.faults[name] = Fault(cut_after=100_000, times=times, requests="GET .*safetensors")
    return run(PULL, "home-of-pull")


def results(work: Path, name: str) -> dict[str, list[str]]:
    """Errors of what was attempted: the one raised, and what caused it."""
    return json.loads((work / f"{name}.json").read_text())


def ranges(hub: Hub, repo_id: str) -> list[str | None]:
    """The Range header of every download of the repository's weights, in order."""
    return [
        headers.get("Range")
        for request, headers in hub.requests
        if request.startswith(f"GET /{repo_id}/resolve/") and request.endswith(WEIGHTS)
    ]


def test_what_is_pushed_is_what_would_be_saved(hub, pushed):
    for repo_id, folder in (("me/pipe", "unet/"), ("me/unet", "")):
        files = hub.repositories[repo_id].files
        assert {"README.md", f"{folder}{WEIGHTS}", f"{folder}config.json"} <= files.keys()
    unets = [hub.repositories["me/pipe"].files[f"unet/{WEIGHTS}"], hub.repositories["me/unet"].files[WEIGHTS]]
    assert unets[0] == unets[1]
    assert len(hub.repositories["me/pipe"].commits) == 2  # the initial one, and all files in one


def test_a_fresh_process_loads_pipeline_and_model_by_name_without_arguments(pulled):
    assert "sampled alike, tensor by tensor alike" in pulled.stdout


def test_the_card_names_base_model_licence_and_the_way_to_load(hub, pushed):
    for repo_id in ("me/pipe", "me/unet"):
        card = ModelCard(hub.repositories[repo_id].files["README.md"].decode())
        assert card.data.base_model == "studio/base" and card.data.base_model_relation == "quantized"
        assert card.data.license == "creativeml-openrail-m" and card.data.pipeline_tag == "text-to-image"
        assert "import diffusers_bitsfusion" in card.text
        assert f'from_pretrained("{repo_id}", dtype=torch.float32)' in card.text


def test_the_card_shows_the_recipe_as_a_picture_beside_it(hub, pushed):
    for repo_id, name in (("me/pipe", "bits_unet.png"), ("me/unet", "bits_UNet2DConditionModel.png")):
        files = hub.repositories[repo_id].files
        assert f"]({name})" in files["README.md"].decode()
        assert Image.open(io.BytesIO(files[name])).size[0] > 400


def test_the_card_has_the_figures_of_the_files(hub, pushed, tmp_path):
    files = hub.repositories["me/unet"].files
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    report, card = size_report(tmp_path), files["README.md"].decode()
    assert f"{report.total_bytes / 1e6:.2f} MB" in card
    for bits in (report.average_bits.paper, report.average_bits.layers, report.real_bits):
        assert f"| {bits:.3f} |" in card


def test_pushing_what_was_loaded_quantized_names_the_original_base_model(hub, pulled):
    card = ModelCard(hub.repositories["me/again"].files["README.md"].decode())
    assert card.data.base_model == "studio/base" and card.data.license == "creativeml-openrail-m"


@pytest.mark.parametrize("status", STATUSES)
def test_a_refused_push_says_what_to_do_and_commits_nothing(hub, work, pushed, status):
    (error, *_) = results(work, "pushed")[str(status)]
    way_out = {401: "hf auth login", 403: "write access", 429: "wait a few minutes", 500: "push again later"}[status]
    assert str(status) in error and way_out in error and f"Nothing was committed to me/push-{status}" in error
    assert hub.repositories[f"me/push-{status}"].files == {}


@pytest.mark.parametrize("door", ["create", "save"])
@pytest.mark.parametrize("what", ["pipeline", "model"])
def test_a_refused_repository_says_what_to_do_at_every_door(hub, work, pushed, what, door):
    (error, *_) = results(work, "pushed")[f"{what}, {door}"]
    assert "401" in error and "hf auth login" in error
    assert error.count("Nothing was committed to me/unwelcome") == 1
    assert "me/unwelcome" not in hub.repositories


def test_a_refused_push_while_saving_keeps_the_finished_save(work, pushed):
    assert "Nothing was committed" in results(work, "pushed")["while saving"][0]
    saved = work / "saved"
    assert {"model_index.json", "README.md", "unet/config.json", f"unet/{WEIGHTS}"} <= content(saved).keys()
    assert not list(saved.glob(".saving-*"))
    assert size_report(saved).quantized.keys() == {"unet"}


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "UNet2DConditionModel"])
def test_a_refused_download_names_model_and_status_and_leaves_no_files(work, pulled, kind, status):
    errors = results(work, "pulled")[f"{kind} {status}"]
    assert f"me/pull-{status}" in errors[0]  # diffusers' words
    assert any(f"{status} " in error for error in errors)
    cached = work / "home-of-pull" / "hub" / f"models--me--pull-{status}"
    assert not [file for file in cached.rglob("*.safetensors")]


def test_a_private_model_without_a_token_asks_for_one(work, pulled):
    assert any("make sure you are authenticated" in error for error in results(work, "pulled")["no token"])


def test_an_interrupted_download_goes_on_where_it_stopped(hub, pulled):
    assert ranges(hub, "me/interrupted") == [None, "bytes=100000-"]


def test_a_hub_that_stops_mid_file_is_named_and_leaves_nothing_half(hub, work, pulled):
    outcome = results(work, "pulled")
    assert "peer closed connection" in outcome["cut"][0]
    assert outcome["in the cache after the cut"] == []
    assert len(ranges(hub, "me/cut")) == 7  # six that were cut, and the whole


def test_the_command_quantizes_a_pipeline_and_a_model_by_name(work, pulled):
    for source in ("studio/base", "studio/unet"):
        code, output = results(work, "pulled")[f"quantize {source}"]
        assert code == "0" and "bits a weight" in output, output
    pushed, here = work / "quantized" / "studio" / "base" / "unet", work / "quantized" / "studio" / "unet"
    assert (pushed / WEIGHTS).read_bytes() == (here / WEIGHTS).read_bytes()
    code, output = results(work, "pulled")["quantize me/unet"]
    assert code == "1" and "is of a model that is quantized already" in output


def test_no_token_in_files_cards_configs_or_logs(hub, work, pushed, pulled):
    assert any(headers.get("Authorization") == f"Bearer {TOKEN}" for _, headers in hub.requests)
    for repository in hub.repositories.values():
        assert not [path for path, content in repository.files.items() if TOKEN.encode() in content]
    written = [file for file in work.rglob("*") if file.is_file()]
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]
    for result in (pushed, pulled):
        assert "Request" in result.stderr  # logging was on
        assert TOKEN not in result.stdout + result.stderr
