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

from hyper_sd.data.scenes import BACKGROUNDS, COLORS, EMPTY, NUM_PLACES, PLACES, SHAPES, SIZES, Scenes, captions, sample_scenes
from hyper_sd.judge import ATTRIBUTE_SIZES
from tools.embedded_teacher.trainer import Plan, fit

SEED = 21
BATCH = 128
MAX_LENGTH = 24
HIDDEN = 128


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
        self.phrase = nn.Linear(HIDDEN, sum(_PHRASE))


_PHRASE = (len(PLACES), len(SIZES), len(COLORS), len(SHAPES))


def train_text_encoder(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, workdir: Path, steps: int) -> None:
    """Train `encoder` in place."""
    torch.manual_seed(SEED)
    reader = _Reader(encoder)
    sides = torch.tensor(tokenizer.convert_tokens_to_ids(["left</w>", "right</w>"]))

    def loss_at(step: int) -> Tensor:
        scenes = sample_scenes(SEED, np.arange(step * BATCH, (step + 1) * BATCH))
        ids = tokenize(tokenizer, captions(scenes))
        hidden = encoder(ids).last_hidden_state
        end = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
        loss = _cross_entropy(reader.scene(hidden[torch.arange(BATCH), end]), scenes.labels(), ATTRIBUTE_SIZES)
        rows, positions = torch.isin(ids, sides).nonzero().T  # the last words of all phrases, in the order of the captions
        first = torch.cat([torch.ones(1, dtype=torch.bool), rows[1:] != rows[:-1]])
        return loss + _cross_entropy(reader.phrase(hidden[rows, positions]), _phrase_labels(scenes, rows, first), _PHRASE)

    fit(Plan(name="text", steps=steps, lr=2e-3), reader, loss_at, workdir)


def _phrase_labels(scenes: Scenes, rows: Tensor, first: Tensor) -> Tensor:
    """Place, size, colour and shape of each phrase. `first` tells a caption's first phrase."""
    others = (scenes.shape != EMPTY) & (np.arange(NUM_PLACES)[None] != scenes.first[:, None])
    place = torch.where(first, torch.from_numpy(scenes.first)[rows], torch.from_numpy(others.argmax(axis=1))[rows])
    wanted = scenes.labels()[rows]
    at = torch.arange(len(rows))
    return torch.stack([place, wanted[at, 2 * NUM_PLACES + place], wanted[at, NUM_PLACES + place], wanted[at, place]], dim=1)


def _cross_entropy(logits: Tensor, labels: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The sum over attributes of the mean cross entropy."""
    losses = [nn.functional.cross_entropy(part, label) for part, label in zip(logits.split(sizes, dim=1), labels.T, strict=True)]
    return torch.stack(losses).sum()
