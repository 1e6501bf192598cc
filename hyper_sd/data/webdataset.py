"""Samples in tar shards, the layout of webdataset, read by position.

A sample is the members of one shard that share the name up to the first dot:

    <key>.jpg | .jpeg | .png | .webp     the image, or instead of it a prepared latent:
    <key>.latent.npy                     the scaled latent (C, h, w), a float array
    <key>.latent.safetensors             the tensor `latent` (C, h, w) and, optionally, `cond.0`, `cond.1`, ...: the teacher's
                                         condition of the caption, in its order, without a batch dimension
    <key>.txt                            the caption, or instead of it
    <key>.json                           an object whose `text` is the caption or a list of them

The caption may be missing only where the condition is there. Other members are not read. One name in two shards is two samples.
Shards are uncompressed tar files; each is walked once for its member headers, and a sample is then a few reads at known offsets.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from hyper_sd.data import captions, tar
from hyper_sd.data.base import BadSample, BadSampleError, Rows, Samples, SourceDefaults, pick_caption, threaded_map
from hyper_sd.data.images import IMAGE_SUFFIXES, Placed, decode, place
from hyper_sd.data.order import EpochOrder
from hyper_sd.data.tar import TarSample
from hyper_sd.guidance import Cond


@dataclass(frozen=True)
class _Row:
    name: str
    caption: str
    image: Placed | None = None
    latent: Tensor | None = None
    cond: Cond | None = None


class WebDatasetSource(SourceDefaults):
    """Samples of the shards that `path` names, images at one square size; see `hyper_sd.data.tar.shards` for what it may be."""

    def __init__(self, path: str, seed: int, image_size: int, num_workers: int = 0, caption_column: str = "text", min_side: int = 0):
        walked = list(threaded_map(num_workers)(tar.samples, tar.shards(path)))
        self._samples: list[TarSample] = [sample for samples, _ in walked for sample in samples]
        self.bad: Sequence[BadSample] = [sample for _, bad in walked for sample in bad]
        if not self._samples:
            raise ValueError(f"data.path={path} holds no sample" + (f" (first: {self.bad[0]})" if self.bad else ""))
        prepared = {sample.one_of(tar.LATENTS) is not None for sample in self._samples}
        if len(prepared) > 1:
            raise ValueError(f"data.path={path}: some samples are prepared latents and some are images; use one kind")
        self.num_samples = len(self._samples)
        self._seed, self._image_size, self._caption_column, self._min_side = seed, image_size, caption_column, min_side
        self._rows = Rows(EpochOrder(self.num_samples, seed), num_workers)

    def batch(self, positions: Sequence[int]) -> Samples:
        rows, bad = self._rows.read(self._read, positions)
        texts, names = [row.caption for row in rows], tuple(row.name for row in rows)
        placed = [row.image for row in rows if row.image is not None]
        if placed:
            sizes = torch.tensor([image.sizes for image in placed], dtype=torch.float32)
            return Samples(texts, images=torch.stack([image.tensor() for image in placed]), sizes=sizes, bad=bad, names=names)
        latents = _stack([row.latent for row in rows])
        if all(row.cond is None for row in rows):
            return Samples(texts, latents=latents, bad=bad, names=names)
        counts = {len(row.cond or ()) for row in rows}
        if len(counts) > 1:
            raise ValueError("data.path: samples of one batch differ in their prepared conditions; prepare all alike")
        conds = tuple(_stack([row.cond[part] if row.cond else None for row in rows]) for part in range(counts.pop()))
        return Samples(texts, latents=latents, conds=conds, bad=bad, names=names)

    def _read(self, index: int, position: int) -> _Row:
        sample = self._samples[index]
        latent = sample.one_of(tar.LATENTS)
        if latent is None:
            image = decode(io.BytesIO(read_image_bytes(sample)), str(sample), self._min_side)
            return _Row(str(sample), self._caption(sample, position), image=place(image, self._image_size, self._image_size))
        tensors = _read_latent(sample, latent)
        cond = tuple(tensors[f"cond.{part}"].float() for part in range(len(tensors) - 1)) or None
        prepared = cond is not None and sample.one_of(tar.CAPTIONS) is None
        return _Row(str(sample), "" if prepared else self._caption(sample, position), latent=tensors["latent"].float(), cond=cond)

    def _caption(self, sample: TarSample, position: int) -> str:
        texts = read_captions(sample, self._caption_column)
        return texts[pick_caption(texts, self._seed, position)]


def read_image_bytes(sample: TarSample, shard: str | None = None) -> bytes:
    """The image file of a sample, from a copy of its shard where one is named."""
    kind = sample.one_of(IMAGE_SUFFIXES)
    if kind is None:
        raise BadSampleError(str(sample), "no image")
    return sample.read(kind, shard)


def read_captions(sample: TarSample, column: str, shard: str | None = None) -> tuple[str, ...]:
    """The captions of a sample; raises BadSampleError."""
    kind = sample.one_of(tar.CAPTIONS)
    if kind is None:
        raise BadSampleError(str(sample), captions.NO_CAPTION, "and no prepared condition")
    data = sample.read(kind, shard)
    return captions.from_text(data, str(sample)) if kind == "txt" else captions.from_json(data, str(sample), column)


def _read_latent(sample: TarSample, kind: str) -> dict[str, Tensor]:
    """{"latent": (C, h, w)} and, where they are prepared, cond.0, cond.1, ..."""
    data = sample.read(kind)
    try:
        if kind == "latent.npy":
            tensors = {"latent": torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))}
        else:
            tensors = safetensors.torch.load(data)
    except (ValueError, TypeError, EOFError, SafetensorError) as error:
        raise BadSampleError(str(sample), "unreadable latent", error) from error
    names = ["latent", *(f"cond.{part}" for part in range(len(tensors) - 1))]
    if sorted(tensors) != sorted(names) or tensors["latent"].ndim != 3 or not tensors["latent"].is_floating_point():
        shapes = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()}
        raise BadSampleError(str(sample), "must hold a float `latent` (C, h, w), then `cond.0`, `cond.1`, ...", f"got {shapes}")
    require_finite(tensors, str(sample))
    return tensors


def require_finite(tensors: dict[str, Tensor], name: str) -> None:
    """Raises BadSampleError for a tensor with a value that is not finite."""
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BadSampleError(name, "not finite", key)


def _stack(tensors: Sequence[Tensor | None]) -> Tensor:
    shapes = {None if tensor is None else tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"data.path: prepared tensors of one batch have the shapes {shapes}; prepare all samples at one size")
    return torch.stack([tensor for tensor in tensors if tensor is not None])
