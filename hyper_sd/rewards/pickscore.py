"""PickScore v1: what users of Pick-a-Pic chose of two images (Kirstain et al. 2023, arXiv 2305.01569).

score = exp(logit_scale) cos(image, prompt) of a CLIP ViT-H/14 trained on their choices; differences are log odds of a choice.
Range: logit_scale is 100, so -100 to 100; images of diffusion models have about 18 to 24.
Default alpha: 24 (ours): above what good images have, so that the hinge stays open.
Licence: MIT by the authors' repository; the model card names none.
Memory: 3.9 GB in float32, the text model included.
"""

from collections.abc import Sequence

from torch import Tensor

from hyper_sd.rewards.base import TowerReward
from hyper_sd.rewards.clip import ClipTower


class PickScore(TowerReward[ClipTower]):
    def score_embedded(self, embedded: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.tower.model.logit_scale.exp() * self.tower.cosines(embedded, prompts)
