"""One landscape in every format that data sets hold, from the files of tests/fixtures/photos."""

import shutil
import struct
from collections import deque
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from hyper_sd.commands import BucketsConfig
from hyper_sd.config import DataConfig
from hyper_sd.data import BadSamples, build_source
from hyper_sd.data.base import BadSampleError
from hyper_sd.data.images import decode, place
from hyper_sd.prepare.filters import buckets, nearest, sharpness
from hyper_sd.prepare.inputs import Item, units
from tests.fixtures.render import CAPTION, PHOTOS, landscape
from tests.shards import write_tar

BAD = {
    "bomb.png": "too many pixels",
    "truncated.jpg": "unreadable image",
    "no_image.jpg": "unreadable image",
}


@pytest.mark.parametrize("name", ["plain.jpg", "progressive.jpg", "cmyk.jpg", "palette.png", "alpha.webp", "animated.png", "animated.webp"])
def test_every_format_is_the_same_picture(name: str) -> None:
    image = decode(PHOTOS / name, name)
    assert (image.mode, image.size) == ("RGB", (96, 64))
    assert np.abs(np.asarray(image, dtype=float) - np.asarray(landscape())).mean() < 3.5


def test_a_turned_photo_stands_upright() -> None:
    image = decode(PHOTOS / "rotated.jpg", "rotated")
    assert np.abs(np.asarray(image, dtype=float) - np.asarray(landscape())).mean() < 3.5


def test_of_the_tags_only_the_orientation_is_read(tmp_path: Path) -> None:
    for turned in range(9):
        width = struct.pack("<HHI4s", ExifTags.Base.ImageWidth, 2, 4, b"abc")  # a text where a number belongs
        orientation = struct.pack("<HHII", ExifTags.Base.Orientation, 3, 1, turned)
        tags = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + width + orientation + bytes(4)
        landscape().save(tmp_path / "malformed.png", exif=tags)
        clean = Image.Exif()
        clean[ExifTags.Base.Orientation] = turned
        landscape().save(tmp_path / "clean.png", exif=clean)
        wanted = ImageOps.exif_transpose(Image.open(tmp_path / "clean.png"))
        assert np.array_equal(np.asarray(decode(tmp_path / "malformed.png", "")), np.asarray(wanted))


def test_sixteen_bits_are_not_cut_off_to_white() -> None:
    gray = np.asarray(landscape().convert("L"), dtype=float)
    for name in ("gray.png", "gray16.png"):
        assert np.abs(np.asarray(decode(PHOTOS / name, name), dtype=float) - gray[..., None]).max() <= 1


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    clear = landscape().convert("RGBA")
    clear.putalpha(0)
    for name in ("a.png", "a.webp"):
        clear.save(tmp_path / name)
        assert np.asarray(decode(tmp_path / name, name)).min() == 255


@pytest.mark.parametrize(("name", "reason"), BAD.items())
def test_what_is_no_whole_image_is_refused(name: str, reason: str) -> None:
    with pytest.raises(BadSampleError) as error:
        decode(PHOTOS / name, name)
    assert error.value.sample.reason == reason


def test_a_blurred_photo_is_less_sharp() -> None:
    assert sharpness(decode(PHOTOS / "blurred.jpg", "")) < 50 < sharpness(decode(PHOTOS / "plain.jpg", ""))


def test_place_keeps_original_size_and_crop() -> None:
    placed = place(landscape(), 40, 40)
    assert placed.pixels.shape == (40, 40, 3)
    assert placed.sizes == (64, 96, 0, 10, 40, 40)


def test_buckets_keep_the_area_as_those_of_sdxl() -> None:
    sizes = buckets(1024, BucketsConfig(step=64, max_ratio=4.0))
    assert {(512, 2048), (576, 1792), (640, 1536), (768, 1344), (832, 1216), (896, 1152), (1024, 1024)} <= set(sizes) and len(sizes) == 33
    assert all((width, height) in sizes for height, width in sizes)
    assert all(height * width <= 1024**2 and height % 64 == width % 64 == 0 for height, width in sizes)
    assert nearest(3000, 2000, sizes) == (832, 1216) and nearest(500, 500, sizes) == (1024, 1024) and nearest(1, 9, sizes) == (2048, 512)
    assert buckets(512, None) == [(512, 512)]
    with pytest.raises(ValueError, match=r"buckets.step=60 must divide"):
        buckets(1024, BucketsConfig(step=60, max_ratio=2.0))


def test_a_folder_with_bad_photos_trains_on_the_good_ones_and_lists_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(PHOTOS, folder)
    cfg = DataConfig(kind="folder", path=str(folder), batch_size=4, max_bad_fraction=0.5, num_workers=2)
    source = build_source(cfg, seed=0, image_size=32)
    assert sorted(sample.reason for sample in source.bad) == ["caption is not UTF-8", "empty caption", "no caption"]
    assert source.num_samples == 16
    listed = BadSamples(tmp_path / "bad.jsonl", 0.5)
    listed.opened(source)
    samples = [source.batch(range(start, start + 4)) for start in range(0, 16, 4)]
    for part in samples:
        assert part.images is not None and part.images.shape == (4, 3, 32, 32)
        listed.add(part)
    met = {Path(sample.name).name: sample.reason for part in samples for sample in part.bad}
    assert met == BAD and listed.take() >= 3 and listed.take() == 0
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 6
    again = build_source(cfg, seed=0, image_size=32).batch(range(8, 12))
    assert again.captions == samples[2].captions and again.bad == samples[2].bad


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_an_image_that_is_too_small_is_a_bad_sample(kind: Literal["folder", "webdataset"], tmp_path: Path) -> None:
    names = [file.name for name in ("tiny", "plain") for file in PHOTOS.glob(f"{name}.*")]
    path = tmp_path / "photos"
    if kind == "folder":
        path.mkdir()
        for name in names:
            shutil.copy(PHOTOS / name, path)
    else:
        path = write_tar(tmp_path / "a.tar", {name: (PHOTOS / name).read_bytes() for name in names})
    cfg = DataConfig(kind=kind, path=str(path), batch_size=2, min_side=64)
    samples = build_source(cfg, seed=0, image_size=32).batch(range(2))
    assert {sample.reason for sample in samples.bad} == {"too small"} and "tiny" in samples.bad[0].name
    assert set(samples.captions) == {f"{CAPTION}, plain"}
    (unit,) = units(cfg, shard_size=10)
    found = {entry.captions[0]: entry.image for entry in unit.entries(0) if isinstance(entry, Item) and entry.image is not None}
    assert found[f"{CAPTION}, plain"]().size == (96, 64)
    with pytest.raises(BadSampleError, match=r"too small \(\d+ x \d+, data.min_side=64\)"):
        found[f"{CAPTION}, tiny"]()


def test_too_many_bad_samples_end_the_run(tmp_path: Path) -> None:
    cfg = DataConfig(kind="folder", path=str(PHOTOS), batch_size=4, max_bad_fraction=0.1)
    with pytest.raises(ValueError, match=r"3 of 19 samples are bad, more than data.max_bad_fraction=0.1"):
        build_source(cfg, seed=0, image_size=32)
    source = build_source(DataConfig(kind="folder", path=str(PHOTOS), batch_size=4, max_bad_fraction=0.2), seed=0, image_size=8)
    listed = BadSamples(tmp_path / "bad.jsonl", 0.1)

    def use(start: int) -> None:
        listed.add(source.batch(range(start, start + 4)))
        listed.count(listed.take(), start + 4)

    with pytest.raises(ValueError, match=r"1[12] of \d+ samples read were bad, more than data.max_bad_fraction=0.1.*bad.jsonl lists them"):
        deque(map(use, range(0, 400, 4)), maxlen=0)
    names = [line.split('"')[3] for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {Path(name).name for name in names} == set(BAD) and len(names) == 3, "each is listed once"
