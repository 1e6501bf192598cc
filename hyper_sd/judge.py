"""The judge: a small classifier of every attribute of a procedural scene. It is used in evaluation only, never in training."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hyper_sd.data.scenes import BACKGROUNDS, COLORS, EMPTY, NUM_PLACES, SHAPES, SIZES

ATTRIBUTE_SIZES = (len(SHAPES) + 1,) * NUM_PLACES + (len(COLORS),) * NUM_PLACES + (len(SIZES),) * NUM_PLACES + (len(BACKGROUNDS),)
NUM_FEATURES = 64
_NUM_HIDDEN = 96
_POOLED_LAYERS = 9  # three blocks of convolution, norm and ReLU
WEIGHTS = "judge.safetensors"


class Judge(nn.Module):
    """Images (B, 3, 32, 32) in [0, 1] to the logits of the 13 attributes, and to features for a Fréchet distance.

    The features are those of a classifier's middle, as the Inception features of FID are pooled ones: its last layer is trained not
    to see what does not matter for the attributes, such as blur and blotches.
    """

    feature_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *_block(3, 32, stride=1),
            *_block(32, 48, stride=2),
            *_block(48, NUM_FEATURES, stride=1),
            *_block(NUM_FEATURES, 64, stride=2),
            nn.Flatten(),
        )
        self.to_hidden = nn.Sequential(nn.Linear(64 * 8 * 8, _NUM_HIDDEN), nn.ReLU())
        self.to_logits = nn.Linear(_NUM_HIDDEN, sum(ATTRIBUTE_SIZES))
        self.register_buffer("feature_std", torch.ones(NUM_FEATURES))

    def features(self, images: Tensor) -> Tensor:
        """(B, 64): the mean over positions of the third block's activations, each of unit variance on renders."""
        return self.maps(images).mean((2, 3)) / self.feature_std

    def maps(self, images: Tensor) -> Tensor:
        """The third block's activations, (B, 64, 16, 16)."""
        return self.convs[:_POOLED_LAYERS](2 * images - 1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.to_logits(self.to_hidden(self.convs(2 * images - 1))).split(ATTRIBUTE_SIZES, dim=1)

    @torch.no_grad()
    def attributes(self, images: Tensor) -> Tensor:
        """The most likely value of every attribute, (B, 13), in the order of `Scenes.labels`."""
        return torch.stack([logits.argmax(dim=1) for logits in self(images)], dim=1)

    @classmethod
    def load(cls, path: Path) -> "Judge":
        judge = cls()
        judge.load_state_dict({name: value.float() for name, value in load_file(path / WEIGHTS).items()})
        return judge.eval().requires_grad_(False)

    def save(self, path: Path, facts: Mapping[str, float]) -> None:
        path.mkdir(parents=True, exist_ok=True)
        save_file({name: value.half().contiguous() for name, value in self.state_dict().items()}, path / WEIGHTS)
        (path / "judge.json").write_text(json.dumps(facts, indent=2) + "\n")


def all_right(found: Tensor, wanted: Tensor) -> Tensor:
    """Whether every attribute is right, (B,) bool. Colour and size of a place count only where an object is wanted."""
    present = wanted[:, :NUM_PLACES] != EMPTY
    counts = torch.cat([torch.ones_like(present), present, present, torch.ones_like(present[:, :1])], dim=1)
    return ((found == wanted) | ~counts).all(dim=1)


def _block(num_in: int, num_out: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(num_in, num_out, 3, stride, 1), nn.GroupNorm(8, num_out), nn.ReLU()
