"""Procedural captioned scenes: one or two coloured shapes on a clouded background, 32 by 32 pixels.

The embedded teacher was trained on them and the demo distils on them. A scene is a pure function of (seed, index), so the
data set has no files, no end and no epoch.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hyper_sd.randomness import uniforms

IMAGE_SIZE = 32
SHAPES = ("circle", "square", "triangle", "ring", "cross")
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.12),
    "green": (0.12, 0.66, 0.22),
    "blue": (0.16, 0.36, 0.95),
    "yellow": (0.96, 0.86, 0.10),
    "purple": (0.60, 0.16, 0.74),
    "orange": (0.98, 0.52, 0.06),
    "cyan": (0.12, 0.82, 0.86),
    "white": (0.97, 0.97, 0.97),
}
BACKGROUNDS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {  # the dark and the light parts of the clouds
    "black": ((0.00, 0.00, 0.00), (0.26, 0.26, 0.26)),
    "gray": ((0.36, 0.36, 0.36), (0.72, 0.72, 0.72)),
    "pink": ((0.82, 0.42, 0.56), (0.99, 0.76, 0.83)),
    "brown": ((0.20, 0.11, 0.04), (0.62, 0.42, 0.24)),
    "navy": ((0.01, 0.02, 0.12), (0.14, 0.26, 0.62)),
}
NUM_PLACES = len(PLACES)
NUM_CLOUDS = 8  # points a side
EMPTY = len(SHAPES)  # the shape label of a place without an object

_RADIUS = (3.7, 6.4)  # pixels, by size
_POSITION_JITTER = (2.4, 1.0)  # pixels to either side, by size
_RADIUS_JITTER = 0.06  # relative
_COLOR_JITTER = 0.03  # per channel
_CLOUD_CONTRAST = 0.28  # standard deviation at their points, 1 is from dark to light
_TWO_OBJECTS = 0.65  # share of scenes with two objects


@dataclass(frozen=True)
class Scenes:
    """A batch of B scenes. Labels are integer arrays; an empty place has shape label EMPTY and colour and size 0.

    shape, color, size: (B, 4), one column a place; background: (B,); jitter: (B, 4, 6) uniform in [-1, 1] for x, y, radius and
    colour; clouds: (B, 8, 8) standard normal, how light the background is around 64 points; first: (B,) the place that the caption
    names first. What a caption leaves open is continuous: jitter and clouds.
    """

    shape: np.ndarray
    color: np.ndarray
    size: np.ndarray
    background: np.ndarray
    jitter: np.ndarray
    clouds: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.background)

    def labels(self) -> Tensor:
        """All attributes as one integer tensor (B, 13): shape x4, color x4, size x4, background."""
        return torch.from_numpy(np.concatenate([self.shape, self.color, self.size, self.background[:, None]], axis=1).astype(np.int64))

    def rows(self, index: np.ndarray) -> "Scenes":
        """Some of the scenes."""
        return Scenes(*(getattr(self, item.name)[index] for item in fields(self)))


def sample_scenes(seed: int, index: np.ndarray) -> Scenes:
    """Draw the scenes with the given global indices, shape (B,); scene i depends on (seed, index[i]) alone."""
    u = uniforms((seed, 0x5CE4E), np.asarray(index), 9 + 6 * NUM_PLACES)
    batch, rows = len(u), np.arange(len(u))
    first = _choice(u[:, 0], NUM_PLACES)
    second = (first + 1 + _choice(u[:, 1], NUM_PLACES - 1)) % NUM_PLACES
    shape = np.full((batch, NUM_PLACES), EMPTY)
    color, size = np.zeros((2, batch, NUM_PLACES), dtype=np.int64)
    two = u[:, 2] < _TWO_OBJECTS
    for place, keep, column in ((first, np.ones(batch, dtype=bool), 3), (second, two, 6)):
        at = rows[keep], place[keep]
        shape[at] = _choice(u[keep, column], len(SHAPES))
        color[at] = _choice(u[keep, column + 1], len(COLORS))
        size[at] = _choice(u[keep, column + 2], len(SIZES))
    jitter = 2 * u[:, 9:].reshape(batch, NUM_PLACES, 6) - 1
    background = _choice(uniforms((seed, 0xBAC6), np.asarray(index), 1)[:, 0], len(BACKGROUNDS))
    quantile = torch.from_numpy(uniforms((seed, 0xC10D5), np.asarray(index), NUM_CLOUDS**2)).clamp(min=1e-12)
    clouds = torch.special.ndtri(quantile).reshape(batch, NUM_CLOUDS, NUM_CLOUDS).numpy()
    return Scenes(shape, color, size, background, jitter, clouds, first)


def captions(scenes: Scenes) -> list[str]:
    """One caption a scene, e.g. 'a large red circle at the top left and a small blue cross at the bottom right on a gray background'."""
    return [_caption(scenes, row) for row in range(len(scenes))]


def phrases(scenes: Scenes) -> list[list[str]]:
    """Of every scene, what its caption calls each object, in that order."""
    return [[_phrase(scenes, row, place) for place in _places(scenes, row)] for row in range(len(scenes))]


def render(scenes: Scenes) -> Tensor:
    """Draw the scenes with anti-aliased edges: float32 (B, 3, 32, 32) in [0, 1]."""
    image = _background(scenes)
    palette = torch.tensor(list(COLORS.values()))
    jitter = torch.from_numpy(scenes.jitter).float()
    for place in range(NUM_PLACES):
        color = palette[torch.from_numpy(scenes.color[:, place])] + _COLOR_JITTER * jitter[:, place, 3:]
        image = image + _object(scenes, place)[:, None] * (color.clamp(0, 1)[:, :, None, None] - image)
    return image


def masks(scenes: Scenes) -> Tensor:
    """Which share of each pixel `render` draws of the object at each place: float32 (B, 4, 32, 32), 0 where there is none."""
    return torch.stack([_object(scenes, place) for place in range(NUM_PLACES)], dim=1)


def _object(scenes: Scenes, place: int) -> Tensor:
    """The share of each pixel that the object at a place covers, (B, 32, 32); 0 where there is none."""
    axis = torch.arange(IMAGE_SIZE) + 0.5
    y, x = axis[:, None], axis[None, :]
    jitter = torch.from_numpy(scenes.jitter[:, place]).float()
    shape, size = torch.from_numpy(scenes.shape[:, place]), torch.from_numpy(scenes.size[:, place])
    spread = torch.tensor(_POSITION_JITTER)[size]
    half = IMAGE_SIZE / 4
    center_x = half * (1 + 2 * (place % 2)) + spread * jitter[:, 0]
    center_y = half * (1 + 2 * (place // 2)) + spread * jitter[:, 1]
    radius = torch.tensor(_RADIUS)[size] * (1 + _RADIUS_JITTER * jitter[:, 2])
    coverage = _coverage(x - center_x[:, None, None], y - center_y[:, None, None], radius[:, None, None], shape)
    return coverage * (shape != EMPTY)[:, None, None]


def _background(scenes: Scenes) -> Tensor:
    """Between the dark and the light of the background's colour as its clouds say, interpolated between their points; (B, 3, 32, 32)."""
    dark, light = torch.tensor(list(BACKGROUNDS.values()))[torch.from_numpy(scenes.background)][..., None, None].unbind(1)
    clouds = torch.from_numpy(scenes.clouds).float()[:, None]
    clouds = functional.interpolate(clouds, size=IMAGE_SIZE, mode="bilinear")
    return torch.lerp(dark, light, (0.5 + _CLOUD_CONTRAST * clouds).clamp(0, 1))


def _coverage(dx: Tensor, dy: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Share of each pixel that the shape covers, from its signed distance in pixels (negative inside); (B, 32, 32)."""
    circle = (dx.square() + dy.square()).sqrt() - radius
    square = torch.maximum(dx.abs(), dy.abs()) - 0.86 * radius
    slope = torch.tensor(0.5)  # an upright triangle: base 2 * radius wide, 2 * radius high
    sides = (dx.abs() - slope * (dy + radius)) / (1 + slope.square()).sqrt()
    triangle = torch.maximum(sides, dy - 0.92 * radius)
    ring = torch.maximum(circle, 0.56 * radius - (dx.square() + dy.square()).sqrt())
    bar = 0.30 * radius
    cross = torch.minimum(torch.maximum(dx.abs() - bar, dy.abs() - radius), torch.maximum(dy.abs() - bar, dx.abs() - radius))
    distance = torch.stack([circle, square, triangle, ring, cross, circle])
    return (0.5 - distance[shape, torch.arange(len(shape))]).clamp(0, 1)


def _caption(scenes: Scenes, row: int) -> str:
    objects = " and ".join(_phrase(scenes, row, place) for place in _places(scenes, row))
    return f"{objects} on a {list(BACKGROUNDS)[scenes.background[row]]} background"


def _places(scenes: Scenes, row: int) -> list[int]:
    """The places of objects, the one that is named first before the others."""
    places = [place for place in range(NUM_PLACES) if scenes.shape[row, place] != EMPTY]
    return sorted(places, key=lambda place: place != scenes.first[row])


def _phrase(scenes: Scenes, row: int, place: int) -> str:
    size, color, shape = SIZES[scenes.size[row, place]], list(COLORS)[scenes.color[row, place]], SHAPES[scenes.shape[row, place]]
    return f"a {size} {color} {shape} at the {PLACES[place]}"


def _choice(u: np.ndarray, num: int) -> np.ndarray:
    return np.minimum((u * num).astype(np.int64), num - 1)
