"""What scripts/prepare.py writes, and reading it.

    dataset.json             what it was made of and for, and size and SHA-256 of every file; written last
    index.safetensors        one row a sample: where it is in which shard, its CRC-32, its height and width in pixels
    <name>.tar               <key>.json, {"text": [captions], "sizes": [6 integers], "name": where it came from}, followed by
                             <key>.sample.safetensors, `latent` (C, h, w) and, optionally, `cond.0`, `cond.1`, ...: the teacher's
                             condition, its leading dimension the captions

A sample is one read of both members, checked by its CRC.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from hyper_sd.data import storage
from hyper_sd.data.base import BadSample, BadSampleError, Encoder, Rows, Samples, pick_caption
from hyper_sd.data.order import BucketOrder, EpochOrder
from hyper_sd.guidance import Cond

MANIFEST, INDEX = "dataset.json", "index.safetensors"
FORMAT = 1
# from `offset` of the shard on there are `length` bytes: json up to `split`, tensors from `tensors` on
COLUMNS = ("shard", "offset", "split", "tensors", "length", "crc", "height", "width")
_PROBE_TOLERANCE = 0.02  # relative; the same weights in fp16 and fp32 differ by a tenth of it
_PROBE_VALUES = 64
_PROBE_PROMPT = "a red circle on a blue background"


@dataclass(frozen=True)
class Manifest:
    """dataset.json. `probe` is what the encoders made of a fixed image and prompt: it tells their weights apart."""

    format: int
    teacher: str
    fingerprint: dict[str, str]
    image_size: int
    dtype: str
    embeddings: bool
    num_samples: int
    num_read: int
    dropped: dict[str, int]
    buckets: dict[str, int]
    source: dict[str, Any]
    settings: dict[str, Any]
    shards: list[dict[str, Any]]
    index_sha256: str
    probe: dict[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, path: str) -> "Manifest":
        """Raises ValueError, naming data.path, for a directory whose preparation has not finished or is not ours."""
        shown = storage.shown(path)
        try:
            manifest = cls(**json.loads(storage.read_all(f"{path}/{MANIFEST}")))
        except FileNotFoundError as error:
            raise ValueError(
                f"data.path={shown} holds no {MANIFEST}: it is no prepared cache, or scripts/prepare.py has not finished; run it again"
            ) from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"data.path={shown}: {MANIFEST} is not one of a prepared cache: {error}") from error
        if manifest.format != FORMAT:
            raise ValueError(f"data.path={shown} was prepared in format {manifest.format}, this program reads {FORMAT}; prepare it again")
        names = [shard["name"] for shard in manifest.shards]
        if bad := [name for name in names if not isinstance(name, str) or "/" in name or not name.endswith(".tar")]:
            raise ValueError(f"data.path={shown}: {MANIFEST} names the shard {bad[0]!r}, which is not a file of the cache; it is refused")
        return manifest


class CacheSource:
    """Prepared samples, read at random by one request each.

    Batches lie in groups of `batch_size` positions if there is more than one bucket. Raises ValueError, naming data.path, for a
    cache that is not finished, was changed, or was made for another teacher than `fingerprint`.
    """

    categories: tuple[str, ...] = ()

    def __init__(self, path: str, seed: int, batch_size: int, num_workers: int = 0, fingerprint: Mapping[str, str] | None = None):
        self._path, self._seed = path.rstrip("/"), seed
        self.manifest = Manifest.read(self._path)
        if fingerprint is not None:
            self._require_teacher(fingerprint)
        self._index = self._read_index()
        self._usable, self.bad = self._whole()
        self.num_samples = len(self._usable)
        shapes, members = np.unique(self._index["height"][self._usable] << 32 | self._index["width"][self._usable], return_inverse=True)
        self.batch_size = batch_size if len(shapes) > 1 else None
        buckets = [np.flatnonzero(members == bucket) for bucket in range(len(shapes))]
        order = BucketOrder(buckets, batch_size, seed) if len(shapes) > 1 else EpochOrder(self.num_samples, seed)
        self._rows = Rows(order, num_workers)

    def batch(self, positions: Sequence[int]) -> Samples:
        rows, bad = self._rows.read(lambda index, position: self.row(int(self._usable[index]), position), positions)
        if len({row.latent.shape for row in rows}) > 1:
            raise ValueError(f"data.path={self._path}: a batch must lie in one group of data.batch_size positions")
        conds = None
        if self.manifest.embeddings:
            conds = tuple(torch.stack([row.cond[part] for row in rows]) for part in range(len(rows[0].cond)))
        sizes = torch.tensor([row.sizes for row in rows], dtype=torch.float32)
        texts, names = [row.caption for row in rows], tuple(row.name for row in rows)
        return Samples(texts, None, torch.stack([row.latent for row in rows]), conds, sizes, bad, names=names)

    def check(self, encoder: Encoder) -> None:
        for name, values in probe(encoder, self.manifest.embeddings).items():
            made = torch.tensor(self.manifest.probe[name])
            error = float((torch.tensor(values) - made).norm() / made.norm().clamp(min=1e-6)) if len(values) == len(made) else float("inf")
            if not error < _PROBE_TOLERANCE:
                part = {"images": "VAE", "prompts": "text encoder"}[name]
                raise ValueError(
                    f"data.path={storage.shown(self._path)} was prepared with another {part} than that of teacher.path (they differ by "
                    f"{error:.2g}); change teacher.path, or prepare the data for this teacher"
                )

    def row(self, index: int, position: int = 0) -> "Row":
        """The sample at a row of the index, with the caption that goes with a position; raises BadSampleError."""
        shard, offset, split, tensors, length, crc, *_ = (int(self._index[name][index]) for name in COLUMNS)
        name = self.manifest.shards[shard]["name"]
        where = f"sample at byte {offset} of {storage.shown(self._path)}/{name}"
        data = storage.read(f"{self._path}/{name}", offset, length)
        if len(data) != length or zlib.crc32(data) != crc:
            raise BadSampleError(where, "damaged", "the checksum differs")
        try:
            info, values = json.loads(data[:split]), safetensors.torch.load(data[tensors:])
        except (ValueError, SafetensorError) as error:
            raise BadSampleError(where, "damaged", error) from error
        number = pick_caption(info["text"], self._seed, position)
        latent = values.pop("latent").float()
        cond = tuple(values[f"cond.{part}"][number].float() for part in range(len(values)))
        if not all(bool(part.sum().isfinite()) for part in (latent, *cond)):  # a sum is finite if all are, and half the work
            raise BadSampleError(f"{info['name']} ({where})", "not finite")
        return Row(info["name"], info["text"][number], latent, cond, tuple(info["sizes"]))

    def _read_index(self) -> dict[str, np.ndarray]:
        data = storage.read_all(f"{self._path}/{INDEX}")
        if hashlib.sha256(data).hexdigest() != self.manifest.index_sha256:
            raise ValueError(f"data.path={storage.shown(self._path)}: {INDEX} is not that of {MANIFEST}; prepare the data again")
        return safetensors.numpy.load(data)

    def _whole(self) -> tuple[np.ndarray, list[BadSample]]:
        """Rows whose shard is long enough to hold them, and the others."""
        sizes = np.array([self._size(shard["name"]) for shard in self.manifest.shards])
        whole = self._index["offset"] + self._index["length"] <= sizes[self._index["shard"]]
        torn = [(int(self._index["shard"][row]), row) for row in np.flatnonzero(~whole)]
        bad = [BadSample(f"row {row} of {self.manifest.shards[shard]['name']}", "torn shard") for shard, row in torn]
        if not whole.any():
            raise ValueError(f"data.path={storage.shown(self._path)} holds no whole sample; prepare the data again")
        return np.flatnonzero(whole), bad

    def _size(self, name: str) -> int:
        try:
            return storage.size(f"{self._path}/{name}")
        except FileNotFoundError:
            return 0

    def _require_teacher(self, fingerprint: Mapping[str, str]) -> None:
        made = self.manifest.fingerprint
        if different := [name for name in sorted({*made, *fingerprint}) if made.get(name) != fingerprint.get(name)]:
            raise ValueError(
                f"data.path={storage.shown(self._path)} was prepared for another teacher, {self.manifest.teacher}: {', '.join(different)} "
                "differ; change teacher.path, or prepare the data for this teacher"
            )


@dataclass(frozen=True)
class Row:
    """One prepared sample, in float32; `name` is where it came from."""

    name: str
    caption: str
    latent: Tensor
    cond: Cond
    sizes: tuple[int, ...]


def probe(encoder: Encoder, embeddings: bool) -> dict[str, list[float]]:
    """What the encoders make of a fixed image of 64 by 64 pixels and, for prepared embeddings, of a fixed prompt."""
    ramp = torch.linspace(0, 1, 64)
    image = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), (8 * torch.pi * (ramp + ramp[:, None])).sin() / 2 + 0.5])
    values = {"images": encoder.encode_images(image[None])}
    if embeddings:
        values["prompts"] = encoder.encode_prompts([_PROBE_PROMPT])[0][:, :8, :64]
    flat = {name: value.float().flatten().cpu() for name, value in values.items()}
    return {name: value[:: max(1, len(value) // _PROBE_VALUES)].tolist() for name, value in flat.items()}
