"""CLIP score: how well an image fits its prompt.

score = 100 cos(image, prompt), not cut at 0, so that a bad fit has a gradient too (Hessel et al. 2021, with 100 instead of 2.5).
Range: -100 to 100; pictures that fit have about 20 to 35 with ViT-L/14.
Default alpha: 35 (ours): above what good pictures have, so that the hinge stays open.
Licence: MIT (openai/clip-vit-large-patch14).
Memory: 1.7 GB in float32, the text model included; shared with `aesthetic` on the same files.
"""

from collections.abc import Sequence

from torch import Tensor

from hyper_sd.rewards.base import TowerReward
from hyper_sd.rewards.clip import ClipTower


class ClipScore(TowerReward[ClipTower]):
    def score_embedded(self, embedded: Tensor, prompts: Sequence[str]) -> Tensor:
        return 100 * self.tower.cosines(embedded, prompts)
