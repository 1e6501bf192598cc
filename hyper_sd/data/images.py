"""Reading image files, and placing them in a size with what SDXL is told about it."""

import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from hyper_sd.data.base import BadSampleError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 89_478_485  # Pillow's own limit; a small file can hold a picture that fills the memory
_FORMATS = ("JPEG", "PNG", "WEBP")
_UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such an image is refused and listed here


@dataclass(frozen=True)
class Placed:
    """An image (height, width, 3), uint8, cut to a size.

    sizes: original height and width, top and left of the crop in the resized image, height and width; SDXL's time ids.
    """

    pixels: np.ndarray
    sizes: tuple[int, int, int, int, int, int]

    def tensor(self) -> Tensor:
        """Float32 (3, height, width) in [0, 1]."""
        return torch.from_numpy(self.pixels.astype(np.float32) / 255).permute(2, 0, 1)


def decode(file: Path | BinaryIO, name: str, min_side: int = 0) -> Image.Image:
    """The image upright by its EXIF orientation, in 8-bit RGB: of an animation the first frame, of transparency what is on white.

    Raises BadSampleError if it is none, is cut, or has more than MAX_PIXELS or a side below min_side, which are told before any pixel
    is decoded.
    """
    try:
        with Image.open(file, formats=_FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise BadSampleError(name, "too many pixels", f"{opened.width} x {opened.height}")
            if min(opened.size) < min_side:
                raise BadSampleError(name, "too small", f"{opened.width} x {opened.height}, data.min_side={min_side}")
            return _rgb(_upright(opened))
    except Image.DecompressionBombError as error:
        raise BadSampleError(name, "too many pixels", error) from error
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, OverflowError, struct.error) as error:
        if isinstance(error, BadSampleError):
            raise
        raise BadSampleError(name, "unreadable image", error) from error


def place(image: Image.Image, height: int, width: int) -> Placed:
    """Resized until it covers the size, then cropped at the centre."""
    cut, top, left = _placed(image, height, width, Image.Resampling.LANCZOS)
    return Placed(np.asarray(cut), (image.height, image.width, top, left, height, width))


def place_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """The same of a mask, bool: the pixels of which it covers at least half."""
    cut, _, _ = _placed(Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)), height, width, Image.Resampling.BOX)
    return np.asarray(cut) >= 128


def _placed(image: Image.Image, height: int, width: int, resampling: Image.Resampling) -> tuple[Image.Image, int, int]:
    """The image in its size, and top and left of the crop."""
    scale = max(height / image.height, width / image.width)
    resized = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    return image.resize(resized, resampling).crop((left, top, left + width, top + height)), top, left


def _upright(image: Image.Image) -> Image.Image:
    """ImageOps.exif_transpose would also write all tags anew, which one malformed tag makes impossible."""
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would cut off what is above 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
