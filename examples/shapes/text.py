"""Stage 2: the tokenizer and the CLIP text tower, which learns from captions alone what they ask for."""

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from .captions import Prompt, sample_foil, sample_paraphrase, sample_prompt
from .dataset import CATEGORY_WEIGHTS
from .scenes import COLORS, COUNTS, RADII, SHAPES, PromptSpec
from .training import Run, TrainOptions

MAX_LENGTH = 16
WIDTH = 128
_TEMPERATURE = 0.07
_AXES = {None: 0, "left of": 1, "right of": 1, "above": 2, "below": 2}
# What is read from the state of the end token: how many objects, the axis of their relation, and of the first (left,
# upper) and the second object shape, colour and size. An attribute left open and a second object not there count too.
_READOUT_SIZES = (1 + len(COUNTS), 3) + 2 * (len(SHAPES) + 1, len(COLORS) + 1, len(RADII) + 1)
# And from the last tokens, which are padding, one for each side of the image: the shape that must lie there.
SIDES = ("left", "right", "upper", "lower")
_SIDES_OF_RELATION = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("upper", "lower"),
    "below": ("lower", "upper"),
}


def create_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE with one token for each word of `captions`; other text falls apart into bytes."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Far more merges than these few words have room for: every word ends as one token.
    bpe.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=5000, end_of_word_suffix="</w>"))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = letters + [letter + "</w>" for letter in letters]
    pieces += [left + right for left, right in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids (n, 16) int64, padded as StableDiffusionPipeline pads."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def create_text_model(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def train_text(
    tokenizer: CLIPTokenizer, n_samples: int, path: Path, options: TrainOptions
) -> CLIPTextModelWithProjection:
    """Contrastive training on `n_samples` captions: each close to a paraphrase, far from its foil and the others.

    Along with it, what a caption asks for must be linear in the end token's state. Attention is causal: only the
    tokens from there on have read all of it, and the UNet has far fewer steps than real ones to work out the rest.
    Of the padding after it, the last four tokens tell what lies on the left, on the right, above and below: a query
    that knows its place then finds its shape by attention alone.
    """
    prompts = _prompts(n_samples)
    rng = random.Random(1)
    paraphrases = tokenize(tokenizer, [sample_paraphrase(rng, prompt).caption for prompt in prompts])
    foils = tokenize(tokenizer, [sample_foil(rng, prompt).caption for prompt in prompts])
    captions = tokenize(tokenizer, [prompt.caption for prompt in prompts])
    meanings = _meanings(prompts)
    contents = torch.tensor([_contents(prompt.spec) for prompt in prompts])
    sides = torch.tensor([_shapes_by_side(prompt.spec) for prompt in prompts])
    models = {
        "text": create_text_model(tokenizer),
        "readout": torch.nn.Linear(WIDTH, sum(_READOUT_SIZES)),
        "side_readout": torch.nn.Linear(WIDTH, len(SHAPES) + 1),
    }
    run = Run(models, options, path)
    model, device = run.models["text"], run.accelerator.device
    readout, side_readout = run.models["readout"], run.models["side_readout"]

    def contrastive_loss(embeddings, meaning):
        caption, paraphrase, foil = F.normalize(embeddings.float(), dim=-1).chunk(3)
        same = (meaning[:, None] == meaning).fill_diagonal_(False)
        among = (caption @ paraphrase.T / _TEMPERATURE).masked_fill(same, float("-inf"))
        target = torch.arange(len(meaning), device=device)
        with_foil = torch.cat([among, (caption * foil).sum(-1, keepdim=True) / _TEMPERATURE], dim=1)
        return (F.cross_entropy(with_foil, target) + F.cross_entropy(among.T, target)) / 2

    def readout_loss(states, ids, content, side):
        first_end = ids.eq(tokenizer.eos_token_id).int().argmax(1)
        for_all = states[torch.arange(len(ids)), first_end], states[:, -1]  # padding repeats the end token
        answers = [readout(state).float().split(_READOUT_SIZES, dim=-1) for state in for_all]
        loss = sum(F.cross_entropy(a, c) for answer in answers for a, c in zip(answer, content.T, strict=True)) / 2
        on_sides = side_readout(states[:, -len(SIDES) :]).float()
        return loss + len(SIDES) * F.cross_entropy(on_sides.flatten(0, 1), side.flatten())

    def loss_of_batch(indices):
        ids = torch.cat([captions[indices], paraphrases[indices], foils[indices]]).to(device)
        n = len(indices)
        with run.accelerator.autocast():
            out = model(ids)
            states = out.last_hidden_state[:n]
            reading = readout_loss(states, ids[:n], contents[indices].to(device), sides[indices].to(device))
        return contrastive_loss(out.text_embeds, meanings[indices].to(device)) + reading

    run.train(loss_of_batch, n_samples)
    return run.averaged("text")


def _contents(spec: PromptSpec) -> list[int]:
    """The answers to `_READOUT_SIZES`."""
    objects = spec.objects[::-1] if spec.relation in ("right of", "below") else spec.objects
    answers = [len(objects) - 1, _AXES[spec.relation]]
    for wanted in (objects[0], objects[1] if len(set(objects)) == 2 else None):
        for choices, value in ((SHAPES, "shape"), (tuple(COLORS), "color"), (tuple(RADII), "size")):
            asked = wanted and getattr(wanted, value)
            answers.append(choices.index(asked) if asked else len(choices))
    return answers


def _shapes_by_side(spec: PromptSpec) -> list[int]:
    """For each of `SIDES` the index of the shape that must lie there, or their number."""
    places = dict(zip(_SIDES_OF_RELATION.get(spec.relation, ()), spec.objects, strict=False))
    return [SHAPES.index(places[side].shape) if side in places else len(SHAPES) for side in SIDES]


def _prompts(n: int) -> list[Prompt]:
    rng = random.Random(0)
    categories = rng.choices(tuple(CATEGORY_WEIGHTS), tuple(CATEGORY_WEIGHTS.values()), k=n)
    return [sample_prompt(rng, category) for category in categories]


def _meanings(prompts):
    """(n,) int64, equal for prompts that ask for the same, in whichever order they name it."""
    numbers: dict[object, int] = {}
    keys = []
    for prompt in prompts:
        spec = prompt.spec
        key = (spec.relation, spec.objects)
        if spec.relation in (None, "right of", "below") and len(spec.objects) == 2:
            swapped = spec.objects[::-1]
            inverse = {"right of": "left of", "below": "above"}.get(spec.relation)
            key = (inverse, swapped) if spec.relation else (None, tuple(sorted(spec.objects, key=str)))
        keys.append(numbers.setdefault(key, len(numbers)))
    return torch.tensor(keys)
