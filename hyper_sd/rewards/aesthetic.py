"""LAION's aesthetic predictor v2: how beautiful people rate an image, whatever the prompt says.

score = head(unit CLIP ViT-L/14 embedding), the head trained on ratings of SAC, LAION-Logos and AVA.
Range: 1 to 10, the scale of the ratings; images of diffusion models have about 5 to 6.5.
Default alpha: 6.5 (ours): a little above what good images have. The Hyper-SD paper uses this predictor and is silent on alpha.
Licence: Apache-2.0 (improved-aesthetic-predictor), MIT (openai/clip-vit-large-patch14).
Memory: 1.7 GB in float32 for the CLIP model, shared with `clip_score` on the same files; 4 MB for the head.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hyper_sd.config import RewardConfig
from hyper_sd.rewards.base import TowerReward
from hyper_sd.rewards.clip import ClipTower
from hyper_sd.rewards.head import load_head
from hyper_sd.rewards.weights import find, read


class Aesthetic(TowerReward[ClipTower]):
    def __init__(self, tower: ClipTower, head: Any):
        super().__init__(tower)
        self._head = head

    def score_embedded(self, embedded: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._head(embedded).squeeze(1)


def load_aesthetic(config: RewardConfig, tower: ClipTower, key: str) -> Aesthetic:
    """The head in the file of `config`, on a tower that is already loaded."""
    head = load_head(read(find(config, key), key), tower.model.config.projection_dim, key)
    return Aesthetic(tower, head.to(tower.model.device))
