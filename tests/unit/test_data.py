import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hyper_sd.config import DataConfig
from hyper_sd.data import build_source
from hyper_sd.data.scenes import captions, render, sample_scenes
from tests.shards import Kind, encoded, image_folder, image_shard, latent_shard, number_of, picture, source, write_tar


@pytest.fixture(params=["folder", "webdataset images", "webdataset latents"])
def seven(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Kind, str]:
    """A finite source of 7 numbered samples: its kind and path."""
    if request.param == "folder":
        return "folder", str(image_folder(tmp_path, 7))
    write = image_shard if request.param == "webdataset images" else latent_shard
    for shard, numbers in enumerate((range(4), range(4, 7))):
        write(tmp_path / f"shard-{shard:04}.tar", numbers)
    return "webdataset", str(tmp_path / "shard-{0000..0001}.tar")


def test_every_sample_comes_once_an_epoch_with_its_own_caption(seven: tuple[Kind, str]):
    data = source(*seven)
    assert data.num_samples == 7
    orders = []
    for epoch in range(3):
        samples = data.batch(range(7 * epoch, 7 * epoch + 7))
        numbers = number_of(samples)
        assert sorted(numbers) == list(range(7))
        assert samples.captions == [f"number {number}" for number in numbers]
        assert all(f"{number:03}" in name for number, name in zip(numbers, samples.names, strict=True))
        orders.append(tuple(numbers))
    assert len(set(orders)) == 3


def test_batches_are_pure_whatever_the_order_slice_process_or_thread_count(seven: tuple[Kind, str]):
    straight = source(*seven).batch(range(20))
    other = source(*seven, num_workers=2)
    later = other.batch(range(12, 20))  # a fresh source in the middle, as after a restart
    ranks = [other.batch(range(rank, 12, 2)) for rank in range(2)]
    assert number_of(later) == number_of(straight)[12:]
    assert [number_of(rank) for rank in ranks] == [number_of(straight)[:12:2], number_of(straight)[1:12:2]]
    assert later.captions == straight.captions[12:]


def test_the_seed_decides_the_order(seven: tuple[Kind, str]):
    orders = [tuple(number_of(source(*seven, seed=seed).batch(range(14)))) for seed in (0, 0, 1, 2)]
    assert orders[0] == orders[1] and len(set(orders)) == 3


def test_scenes_are_rendered_by_position_without_an_end():
    data = source("scenes")
    samples = data.batch([5, 10**9])
    assert data.num_samples is None
    assert samples.images is not None and samples.images.shape == (2, 3, 32, 32)
    again = source("scenes").batch([10**9])
    assert again.images is not None and torch.equal(again.images[0], samples.images[1])
    assert again.captions == samples.captions[1:]
    other = source("scenes", seed=1).batch([5])
    assert other.images is not None and not torch.equal(other.images[0], samples.images[0])


def test_scenes_are_apart_from_those_that_evaluation_draws_with_the_same_seed():
    plain = sample_scenes(0, np.arange(4))
    samples = source("scenes").batch(range(4))
    assert samples.images is not None and not torch.equal(samples.images, render(plain))
    assert samples.captions != captions(plain)


def test_scenes_take_the_teachers_image_size():
    native, large = (source("scenes", image_size=size).batch(range(3)).images for size in (32, 64))
    assert native is not None and large is not None and large.shape == (3, 3, 64, 64)
    assert large.min() >= 0 and large.max() <= 1
    shrunk = torch.nn.functional.avg_pool2d(large, 2)
    assert (shrunk - native).abs().mean() < 0.02


def test_scenes_refuse_a_path():
    with pytest.raises(ValueError, match=r"data.path"):
        source("scenes", "somewhere")


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_a_path_must_be_set(kind: Kind):
    with pytest.raises(ValueError, match=r"data.path must be set"):
        source(kind)


def test_folder_reads_metadata_jsonl_instead_of_text_files(tmp_path: Path):
    image_folder(tmp_path / "deep", 2)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "deep/001.png", "text": "one", "source": "x"}\n\n')
    data = source("folder", tmp_path)
    samples = data.batch([0, 1])
    assert (data.num_samples, samples.captions, number_of(samples)) == (1, ["one", "one"], [1, 1])


@pytest.mark.parametrize("kind", ["jpg", "jpeg", "png", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_folder_converts_every_format_and_mode_to_rgb(kind: str, mode: str, tmp_path: Path):
    if kind in ("jpg", "jpeg") and mode in ("RGBA", "P"):
        mode = "CMYK"
    if kind == "webp" and mode == "P":
        mode = "RGB"
    (tmp_path / f"a.{kind.upper()}").write_bytes(encoded(picture(color=(120, 120, 120)).convert(mode), kind))
    (tmp_path / "a.txt").write_text("gray")
    images = source("folder", tmp_path, image_size=16).batch([0]).images
    assert images is not None and images.shape == (1, 3, 16, 16) and images.dtype == torch.float32
    torch.testing.assert_close(images, torch.full_like(images, 120 / 255), atol=0.04, rtol=0)  # the palette of mode P is coarse


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (33, 100), (7, 9), (32, 32)])
def test_folder_crops_at_the_centre_after_fitting_the_shorter_side(size: tuple[int, int], tmp_path: Path):
    width, height = size
    row, column = np.mgrid[:height, :width]
    centred = np.stack([255 * (column + 0.5) / width, 255 * (row + 0.5) / height, 0 * row], axis=2)
    Image.fromarray(centred.astype(np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("ramp")
    images = source("folder", tmp_path, image_size=32).batch([0]).images
    assert images is not None and images.shape == (1, 3, 32, 32)
    short = min(size)
    for channel, side in ((0, width), (1, height)):  # a ramp keeps its middle, and its slope tells the scale
        profile = images[0, channel].mean(dim=channel)  # along the ramp: columns for red, rows for green
        assert abs(float(profile.mean()) - 0.5) < 0.03
        assert abs(float(profile[20] - profile[11]) - 9 * short / side / 32) < 0.03


def test_folder_turns_images_upright_by_their_exif_orientation(tmp_path: Path):
    image = picture(48, 32, (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 48, 16))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: white at the right
    (tmp_path / "a.jpg").write_bytes(encoded(image, "jpg", exif=exif, quality=95))
    (tmp_path / "a.txt").write_text("turned")
    images = source("folder", tmp_path).batch([0]).images
    assert images is not None
    assert images[0, :, :, :12].max() < 0.1 and images[0, :, :, 20:].min() > 0.9


def test_folder_names_what_is_wrong_with_it(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data.path=.*absent is not a directory"):
        source("folder", tmp_path / "absent")
    with pytest.raises(ValueError, match=r"data.path=.* holds no image"):
        source("folder", tmp_path)
    image_folder(tmp_path, 3)
    (tmp_path / "001.txt").unlink()
    with pytest.raises(ValueError, match=r"data.path: .*001.png: no caption .*1 of 3 samples are bad.*data.max_bad_fraction"):
        source("folder", tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "{oops",
        '"text"',
        '{"file_name": "000.png"}',
        '{"file_name": "000.png", "text": 3}',
        '{"file_name": "absent.png", "text": "a"}',
        '{"file_name": "../outside.png", "text": "a"}',
    ],
)
def test_folder_names_the_wrong_line_of_metadata_jsonl(line: str, tmp_path: Path):
    folder = image_folder(tmp_path / "data", 1)
    picture().save(tmp_path / "outside.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"data.path: .*metadata.jsonl (line|row) 2: .*1 of 2 samples"):
        source("folder", folder)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("kind", ["folder", "prompts"])
def test_a_table_without_the_captions_column_names_those_it_has(kind: Kind, suffix: str, tmp_path: Path):
    import pyarrow.parquet

    folder = image_folder(tmp_path / "photos", 2)
    rows = [{"file_name": f"{number:03}.png", "caption": f"number {number}"} for number in range(2)]
    table = folder / f"metadata.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    elif suffix == "csv":
        table.write_text("".join(",".join(row) + "\n" for row in (["file_name", "caption"], *(row.values() for row in rows))))
    else:
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder if kind == "folder" else table
    with pytest.raises(ValueError, match=rf"data.caption_column=text: .*metadata.{suffix} has the columns file_name, caption$"):
        source(kind, path)
    cfg = DataConfig(kind=kind, path=str(path), batch_size=2, caption_column="caption")
    assert sorted(build_source(cfg, seed=0, image_size=16).batch(range(2)).captions) == ["number 0", "number 1"]


def test_a_table_of_images_needs_their_names(tmp_path: Path):
    (image_folder(tmp_path, 1) / "metadata.jsonl").write_text('{"file": "000.png", "text": "a"}\n')
    with pytest.raises(ValueError, match=r"data.path: a column file_name is needed, and .*metadata.jsonl has the columns file, text"):
        source("folder", tmp_path)


@pytest.mark.parametrize("damage", ["cut", "not an image", "another format"])
def test_an_image_that_cannot_be_decoded_is_named(damage: str, tmp_path: Path):
    whole = encoded(Image.effect_noise((64, 64), 50).convert("RGB"))
    data = {"cut": whole[: len(whole) // 2], "not an image": b"hello", "another format": encoded(picture(), "bmp")}[damage]
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"data.path: .*a.png: unreadable image"):
        source("folder", tmp_path).batch([0])
    shard = write_tar(tmp_path / "a.tar", {"a.png": data, "a.txt": b"a"})
    with pytest.raises(ValueError, match=r"data.path: sample a of .*a.tar: unreadable image"):
        source("webdataset", shard).batch([0])
