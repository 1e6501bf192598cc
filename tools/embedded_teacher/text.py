"""Tokenizer and CLIPTextModel of the embedded teacher.

The text encoder is trained alone, before the UNet, to say what a caption says: at the last word of an object's phrase its
place, size, colour and shape, at the end of the text every attribute of the scene. Like Stable Diffusion's it is then frozen.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hyper_sd.data.scenes import BACKGROUNDS, COLORS, EMPTY, PLACES, SHAPES, SIZES, Scenes, captions, sample_scenes
from hyper_sd.judge import ATTRIBUTE_SIZES
from tools.embedded_teacher.trainer import Plan, fit

SEED = 21
BATCH = 128
MAX_LENGTH = 24
HIDDEN = 128
PHRASE_ENDS = (8, 17)  # token index of 'left' or 'right' of the first and the second object


def write_tokenizer(path: Path) -> CLIPTokenizer:
    """A byte-pair tokenizer with one token for every word of the captions; other words fall apart into letters."""
    words = sorted(
        {word for phrase in (*SHAPES, *SIZES, *PLACES, *COLORS, *BACKGROUNDS, "a and at on the background") for word in phrase.split()}
    )
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = letters + [f"{letter}</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _apply_merges([*word[:-1], f"{word[-1]}</w>"], merges)
        while len(pieces) > 1:  # a new merge comes last in rank, so it cannot change how earlier words are split
            merges.append((pieces[0], pieces[1]))
            pieces = _apply_merges(pieces, merges)
            tokens.append("".join(merges[-1]))
    vocab = {token: index for index, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    path.mkdir(parents=True, exist_ok=True)
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer(vocab=str(path / "vocab.json"), merges=str(path / "merges.txt"), model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(path)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    return tokenizer


def _apply_merges(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    for left, right in merges:
        index = 0
        while index < len(pieces) - 1:
            if (pieces[index], pieces[index + 1]) == (left, right):
                pieces = [*pieces[:index], left + right, *pieces[index + 2 :]]
            index += 1
    return pieces


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt").input_ids


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        projection_dim=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


class _Reader(nn.Module):
    """The encoder with the linear heads it is trained through; the heads are thrown away."""

    def __init__(self, encoder: CLIPTextModel):
        super().__init__()
        self.encoder = encoder
        self.scene = nn.Linear(HIDDEN, sum(ATTRIBUTE_SIZES))
        self.phrase = nn.Linear(HIDDEN, len(PLACES) + len(SIZES) + len(COLORS) + len(SHAPES))


def train_text_encoder(tokenizer: CLIPTokenizer, workdir: Path, steps: int) -> CLIPTextModel:
    torch.manual_seed(SEED)
    reader = _Reader(build_text_encoder(tokenizer))

    def loss_at(step: int) -> Tensor:
        scenes = sample_scenes(SEED, np.arange(step * BATCH, (step + 1) * BATCH))
        ids = tokenize(tokenizer, captions(scenes))
        hidden = reader.encoder(ids).last_hidden_state
        end = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
        scene = reader.scene(hidden[torch.arange(BATCH), end]).split(ATTRIBUTE_SIZES, dim=1)
        loss = sum(nn.functional.cross_entropy(logits, label) for logits, label in zip(scene, scenes.labels().T, strict=True))
        for order, position in enumerate(PHRASE_ENDS):
            loss = loss + _phrase_loss(reader.phrase(hidden[:, position]), scenes, order)
        return loss

    fit(Plan(name="text", steps=steps, lr=2e-3), reader, loss_at, workdir)
    return reader.encoder


def _phrase_loss(logits: Tensor, scenes: Scenes, order: int) -> Tensor:
    """Cross entropy of place, size, colour and shape of the first (order 0) or second object, over the captions that have it."""
    others = np.arange(4)[None] != scenes.first[:, None]
    present = (scenes.shape != EMPTY) & others
    place = scenes.first if order == 0 else present.argmax(axis=1)
    rows = np.arange(len(scenes)) if order == 0 else np.flatnonzero(present.any(axis=1))
    at = (rows, place[rows])
    targets = (place[rows], scenes.size[at], scenes.color[at], scenes.shape[at])
    parts = logits[rows].split((len(PLACES), len(SIZES), len(COLORS), len(SHAPES)), dim=1)
    return sum(nn.functional.cross_entropy(part, torch.from_numpy(target)) for part, target in zip(parts, targets, strict=True))
