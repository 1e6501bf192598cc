"""Samples in tar shards, the layout of webdataset, read by position.

A sample is the members of one shard that share the name up to the first dot:

    <key>.jpg | .jpeg | .png | .webp     the image, or instead of it a prepared latent:
    <key>.latent.npy                     the scaled latent (C, h, w), a float array
    <key>.latent.safetensors             the tensor `latent` (C, h, w) and, optionally, `cond.0`, `cond.1`, ...: the teacher's
                                         condition of the caption, in its order, without a batch dimension
    <key>.txt                            the caption, or instead of it
    <key>.json                           an object whose `text` is the caption

The caption may be missing only where the condition is there. Other members are not read. Shards are local, uncompressed tar
files; each is walked once for its member headers, and a sample is then a few reads at known offsets.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from webdataset.shardlists import expand_urls

from hyper_sd.data.base import EpochOrder, Samples, threaded_map
from hyper_sd.data.images import IMAGE_SUFFIXES, read_image
from hyper_sd.guidance import Cond

_LATENTS = ("latent.npy", "latent.safetensors")
_CAPTIONS = ("txt", "json")
_PICKLES = ("pickle", "pkl", "pyd", "pth", "pt", "bin", "ckpt", "joblib", "dill")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # a scheme has two letters at least; one letter is a drive


@dataclass(frozen=True, slots=True)
class _Member:
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class _Sample:
    """Where the members of a sample are, by what follows the key in their names."""

    shard: Path
    key: str
    members: dict[str, _Member]

    def __str__(self) -> str:
        return f"sample {self.key} of {self.shard}"

    def one_of(self, kinds: Sequence[str]) -> str | None:
        return next((kind for kind in kinds if kind in self.members), None)

    def read(self, kind: str) -> bytes:
        member = self.members[kind]
        with self.shard.open("rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
        if len(data) != member.size:
            raise ValueError(f"data.path: {self} ends early; the shard was cut or changed while it was in use")
        return data


@dataclass(frozen=True)
class _Row:
    caption: str
    image: Tensor | None = None
    latent: Tensor | None = None
    cond: Cond | None = None


class WebDatasetSource:
    """Samples of the shards that `path` names: a brace pattern such as `data/{0000..0099}.tar`, or several joined by `::`.

    Raises ValueError, naming data.path, for an address that is not a local file (`pipe:` and the like run commands), a broken
    shard, a member that points out of the shard or is a pickle, and samples without image, latent or caption.
    """

    def __init__(self, path: str, seed: int, image_size: int, num_workers: int = 0):
        self._samples = [sample for shard in _shards(path) for sample in _index(shard)]
        if not self._samples:
            raise ValueError(f"data.path={path} holds no sample")
        prepared = {sample.one_of(_LATENTS) is not None for sample in self._samples}
        if len(prepared) > 1:
            raise ValueError(f"data.path={path}: some samples are prepared latents and some are images; use one kind")
        self.num_samples = len(self._samples)
        self._image_size = image_size
        self._order = EpochOrder(self.num_samples, seed)
        self._map = threaded_map(num_workers)

    def batch(self, positions: Sequence[int]) -> Samples:
        samples = [self._samples[self._order.index(position)] for position in positions]
        rows: list[_Row] = list(self._map(self._read, samples))
        captions = [row.caption for row in rows]
        if rows[0].latent is None:
            return Samples(captions, images=torch.stack([row.image for row in rows if row.image is not None]))
        latents = _stack([row.latent for row in rows], samples)
        if all(row.cond is None for row in rows):
            return Samples(captions, latents=latents)
        counts = {len(row.cond or ()) for row in rows}
        if len(counts) > 1:
            raise ValueError(f"data.path: {samples[0]} and others of its batch differ in their prepared conditions; prepare all alike")
        conds = tuple(_stack([row.cond[part] if row.cond else None for row in rows], samples) for part in range(counts.pop()))
        return Samples(captions, latents=latents, conds=conds)

    def _read(self, sample: _Sample) -> _Row:
        image, latent = sample.one_of(IMAGE_SUFFIXES), sample.one_of(_LATENTS)
        if latent is not None:
            tensors = _read_latent(sample, latent)
            cond = tuple(tensors[f"cond.{part}"].float() for part in range(len(tensors) - 1)) or None
            return _Row(_read_caption(sample, needed=cond is None), latent=tensors["latent"].float(), cond=cond)
        assert image is not None, "samples were checked when the shard was indexed"
        return _Row(_read_caption(sample, needed=True), image=read_image(io.BytesIO(sample.read(image)), str(sample), self._image_size))


def _shards(path: str) -> list[Path]:
    for url in path.split("::"):
        if _URL.match(url):
            raise ValueError(f"data.path={path}: {url} is not a local file; download the shards and give their path, with no scheme")
    try:
        shards = [Path(name) for name in expand_urls(path)]
    except (AssertionError, ValueError) as error:  # unbalanced braces, or a ${...} that is not set
        raise ValueError(f"data.path={path} is not a pattern of paths: {error}") from error
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        raise ValueError(f"data.path={path}: {len(missing)} of {len(shards)} shards do not exist (first: {missing[0]})")
    return shards


def _index(shard: Path) -> list[_Sample]:
    """The samples of a shard in its order; a name or kind of member that no honest shard holds is refused."""
    samples: dict[str, _Sample] = {}
    for member in _headers(shard):
        name = PurePosixPath(member.name)
        stem, _, suffix = name.name.lower().partition(".")
        if name.is_absolute() or ".." in name.parts or not (member.isreg() or member.isdir()) or member.issparse():
            raise ValueError(f"data.path: {shard} holds {member.name!r}, which is no plain file inside the archive; the shard is refused")
        if suffix.rpartition(".")[2] in _PICKLES:
            raise ValueError(f"data.path: {shard} holds {member.name!r}; pickles can run code, the shard is refused")
        if stem and suffix in (*IMAGE_SUFFIXES, *_LATENTS, *_CAPTIONS) and member.isreg():
            key = str(name.with_name(name.name.partition(".")[0]))
            sample = samples.setdefault(key, _Sample(shard, key, {}))
            if suffix in sample.members:
                raise ValueError(f"data.path: {shard} holds {member.name!r} twice")
            sample.members[suffix] = _Member(member.offset_data, member.size)
    for sample in samples.values():
        _check(sample)
    return list(samples.values())


def _headers(shard: Path) -> Iterator[tarfile.TarInfo]:
    end = 0
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                yield member
            file.seek(end)  # tarfile stops at a broken header as if the archive ended there
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no member and no end of the archive at byte {end}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"data.path: {shard} is not a whole, uncompressed tar file: {error}") from error


def _check(sample: _Sample) -> None:
    if sample.one_of((*IMAGE_SUFFIXES, *_LATENTS)) is None:
        raise ValueError(f"data.path: {sample} has no image and no latent, only {sorted(sample.members)}")
    if sample.one_of(_CAPTIONS) is None and "latent.safetensors" not in sample.members:
        raise ValueError(f"data.path: {sample} has no caption; add {sample.key}.txt, or {sample.key}.json with a text")


def _read_caption(sample: _Sample, needed: bool) -> str:
    kind = sample.one_of(_CAPTIONS)
    if kind is None:
        if needed:
            raise ValueError(f"data.path: {sample} has neither a caption nor a prepared condition")
        return ""
    try:
        text = sample.read(kind).decode("utf-8")
        caption = text.strip() if kind == "txt" else json.loads(text)["text"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"data.path: the caption of {sample} cannot be read from its .{kind}: {error!r}") from error
    if not isinstance(caption, str):
        raise ValueError(f"data.path: the caption of {sample} must be a string: got {caption!r}")
    return caption


def _read_latent(sample: _Sample, kind: str) -> dict[str, Tensor]:
    """{"latent": (C, h, w)} and, where they are prepared, cond.0, cond.1, ..."""
    data = sample.read(kind)
    try:
        if kind == "latent.npy":
            tensors = {"latent": torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))}
        else:
            tensors = safetensors.torch.load(data)
    except (ValueError, TypeError, EOFError, SafetensorError) as error:
        raise ValueError(f"data.path: the latent of {sample} cannot be read: {error}") from error
    names = ["latent", *(f"cond.{part}" for part in range(len(tensors) - 1))]
    if sorted(tensors) != sorted(names) or tensors["latent"].ndim != 3 or not tensors["latent"].is_floating_point():
        shapes = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()}
        raise ValueError(f"data.path: {sample} must hold a float `latent` (C, h, w), then `cond.0`, `cond.1`, ...: got {shapes}")
    return tensors


def _stack(tensors: Sequence[Tensor | None], samples: Sequence[_Sample]) -> Tensor:
    for tensor, sample in zip(tensors, samples, strict=True):
        if tensor is None or tensors[0] is None or tensor.shape != tensors[0].shape:
            raise ValueError(
                f"data.path: a prepared tensor of {sample} is shaped unlike that of {samples[0]}; prepare all samples at one size"
            )
    return torch.stack([tensor for tensor in tensors if tensor is not None])
