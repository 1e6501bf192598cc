"""Images with instance masks, from annotation files in the format of COCO."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

from hyper_sd.config import DataConfig
from hyper_sd.data import build_source
from hyper_sd.data.base import Samples
from hyper_sd.data.images import place_mask

HEIGHT, WIDTH, SIDE = 48, 64, 24
CATEGORIES = [{"id": 3, "name": "box"}, {"id": 17, "name": "cat"}]
LEFT, MIDDLE = (2, 10, 8, 40), (24, 8, 40, 40)  # x, y of two corners; the crop to a square leaves x from 8 to 56


def polygon(x0: int, y0: int, x1: int, y1: int) -> list[list[float]]:
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def picture(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    """Black, with white boxes."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    for x0, y0, x1, y1 in boxes:
        pixels[y0:y1, x0:x1] = 255
    return pixels


def encoded(box: tuple[int, int, int, int]) -> dict[str, Any]:
    code = rle.encode(np.asfortranarray(picture(box)[:, :, 0] // 255))
    return {"size": code["size"], "counts": code["counts"].decode()}


def runs(box: tuple[int, int, int, int]) -> dict[str, Any]:
    """The same, its runs written out."""
    flat = np.concatenate([[0], picture(box)[:, :, 0].T.ravel() // 255])
    changes = np.flatnonzero(np.diff(flat))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *changes, HEIGHT * WIDTH]).tolist()}


def write(folder: Path, segmentations: list[list[Any]], change: Callable[[dict[str, Any]], None] = lambda data: None) -> DataConfig:
    """One picture for each list of segmentations, whose categories take turns; `change` is made before the file is written."""
    (folder / "images").mkdir()
    data: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    for number, parts in enumerate(segmentations):
        Image.fromarray(picture(MIDDLE)).save(folder / "images" / f"{number}.png")
        data["images"].append({"id": 100 + number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH})
        for place, part in enumerate(parts):
            category = CATEGORIES[place % 2]["id"]
            row = {"id": 10 * number + place, "image_id": 100 + number, "category_id": category, "segmentation": part}
            data["annotations"].append({**row, "iscrowd": 0, "area": 1, "bbox": [0, 0, 1, 1]})
    captions = [{"image_id": 100 + number, "id": number, "caption": f"picture {number}"} for number in range(len(segmentations))]
    change(data)
    (folder / "instances.json").write_text(json.dumps(data))
    (folder / "captions.json").write_text(json.dumps({"annotations": captions}))
    paths = {"annotations": str(folder / "instances.json"), "captions": str(folder / "captions.json")}
    return DataConfig(kind="coco", path=str(folder / "images"), batch_size=1, max_bad_fraction=0.9, **paths)


def read(config: DataConfig, num: int = 1) -> Samples:
    return build_source(config, seed=0, image_size=SIDE, instances=True).batch(range(num))


@pytest.mark.parametrize("segmentation", [polygon(*MIDDLE), encoded(MIDDLE), runs(MIDDLE)], ids=["polygon", "encoded", "runs"])
def test_masks_are_cut_as_their_images(tmp_path: Path, segmentation: Any) -> None:
    """The white box is its own mask, after any resize and crop."""
    samples = read(write(tmp_path, [[segmentation]]))
    (instances,) = samples.instances
    assert samples.images is not None and samples.captions == ["picture 0"] and samples.names == (str(tmp_path / "images" / "0.png"),)
    assert instances.masks.shape == (1, SIDE, SIDE) and instances.masks.dtype == torch.bool
    assert torch.equal(instances.masks[0], samples.images[0, 0] > 0.5)
    x0, y0, x1, y1 = (round(value * SIDE / HEIGHT) for value in (MIDDLE[0] - 8, MIDDLE[1], MIDDLE[2] - 8, MIDDLE[3]))
    wanted = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    wanted[y0:y1, x0:x1] = True
    assert torch.equal(instances.masks[0], wanted)


def test_labels_are_places_in_the_categories(tmp_path: Path) -> None:
    config = write(tmp_path, [[polygon(*MIDDLE), polygon(20, 20, 40, 30), encoded(MIDDLE)]])
    source = build_source(config, seed=0, image_size=SIDE, instances=True)
    assert source.categories == ("box", "cat")
    assert source.batch([0]).instances[0].labels.tolist() == [0, 1, 0]


def test_crowds_and_what_the_crop_leaves_nothing_of_are_passed_over(tmp_path: Path) -> None:
    def crowd(data: dict[str, Any]) -> None:
        data["annotations"][1]["iscrowd"] = 1

    samples = read(write(tmp_path, [[polygon(*LEFT), polygon(*MIDDLE), encoded(MIDDLE)]], crowd))
    assert samples.instances[0].labels.tolist() == [0] and samples.bad == ()


def test_a_mask_of_half_a_pixel_or_more_is_kept() -> None:
    mask = np.zeros((4, 4), dtype=bool)
    mask[:, :1], mask[0, 2] = True, True
    assert place_mask(mask, 2, 2).tolist() == [[True, False], [True, False]]


# ---- mistakes

BAD: dict[str, tuple[Any, Callable[[dict[str, Any]], None] | None, str]] = {
    "no instance": ([], None, "no instance"),
    "cropped": ([polygon(*LEFT)], None, "no instance"),
    "outside": ([polygon(*MIDDLE), polygon(70, 8, 80, 30)], None, "mask outside the image"),
    "another size": ([{"size": [10, 10], "counts": "0d3"}], None, "mask of another size"),
    "too few corners": ([[[1, 2, 3, 4]]], None, "not a segmentation"),
    "no numbers": ([[["a"] * 6]], None, "not a segmentation"),
    "not finite": ([[[1e30, 2, 3, 4, 5, 6]]], None, "not a segmentation"),
    "broken code": ([{"size": [HEIGHT, WIDTH], "counts": "~~"}], None, "not a segmentation"),
    "short code": ([{"size": [HEIGHT, WIDTH], "counts": [5, 5]}], None, "not a segmentation"),
    "long code": ([{"size": [HEIGHT, WIDTH], "counts": [5, 5000]}], None, "not a segmentation"),
    "missing": ([None], None, "not a segmentation"),
    "category": ([polygon(*MIDDLE)], lambda data: data["annotations"][0].update(category_id=99), "unknown category"),
    "file": ([polygon(*MIDDLE)], lambda data: data["images"][0].update(file_name="nowhere.png"), "no such file"),
    "path": ([polygon(*MIDDLE)], lambda data: data["images"][0].update(file_name="../instances.json"), "no such file"),
    "size": ([polygon(*MIDDLE)], lambda data: data["images"][0].update(height=12), "mask of another size"),
    "caption": ([polygon(*MIDDLE)], lambda data: data["images"][0].update(id=7), "no instance"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_annotations_are_counted_and_replaced(tmp_path: Path, kind: str) -> None:
    """The first of two pictures is bad; whoever asks for it is given the second."""
    segmentations, change, reason = BAD[kind]
    config = write(tmp_path, [segmentations, [polygon(*MIDDLE)]], change or (lambda data: None))
    source = build_source(config, seed=0, image_size=SIDE, instances=True)
    samples = source.batch(range(4))
    assert set(samples.captions) == {"picture 1"} and len(samples.instances) == 4
    assert {bad.reason for bad in (*source.bad, *samples.bad)} == {reason}


def test_too_many_bad_ones_end_the_run_before_it_starts(tmp_path: Path) -> None:
    config = write(tmp_path, [[], [polygon(*MIDDLE)]])
    with pytest.raises(ValueError, match=r"no instance; 1 of 2 samples are bad, more than data\.max_bad_fraction=0\.01"):
        build_source(DataConfig(**{**vars(config), "max_bad_fraction": 0.01}), seed=0, image_size=SIDE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "/nowhere"}, r"data\.path=/nowhere is not a directory"),
        ({"annotations": "/nowhere.json"}, r"data\.annotations=/nowhere\.json cannot be read"),
        ({"captions": "/nowhere.json"}, r"data\.captions=/nowhere\.json cannot be read"),
        ({"captions": None}, r"data\.annotations and data\.captions must be set for data=coco"),
        ({"annotations": "captions.json"}, r"data\.annotations=\S+ is no annotation file in the format of COCO: KeyError\('images'\)"),
        ({"captions": "images/0.png"}, r"data\.captions=\S+ is no file of captions in the format of COCO"),
        ({"annotations": "images/0.png"}, r"data\.annotations=\S+ is no annotation file in the format of COCO"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, changes: dict[str, str | None], message: str) -> None:
    config = write(tmp_path, [[polygon(*MIDDLE)]])
    found = {key: str(tmp_path / value) if value and not value.startswith("/") else value for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        build_source(DataConfig(**{**vars(config), **found}), seed=0, image_size=SIDE)


def test_data_without_instances_are_refused_where_they_are_asked_for(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a picture")
    config = DataConfig(kind="folder", path=str(tmp_path), batch_size=1)
    assert build_source(config, seed=0, image_size=SIDE).batch([0]).instances == ()
    with pytest.raises(ValueError, match=r"data=folder has no instances, .*; choose data=coco or data=scenes"):
        build_source(config, seed=0, image_size=SIDE, instances=True)
