"""Prepared data for the tiny teacher, some of it poison."""

import io
import tarfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image


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
