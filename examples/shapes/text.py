"""Stage 2: the tokenizer and the CLIP text tower, which first learns from captions alone what they ask for."""

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from .captions import Prompt, sample_foil, sample_paraphrase, sample_prompt
from .dataset import CATEGORY_WEIGHTS
from .training import Run, TrainOptions

MAX_LENGTH = 16
WIDTH = 128
_TEMPERATURE = 0.07


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
    """Contrastive training on `n_samples` captions: each close to a paraphrase, far from its foil and the others."""
    prompts = _prompts(n_samples)
    rng = random.Random(1)
    paraphrases = tokenize(tokenizer, [sample_paraphrase(rng, prompt).caption for prompt in prompts])
    foils = tokenize(tokenizer, [sample_foil(rng, prompt).caption for prompt in prompts])
    captions = tokenize(tokenizer, [prompt.caption for prompt in prompts])
    meanings = _meanings(prompts)
    run = Run({"text": create_text_model(tokenizer)}, options, path)
    model, device = run.models["text"], run.accelerator.device

    def loss_of_batch(indices):
        ids = torch.cat([captions[indices], paraphrases[indices], foils[indices]]).to(device)
        with run.accelerator.autocast():
            embeddings = model(ids).text_embeds.float()
        caption, paraphrase, foil = F.normalize(embeddings, dim=-1).chunk(3)
        meaning = meanings[indices].to(device)
        same = (meaning[:, None] == meaning).fill_diagonal_(False)
        among = (caption @ paraphrase.T / _TEMPERATURE).masked_fill(same, float("-inf"))
        target = torch.arange(len(indices), device=device)
        with_foil = torch.cat([among, (caption * foil).sum(-1, keepdim=True) / _TEMPERATURE], dim=1)
        return (F.cross_entropy(with_foil, target) + F.cross_entropy(among.T, target)) / 2

    run.train(loss_of_batch, n_samples)
    return run.averaged("text")


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
