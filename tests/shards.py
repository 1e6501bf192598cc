"""Small data sets as files: pictures, folders, shards of images and of latents, some of them poison."""

import io
import json
import tarfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from hyper_sd.config import DataConfig
from hyper_sd.data import Samples, Source, build_source

Kind = Literal["scenes", "folder", "webdataset", "hf", "prompts"]


def source(kind: Kind, path: Path | str | None = None, *, seed: int = 0, image_size: int = 32, num_workers: int = 0) -> Source:
    cfg = DataConfig(kind=kind, batch_size=4, path=None if path is None else str(path), num_workers=num_workers)
    return build_source(cfg, seed=seed, image_size=image_size)


def write_latents(folder: Path, *, num: int, bad: Collection[int]) -> tuple[str, str]:
    """A shard of latents, those in `bad` so large that the network overflows; the overrides that train on it."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "latents.tar", "w") as archive:
        for number in range(num):
            latent = np.random.default_rng(number).standard_normal((4, 8, 8), dtype=np.float32)
            buffer = io.BytesIO()
            np.save(buffer, np.full_like(latent, 1e30) if number in bad else latent)
            for suffix, content in (("latent.npy", buffer.getvalue()), ("txt", f"sample {number}".encode())):
                member = tarfile.TarInfo(f"{number:03}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return "data=webdataset", f"data.path={folder / 'latents.tar'}"


def write_photo(file: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(file)
    file.with_suffix(".txt").write_text("a red square")


def picture(width: int = 40, height: int = 32, color: tuple[int, int, int] = (200, 100, 50)) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format={"jpg": "jpeg"}.get(kind, kind), **options)
    return file.getvalue()


def npy(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def image_folder(path: Path, num: int) -> Path:
    """Images whose red channel is their number, captioned by it."""
    path.mkdir(parents=True, exist_ok=True)
    for number in range(num):
        picture(color=(number, 0, 0)).save(path / f"{number:03}.png")
        (path / f"{number:03}.txt").write_text(f"number {number}\n")
    return path


def image_shard(path: Path, numbers: range) -> Path:
    members = {f"{n:03}.png": encoded(picture(color=(n, 0, 0))) for n in numbers}
    return write_tar(path, members | {f"{n:03}.txt": f"number {n}".encode() for n in numbers})


def latent_shard(path: Path, numbers: range) -> Path:
    members = {f"set/{n:03}.latent.npy": npy(np.full((4, 8, 8), n, dtype=np.float16)) for n in numbers}
    return write_tar(path, members | {f"set/{n:03}.json": json.dumps({"text": f"number {n}"}).encode() for n in numbers})


def number_of(samples: Samples) -> list[int]:
    """The numbers that images or latents carry."""
    if samples.latents is not None:
        return samples.latents[:, 0, 0, 0].int().tolist()
    assert samples.images is not None
    return (samples.images[:, 0, 0, 0] * 255).round().int().tolist()
