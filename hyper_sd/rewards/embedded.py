"""Two small prompt-image rewards for the embedded teacher's scenes: `embedded`, to train with, and `embedded_heldout`, to watch.

A caption and an image are mapped to unit vectors; the score is their cosine, between -1 and 1. The two share no design and no
training data: `embedded` has convolutions and a transformer over words, `embedded_heldout` depthwise convolutions and a recurrent
network. Neither knows anything of the judge. tools/embedded_reward trains them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from hyper_sd.data.scenes import BACKGROUNDS, COLORS, IMAGE_SIZE, PLACES, SHAPES, SIZES
from hyper_sd.randomness import send
from hyper_sd.rewards.weights import load_module, read

EmbeddedKind = Literal["embedded", "embedded_heldout"]
MAX_WORDS = 24
_WORDS = sorted(
    {word for phrase in (*SHAPES, *SIZES, *PLACES, *COLORS, *BACKGROUNDS, "and on shape background") for word in phrase.split()}
)
_INDEX = {word: number for number, word in enumerate(_WORDS, 2)}  # 0: no word; 1: a word that is not known
_IGNORED = ("a", "at", "the")


def words(prompts: Sequence[str]) -> Tensor:
    """Word numbers (B, MAX_WORDS), 0 where a prompt has ended; what follows the last place is cut off."""
    rows = [[_INDEX.get(word, 1) for word in prompt.lower().split() if word not in _IGNORED][:MAX_WORDS] for prompt in prompts]
    return torch.tensor([row + [0] * (MAX_WORDS - len(row)) for row in rows]).reshape(len(rows), MAX_WORDS)


class EmbeddedReward(nn.Module):
    """An image tower and a text tower whose vectors are compared."""

    def __init__(self, image_tower: nn.Module, text_tower: nn.Module):
        super().__init__()
        self.image_tower, self.text_tower = image_tower, text_tower

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of images (B, 3, H, W) in [0, 1]; other sizes than 32 are resized."""
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            images = functional.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)
        return functional.normalize(self.image_tower(2 * images - 1), dim=1)

    def embed_words(self, numbers: Tensor) -> Tensor:
        """Unit vectors (B, D) of word numbers (B, MAX_WORDS)."""
        return functional.normalize(self.text_tower(numbers), dim=1)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The cosine (B,) of each image and its prompt; gradients flow to the images."""
        with torch.no_grad():
            texts = self.embed_words(send(words(prompts), images))
        return (self.embed_images(images.float()) * texts).sum(1)


def new_reward(kind: EmbeddedKind) -> EmbeddedReward:
    """A reward with random weights."""
    if kind == "embedded":
        return EmbeddedReward(_ConvTower(dim=128), _TransformerTower(dim=128))
    return EmbeddedReward(_DepthwiseTower(dim=96), _RecurrentTower(dim=96))


def load_reward(kind: EmbeddedKind, file: Path, key: str) -> EmbeddedReward:
    """The reward with the weights in a file, frozen."""
    return load_module(new_reward(kind), read(file, key), key)


def save_reward(reward: EmbeddedReward, kind: EmbeddedKind, path: Path) -> None:
    """Float16 weights to `path`/<kind>.safetensors."""
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in reward.state_dict().items()}, path / f"{kind}.safetensors")


class _ConvTower(nn.Sequential):
    def __init__(self, dim: int):
        blocks = [
            module
            for num_in, num_out, stride in ((3, 24, 1), (24, 48, 2), (48, 64, 1), (64, 96, 2), (96, 96, 2))
            for module in (nn.Conv2d(num_in, num_out, 3, stride, 1), nn.GroupNorm(8, num_out), nn.SiLU())
        ]
        super().__init__(*blocks, nn.Flatten(), nn.Linear(96 * 4 * 4, 256), nn.SiLU(), nn.Linear(256, dim))


class _DepthwiseTower(nn.Sequential):
    """2x2 patches, then residual blocks of a 5x5 depthwise convolution and two 1x1 ones, pooled to one vector for each of 16 regions."""

    def __init__(self, dim: int):
        super().__init__(
            nn.Conv2d(3, 64, 2, 2),
            _DepthwiseBlock(64),
            _DepthwiseBlock(64),
            nn.Conv2d(64, 128, 2, 2),
            _DepthwiseBlock(128),
            _DepthwiseBlock(128),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(128 * 4 * 4, dim),
        )


class _DepthwiseBlock(nn.Module):
    def __init__(self, num: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(num, num, 5, padding=2, groups=num),
            nn.GroupNorm(1, num),
            nn.Conv2d(num, 2 * num, 1),
            nn.GELU(),
            nn.Conv2d(2 * num, num, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class _TransformerTower(nn.Module):
    def __init__(self, dim: int, width: int = 96):
        super().__init__()
        self.words = nn.Embedding(len(_WORDS) + 2, width)
        self.positions = nn.Parameter(0.02 * torch.randn(MAX_WORDS, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width, dim)

    def forward(self, numbers: Tensor) -> Tensor:
        empty = numbers == 0
        empty = empty & ~empty.all(1, keepdim=True)  # attention to nothing is not a number
        hidden = self.layers(self.words(numbers) + self.positions, src_key_padding_mask=empty)
        return self.out((hidden * ~empty[:, :, None]).sum(1))


class _RecurrentTower(nn.Module):
    def __init__(self, dim: int, width: int = 96):
        super().__init__()
        self.words = nn.Embedding(len(_WORDS) + 2, width, padding_idx=0)
        self.layers = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.out = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, dim))

    def forward(self, numbers: Tensor) -> Tensor:
        states, _ = self.layers(self.words(numbers))
        return self.out(states.masked_fill((numbers == 0)[:, :, None], -1.0).amax(1))
