"""Metrics of images beside the judge's: reward models, distances of features to a reference, and diversity between seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hyper_sd.commands import DISTANCES, DIVERSITY, MetricsConfig
from hyper_sd.extractors import Extractor, build_extractor, check_extractor
from hyper_sd.metrics import Gaussian, Jackknifed, frechet_jackknife, mean_and_error, mean_of_draws
from hyper_sd.mmd import Mmd
from hyper_sd.processes import Processes
from hyper_sd.rewards import Rewards, build_rewards, check_rewards

_CHUNK = 32  # images scored at once
_REAL = 512  # real images in memory at once
_FEATURES = "features"
Measured = dict[str, Tensor]  # of every image of a draw: its scores (B,) by reward, and its features (B, D)


@dataclass(frozen=True)
class Figure:
    """A metric's value over all draws; of a reward also its score of every image."""

    value: float
    standard_error: float | None
    scores: Tensor | None = None

    def to_json(self) -> dict[str, float | None]:
        return {"value": self.value, "standard_error": self.standard_error}


@dataclass(frozen=True)
class ImageMetrics:
    """What `metrics` names. Every process measures its share of the images and then holds the same figures.

    `distances` measure the features (B, D) of a draw against those of the reference.
    """

    cfg: MetricsConfig
    rewards: Rewards
    extract: Extractor | None
    distances: Mapping[str, Callable[[Tensor], Jackknifed]]
    processes: Processes

    def measure(self, images: Tensor, prompts: Sequence[str], total: int) -> Measured:
        """Of a whole draw of `total` images, from this process's share of them."""
        names = [*self.rewards.rewards, *([_FEATURES] if self.distances else [])]
        chunks = [self._chunk(images[start : start + _CHUNK], prompts[start : start + _CHUNK]) for start in range(0, len(images), _CHUNK)]
        return {name: self.processes.join(torch.cat([chunk[name] for chunk in chunks]), total) for name in names}

    def features(self, images: Tensor, total: int) -> Tensor:
        """Features (total, D) of all images, from this process's share."""
        assert self.extract is not None
        return self.processes.join(extracted(self.extract, images, self.processes.device), total)

    def figures(self, draws: Sequence[Measured], seeds: Tensor | None = None) -> dict[str, Figure]:
        """Every metric over all draws; `seeds` (S, P, D) are features of P prompts drawn S times."""
        figures = {name: Figure(*mean_and_error(scores), scores) for name, scores in self.scores(draws).items()}
        for name, distance in self.distances.items():
            mean = mean_of_draws([distance(draw[_FEATURES]) for draw in draws])
            figures[name] = Figure(mean.value, mean.standard_error)
        if seeds is not None:
            figures[DIVERSITY] = Figure(*mean_and_error(diversity(seeds)))
        return {name: figures[name] for name in self.cfg.names}

    def scores(self, draws: Sequence[Measured]) -> dict[str, Tensor]:
        """Of every reward, its scores of the images of all draws."""
        return {name: torch.cat([draw[name] for draw in draws]) for name in self.rewards.rewards}

    @torch.inference_mode()
    def _chunk(self, images: Tensor, prompts: Sequence[str]) -> Measured:
        measured = self.rewards.scores(images.to(self.processes.device), prompts)
        if self.distances:
            assert self.extract is not None
            measured[_FEATURES] = extracted(self.extract, images, self.processes.device)
        return {name: value.cpu() for name, value in measured.items()}


def diversity(features: Tensor) -> Tensor:
    """1 - the mean cosine of pairs among S images of one prompt: (P,) of features (S, P, D); 0 where all seeds draw one image."""
    num = len(features)
    total = torch.nn.functional.normalize(features.double(), dim=2).sum(0)
    return 1 - (total.square().sum(1) - num) / (num * (num - 1))


def check_metrics(cfg: MetricsConfig, image_size: int) -> None:
    """Raise ValueError, naming the key, for what cannot be measured. No weight is loaded."""
    check_rewards(cfg.chosen_rewards)
    if cfg.extractor is not None:
        check_extractor(cfg.extractor, image_size)


def open_metrics(cfg: MetricsConfig, real: Callable[[np.ndarray], Tensor], num_real: int, processes: Processes) -> ImageMetrics:
    """Load what is measured with. `real` makes images (B, 3, H, W) of indices (B,); distances are to `num_real` of them."""
    rewards = build_rewards(cfg.chosen_rewards, processes.device)
    extract = None if cfg.extractor is None else build_extractor(cfg.extractor, processes.device)
    names = [name for name in cfg.names if name in DISTANCES]
    distances: dict[str, Callable[[Tensor], Jackknifed]] = {}
    if names:
        assert extract is not None
        reference = reference_features(extract, real, num_real, processes)
        distances = {name: _distance(name, reference) for name in names}
    return ImageMetrics(cfg, rewards, extract, distances, processes)


def _distance(name: str, reference: Tensor) -> Callable[[Tensor], Jackknifed]:
    if name == "fid":
        return partial(frechet_jackknife, reference=Gaussian.fit(reference))
    return {"kid": Mmd.kid, "cmmd": Mmd.cmmd}[name](reference).jackknife


def reference_features(
    extract: Extractor, real: Callable[[np.ndarray], Tensor], num: int, processes: Processes, chunk: int = _CHUNK
) -> Tensor:
    """Features (num, D) of real images 0 to num - 1; every process makes its share of them, `chunk` images at once."""
    share = range(num)[processes.share(num)]
    starts = range(share.start, share.stop, _REAL)
    parts = [extracted(extract, real(np.arange(start, min(start + _REAL, share.stop))), processes.device, chunk) for start in starts]
    return processes.join(torch.cat(parts), num)


@torch.inference_mode()
def extracted(extract: Extractor, images: Tensor, device: torch.device, chunk: int = _CHUNK) -> Tensor:
    """Float32 features (B, D) on the CPU, of `chunk` images at once."""
    return torch.cat([extract(some.to(device)).float().cpu() for some in images.split(chunk)])
