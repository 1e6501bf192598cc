"""Reading image files as tensors."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_FORMATS = ("JPEG", "PNG", "WEBP")


def read_image(file: Path | BinaryIO, name: str, image_size: int) -> Tensor:
    """An image file as float32 (3, image_size, image_size) in [0, 1].

    It is turned upright by its EXIF orientation, converted to RGB, resized so that the shorter side fits, and cropped at the
    centre. Raises ValueError naming data.path and the file `name` if it cannot be decoded.
    """
    try:
        with Image.open(file, formats=_FORMATS) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"data.path: the image {name} cannot be read: {error}") from error
    scale = image_size / min(image.size)
    width, height = (max(image_size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    pixels = np.asarray(image.crop((left, top, left + image_size, top + image_size)), dtype=np.float32)
    return torch.from_numpy(pixels / 255).permute(2, 0, 1)
