"""Every random draw is a pure function of integers, never of rank, micro-batch or call order.

A per-sample draw is keyed by (seed, step, global sample index, purpose), a batch-wide draw by (seed, step, purpose).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class Purpose(IntEnum):
    """What a draw is for; two purposes never share a stream. Values are part of every run's reproducibility: only append."""

    INIT = 0
    TIMESTEP = 1
    JUMP = 2
    NOISE = 3
    OFFSET_NOISE = 4
    GUIDANCE = 5
    DROP_CAPTION = 6
    EPOCH_ORDER = 8
    SAMPLE = 9
    FAKE_TIMESTEP = 10
    FAKE_NOISE = 11
    ROLLOUT = 12
    ROLLOUT_POSITION = 13
    ROLLOUT_NOISE = 14
    HEADS = 15
    ADVERSARIAL_TIMESTEP = 16
    ADVERSARIAL_NOISE = 17
    R1_NOISE = 18
    ODE_ROWS = 19
    TSCD_TERM = 20
    PERCEPTUAL_TERM = 21
    ADVERSARIAL_REAL = 22
    CAPTION = 40
    REPLACEMENT = 41
    BUCKET = 42
    MIX = 43


def _splitmix64(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def fold(*keys: int) -> int:
    """Hash integers to one 64-bit seed; unlike `hash()` it is the same in every process."""
    state = 0
    for key in keys:
        state = _splitmix64(state ^ (int(key) & _MASK))
    return state


def uniforms(keys: Sequence[int], index: np.ndarray, num: int) -> np.ndarray:
    """Uniform floats in [0, 1), shape (len(index), num), row i a function of (*keys, index[i]) alone."""
    with np.errstate(over="ignore"):
        state = np.uint64(fold(*keys)) ^ np.asarray(index, dtype=np.uint64)[:, None]
        state = _splitmix64_array(_splitmix64_array(state) ^ np.arange(num, dtype=np.uint64)[None])
    return (state >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def _splitmix64_array(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def generator(*keys: int) -> torch.Generator:
    """A CPU generator seeded by the fold of the keys, of which torch uses the low 32 bits; draw on the CPU so that devices agree."""
    return torch.Generator().manual_seed(fold(*keys))


def normal(keys: Sequence[int], samples: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal draws, float32 (len(samples), *shape), row i a function of (*keys, samples[i]) alone."""
    rows = [np.random.Generator(np.random.Philox(key=fold(*keys, i))).standard_normal(shape, dtype=np.float32) for i in samples]
    return torch.from_numpy(np.stack(rows))


def send(draw: Tensor, like: Tensor) -> Tensor:
    """A draw on the device of `like`. A plain copy to a GPU would first wait for all the work queued there."""
    if like.is_cuda:
        draw = draw.pin_memory()
    return draw.to(like.device, non_blocking=True)


@dataclass(frozen=True)
class Draws:
    """The random numbers of the samples with these global indices at one step; all on the CPU, one row a sample."""

    seed: int
    step: int
    samples: tuple[int, ...]

    def branch(self, purpose: Purpose) -> "Draws":
        """The same samples' draws for a part of a loss that uses purposes of the whole again."""
        return replace(self, seed=fold(self.seed, purpose))

    def uniform(self, purpose: Purpose) -> Tensor:
        """Uniform in [0, 1), float64 (B,)."""
        return torch.from_numpy(uniforms((self.seed, self.step, purpose), np.array(self.samples), 1)[:, 0])

    def choice(self, purpose: Purpose, num: int) -> int:
        """Batch-wide: one integer below `num` for the step, whatever the samples, and so the same in every process."""
        return fold(self.seed, self.step, purpose) % num

    def integers(self, purpose: Purpose, low: Tensor | int, high: Tensor | int) -> Tensor:
        """Uniform integers from low to high, both included, int64 (B,)."""
        width = torch.as_tensor(high) - torch.as_tensor(low) + 1
        return torch.as_tensor(low) + (self.uniform(purpose) * width).long()

    def normal(self, purpose: Purpose, shape: Sequence[int], *repeat: int) -> Tensor:
        """Standard normal, float32 (B, *shape); `repeat` tells apart several draws for one purpose."""
        return normal((self.seed, self.step, purpose, *repeat), self.samples, shape)
