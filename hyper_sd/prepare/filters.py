"""What is kept, and at which size."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from hyper_sd.commands import BucketsConfig, FilterConfig
from hyper_sd.data.base import BadSample, BadSampleError
from hyper_sd.data.images import Placed, place
from hyper_sd.prepare.inputs import Entry

_SHARPNESS_SIDE = 512  # images are compared at one size; a large picture has soft pixels

Size = tuple[int, int]


@dataclass(frozen=True)
class Candidate:
    """An entry that passed what can be told from the picture; placed is None where the teacher is to draw it."""

    number: int
    name: str
    captions: tuple[str, ...]
    placed: Placed | None
    size: Size


def buckets(image_size: int, cfg: BucketsConfig | None) -> list[Size]:
    """(height, width) of every bucket, of about the area image_size², or the square alone.

    The long side goes up in steps, the short side is the largest multiple of `step` that keeps the area, as with SDXL's training
    sizes (arXiv 2307.01952, section 2.3): with 1024 pixels, steps of 64 and ratios up to 4 from 512 x 2048 to 2048 x 512.
    """
    if cfg is None:
        return [(image_size, image_size)]
    if image_size % cfg.step:
        raise ValueError(f"buckets.step={cfg.step} must divide the teacher's image size of {image_size} pixels")
    sizes = {(image_size, image_size)}
    for long in range(image_size, int(image_size * math.sqrt(cfg.max_ratio)) + 1, cfg.step):
        short = image_size * image_size // long // cfg.step * cfg.step
        if short and long / short <= cfg.max_ratio:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest(width: int, height: int, sizes: list[Size]) -> Size:
    """The bucket whose aspect ratio is closest."""
    return min(sizes, key=lambda size: abs(math.log(width / height) - math.log(size[1] / size[0])))


def examine(entry: Entry, number: int, cfg: FilterConfig, sizes: list[Size]) -> Candidate | BadSample:
    """An entry decoded, judged and placed; or why not."""
    if isinstance(entry, BadSample):
        return entry
    if entry.image is None:
        return Candidate(number, entry.name, entry.captions, None, sizes[len(sizes) // 2])
    try:
        image = entry.image()
    except BadSampleError as error:
        return error.sample
    width, height = image.size
    if min(width, height) < cfg.min_side:
        return BadSample(entry.name, "filter: min_side", f"{width} x {height}")
    if cfg.max_ratio is not None and max(width, height) > cfg.max_ratio * min(width, height):
        return BadSample(entry.name, "filter: max_ratio", f"{width} x {height}")
    if cfg.min_sharpness > 0 and (value := sharpness(image)) < cfg.min_sharpness:
        return BadSample(entry.name, "filter: min_sharpness", f"{value:.4g}")
    size = nearest(width, height, sizes)
    return Candidate(number, entry.name, entry.captions, place(image, *size), size)


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian of the gray image, 0..255, its long side at most 512 pixels."""
    gray = image.convert("L")
    gray.thumbnail((_SHARPNESS_SIDE, _SHARPNESS_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(gray, dtype=np.float32)
    if min(pixels.shape) < 3:
        return 0.0
    centre = pixels[1:-1, 1:-1]
    return float((pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:] - 4 * centre).var())
