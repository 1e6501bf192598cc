"""Images with the masks of their objects: annotation files in the format of COCO, read by pycocotools.

    annotations.json     images (id, file_name, height, width), categories (id, name), annotations (image_id, category_id, segmentation,
                         iscrowd), whose segmentation is a list of polygons or a run-length encoding
    captions.json        annotations (image_id, caption)

Crowds are no instances and are passed over. An object that the crop leaves nothing of is passed over too.
"""

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hyper_sd.data import captions
from hyper_sd.data.base import BadSample, BadSampleError, Rows, Samples, SourceDefaults, pick_caption
from hyper_sd.data.images import Placed, decode, place, place_mask
from hyper_sd.data.order import EpochOrder
from hyper_sd.instances import Instances

_FARTHEST = 1e6  # pixels, of a corner of a polygon


@dataclass(frozen=True)
class _Entry:
    file: Path
    captions: tuple[str, ...]
    objects: list[dict[str, Any]]


@dataclass(frozen=True)
class _Row:
    name: str
    caption: str
    image: Placed
    instances: Instances


class CocoSource(SourceDefaults):
    """Images of a directory with captions and instances, at one square size."""

    def __init__(self, path: str, annotations: str, captions_file: str, seed: int, image_size: int, num_workers: int = 0):
        self._coco, names = _open(annotations)
        self.categories = tuple(names.values())
        self._label = {number: label for label, number in enumerate(names)}
        found = _entries(Path(path), self._coco, _captions(captions_file))
        self._entries = [entry for entry in found if isinstance(entry, _Entry)]
        self.bad = [entry for entry in found if isinstance(entry, BadSample)]
        if not self._entries:
            raise ValueError(f"data.path={path}: no image of data.annotations={annotations} can be used (first: {self.bad[0]})")
        self.num_samples = len(self._entries)
        self._seed, self._image_size = seed, image_size
        self._rows = Rows(EpochOrder(self.num_samples, seed), num_workers)

    def batch(self, positions: Sequence[int]) -> Samples:
        rows, bad = self._rows.read(self._read, positions)
        images = torch.stack([row.image.tensor() for row in rows])
        sizes = torch.tensor([row.image.sizes for row in rows], dtype=torch.float32)
        texts, names, instances = [row.caption for row in rows], tuple(row.name for row in rows), tuple(row.instances for row in rows)
        return Samples(texts, images, sizes=sizes, bad=bad, instances=instances, names=names)

    def _read(self, index: int, position: int) -> _Row:
        entry, size = self._entries[index], self._image_size
        image = decode(entry.file, str(entry.file))
        masks = [self._mask(row, entry, image.height, image.width) for row in entry.objects]
        placed = [place_mask(mask, size, size) for mask in masks]
        seen = [number for number, mask in enumerate(placed) if mask.any()]
        if not seen:
            raise BadSampleError(str(entry.file), "no instance", "the crop leaves nothing of any")
        labels = torch.tensor([self._label[entry.objects[number]["category_id"]] for number in seen])
        instances = Instances(torch.from_numpy(np.stack([placed[number] for number in seen])), labels)
        text = entry.captions[pick_caption(entry.captions, self._seed, position)]
        return _Row(str(entry.file), text, place(image, size, size), instances)

    def _mask(self, row: Mapping[str, Any], entry: _Entry, height: int, width: int) -> np.ndarray:
        """The mask of an annotation, bool (height, width); BadSampleError for one that is not of this image."""
        where = f"annotation {row['id']} of {entry.file}"
        info, segmentation = self._coco.imgs[row["image_id"]], row.get("segmentation")
        said = segmentation["size"] if isinstance(segmentation, dict) else (info.get("height"), info.get("width"))
        if tuple(said) != (height, width):
            raise BadSampleError(where, "mask of another size", f"{tuple(said)}, the image has {(height, width)}")
        if row["category_id"] not in self._label:
            raise BadSampleError(where, "unknown category", row["category_id"])
        if isinstance(segmentation, list) and _is_outside(_points(segmentation, where), height, width):
            raise BadSampleError(where, "mask outside the image")
        try:
            return _decoded(self._coco.annToRLE(row)).astype(bool)
        except Exception as error:  # of no narrower class, where an encoding is broken
            raise BadSampleError(where, "not a segmentation", error) from error


def _entries(root: Path, coco: Any, texts: Mapping[int, list[str]]) -> list[_Entry | BadSample]:
    if not root.is_dir():
        raise ValueError(f"data.path={root} is not a directory")
    return [_entry(root, row, coco.imgToAnns.get(row["id"], []), texts.get(row["id"])) for row in coco.dataset["images"]]


def _entry(root: Path, row: Mapping[str, Any], objects: Sequence[dict[str, Any]], texts: list[str] | None) -> _Entry | BadSample:
    file = root / str(row.get("file_name"))
    if not file.resolve().is_relative_to(root.resolve()) or not file.is_file():
        return BadSample(str(file), "no such file", f"image {row['id']} of data.annotations")
    things = [one for one in objects if not one.get("iscrowd")]
    if not things:
        return BadSample(str(file), "no instance")
    try:
        return _Entry(file, captions.from_value(texts, str(file)), things)
    except BadSampleError as error:
        return error.sample


def _open(file: str) -> tuple[Any, dict[int, str]]:
    """pycocotools' index of a file, and the names of its categories. Raises ValueError, naming data.annotations."""
    if find_spec("pycocotools") is None:
        raise ValueError("data=coco is read by pycocotools; install hyper-sd[perceptual]")
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how long it took
            coco: Any = COCO(file)
        parts = [coco.dataset[name] for name in ("images", "annotations")]
        if not all(isinstance(part, list) for part in parts):
            raise TypeError("images and annotations must be lists")
        return coco, {row["id"]: row["name"] for row in coco.dataset["categories"]}
    except OSError as error:
        raise ValueError(f"data.annotations={file} cannot be read: {error}") from error
    except (AssertionError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"data.annotations={file} is no annotation file in the format of COCO: {error!r}") from error


def _captions(file: str) -> dict[int, list[str]]:
    """The captions of every image. Raises ValueError, naming data.captions."""
    found = defaultdict(list)
    try:
        for row in json.loads(Path(file).read_bytes())["annotations"]:
            found[row["image_id"]].append(row["caption"])
    except OSError as error:
        raise ValueError(f"data.captions={file} cannot be read: {error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"data.captions={file} is no file of captions in the format of COCO: {error!r}") from error
    return found


def _decoded(code: Any) -> np.ndarray:
    """The mask of a run-length encoding. ValueError for one that ends early, of which pycocotools leaves the rest to chance."""
    from pycocotools import mask as rle

    mask = rle.decode(code)
    counts = code["counts"]
    if rle.encode(np.asfortranarray(mask))["counts"] != (counts.encode() if isinstance(counts, str) else counts):
        raise ValueError("the runs do not fill the image")
    return mask


def _points(polygons: Sequence[Any], where: str) -> np.ndarray:
    """All corners (N, 2), x and y. Raises BadSampleError for what pycocotools would take for something else, or not survive."""
    try:
        flat = [np.asarray(polygon, dtype=float) for polygon in polygons]
    except (TypeError, ValueError) as error:
        raise BadSampleError(where, "not a segmentation", error) from error
    if not flat or any(one.ndim != 1 or len(one) < 6 or len(one) % 2 or not (np.abs(one) < _FARTHEST).all() for one in flat):
        raise BadSampleError(where, "not a segmentation", "a polygon is a list of x, y of three corners or more")
    return np.concatenate(flat).reshape(-1, 2)


def _is_outside(points: np.ndarray, height: int, width: int) -> bool:
    """Whether polygons lie beside the image; one inside that is too thin for a pixel does not."""
    low, high = points.min(0), points.max(0)
    return bool((high <= 0).any() or low[0] >= width or low[1] >= height)
