import json

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from examples.shapes.captions import heldout_prompts
from examples.shapes.evaluate import generate, score_by_category
from examples.shapes.pretrain import main
from examples.shapes.text import MAX_LENGTH, create_tokenizer

SMALL = ["--images", "16", "--batch-size", "4", "--cooldown", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    main(["--work-dir", str(work), "--out", str(work / "pipeline"), "--steps", "2", *SMALL])
    return work


def test_exported_pipeline_loads_with_plain_diffusers_and_generates(trained):
    pipe = StableDiffusionPipeline.from_pretrained(trained / "pipeline")
    assert isinstance(pipe.scheduler, PNDMScheduler)
    assert pipe.scheduler.config.skip_prk_steps
    prompts = heldout_prompts(6)
    images = generate(pipe, [prompt.caption for prompt in prompts], num_inference_steps=2, batch_size=4)
    assert images.shape == (6, 64, 64, 3)
    assert set(score_by_category(prompts, images)) == {"overall", *(prompt.spec.category for prompt in prompts)}
    alone = generate(pipe, [prompts[0].caption], num_inference_steps=2)
    assert abs(alone[0].astype(int) - images[0]).max() <= 2


def test_export_is_small_fp16_and_holds_the_clip_pair(trained):
    out = trained / "pipeline"
    assert sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) <= 24e6
    assert {"vocab.json", "merges.txt"} <= {file.name for file in (out / "tokenizer").iterdir()}
    clip = CLIPModel.from_pretrained(out / "clip")
    pipe = StableDiffusionPipeline.from_pretrained(out)
    for name, value in pipe.text_encoder.state_dict().items():
        assert torch.equal(value, clip.text_model.state_dict()[name])
    assert json.loads((out / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"


@pytest.fixture
def before_unet(trained, tmp_path):
    """A work folder with what the stage `unet` needs."""
    for part in ("data", "tokenizer", "text", "latents.npy"):
        (tmp_path / part).symlink_to(trained / part)
    return tmp_path


def test_resuming_gives_the_same_weights_as_one_run(before_unet):
    arguments = ["--work-dir", str(before_unet), "--stage", "unet", *SMALL, "--cooldown", "0"]

    def weights(*steps):
        (before_unet / "unet.pt").unlink(missing_ok=True)
        for last in steps:
            main([*arguments, "--steps", str(last), "--resume"])
        return torch.load(before_unet / "unet.pt", weights_only=True)["models"]["unet"]

    once, twice = weights(3), weights(1, 3)
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_of_the_step_trains_what_separate_launches_train(before_unet):
    arguments = ["--work-dir", str(before_unet), "--stage", "unet", *SMALL]

    def weights(*more):
        main([*arguments, *more])
        state = torch.load(before_unet / "unet.pt", weights_only=True, map_location="cpu")
        return torch.cat([value.flatten() for value in state["models"]["unet"].values()])

    start = weights("--steps", "1", "--learning-rate", "0")
    launched, graphed = (weights("--steps", "4", *more) - start for more in ((), ("--compile",)))
    assert launched.norm() > 0
    assert torch.cosine_similarity(graphed, launched, dim=0) > 0.95


def test_tokenizer_knows_words_and_accepts_any_text(tmp_path):
    captions = ["a red circle", "two small triangles above the right ring", "one image"]
    create_tokenizer(captions).save_pretrained(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    for word in {word for caption in captions for word in caption.split()}:
        assert tokenizer.tokenize(word) == [word + "</w>"]
    ids = tokenizer("Ein Löwe? 🦁", padding="max_length", truncation=True).input_ids
    assert len(ids) == MAX_LENGTH
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id in ids
    assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(tokenizer.tokenize("Ein Löwe? 🦁"))
