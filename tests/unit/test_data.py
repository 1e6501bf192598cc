import io
import json
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from hyper_sd.config import DataConfig
from hyper_sd.data import Samples, Source, build_source
from hyper_sd.data.scenes import captions, render, sample_scenes

Kind = Literal["scenes", "folder", "webdataset", "hf", "prompts"]


def source(kind: Kind, path: Path | str | None = None, *, seed: int = 0, image_size: int = 32, num_workers: int = 0) -> Source:
    cfg = DataConfig(kind=kind, batch_size=4, path=None if path is None else str(path), num_workers=num_workers)
    return build_source(cfg, seed=seed, image_size=image_size)


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


def test_webdataset_reads_what_webdataset_writes(tmp_path: Path):
    from webdataset import TarWriter

    path = tmp_path / "a.tar"
    with TarWriter(str(path)) as writer:
        writer.write({"__key__": "deep/a", "jpg": picture(), "json": {"text": "from json"}, "cls": 3})
    samples = source("webdataset", path).batch([0])
    assert samples.captions == ["from json"]
    assert samples.images is not None and samples.images.shape == (1, 3, 32, 32)


def test_webdataset_keeps_samples_of_one_name_in_two_folders_and_shards_apart(tmp_path: Path):
    first = write_tar(
        tmp_path / "a.tar", {"x/0.txt": b"ax", "x/0.png": encoded(picture()), "y/0.txt": b"ay", "y/0.png": encoded(picture())}
    )
    second = write_tar(tmp_path / "b.tar", {"x/0.txt": b"bx", "x/0.png": encoded(picture())})
    data = source("webdataset", f"{first}::{second}")
    assert Counter(data.batch(range(3)).captions) == Counter(["ax", "ay", "bx"])


def test_webdataset_uses_the_first_of_two_members_of_one_name_and_lists_the_second(tmp_path: Path):
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as archive:
        for name, data in (("a.png", encoded(picture())), ("a.txt", b"first"), ("a.txt", b"second")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    cfg = DataConfig(kind="webdataset", path=str(shard), batch_size=1, max_bad_fraction=0.5)
    data = build_source(cfg, seed=0, image_size=16)
    assert data.batch([0]).captions == ["first"]
    assert [sample.reason for sample in data.bad] == ["duplicate key"]


def test_webdataset_uses_the_whole_samples_of_a_torn_shard(tmp_path: Path):
    shard = image_shard(tmp_path / "a.tar", range(5))  # five images, then five captions
    with tarfile.open(shard) as archive:
        last = archive.getmembers()[-2]
    shard.write_bytes(shard.read_bytes()[: last.offset_data])
    cfg = DataConfig(kind="webdataset", path=str(shard), batch_size=1, max_bad_fraction=0.6)
    data = build_source(cfg, seed=0, image_size=16)
    assert sorted(number_of(data.batch(range(3)))) == [0, 1, 2]
    assert [sample.reason for sample in data.bad] == ["torn shard", "no caption", "no caption"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_webdataset_prepared_latents_with_conditions(dtype: torch.dtype, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "latent": torch.randn(4, 8, 8, generator=generator),
            "cond.0": torch.randn(7, 5, generator=generator),
            "cond.1": torch.randn(3, generator=generator),
        }
        for _ in range(3)
    ]
    rows = [{name: tensor.to(dtype) for name, tensor in row.items()} for row in rows]
    shard = write_tar(tmp_path / "a.tar", {f"{n}.latent.safetensors": safetensors.torch.save(row) for n, row in enumerate(rows)})
    samples = source("webdataset", shard).batch(range(3))
    assert samples.images is None and samples.latents is not None and samples.conds is not None
    assert samples.captions == ["", "", ""]
    assert samples.latents.dtype == torch.float32 and [tuple(part.shape) for part in samples.conds] == [(3, 7, 5), (3, 3)]
    order = [next(n for n, row in enumerate(rows) if torch.equal(row["latent"].float(), latent)) for latent in samples.latents]
    assert sorted(order) == [0, 1, 2]
    for part, stacked in enumerate(samples.conds):
        assert torch.equal(stacked, torch.stack([rows[n][f"cond.{part}"].float() for n in order]))


def test_webdataset_latents_without_conditions_need_captions(tmp_path: Path):
    latent = safetensors.torch.save({"latent": torch.zeros(4, 8, 8)})
    samples = source("webdataset", write_tar(tmp_path / "a.tar", {"0.latent.safetensors": latent, "0.txt": b"a"})).batch([0])
    assert samples.captions == ["a"] and samples.conds is None
    with pytest.raises(ValueError, match=r"data.path: sample 0 of .*b.tar: no caption \(and no prepared condition\)"):
        source("webdataset", write_tar(tmp_path / "b.tar", {"0.latent.safetensors": latent})).batch([0])


@pytest.mark.parametrize("url", ["pipe:touch {marker}", "ftp://host/a.tar", "file:/a.tar", "http:a.tar", "{shard}::pipe:touch {marker}"])
def test_webdataset_refuses_addresses_of_other_schemes(url: str, tmp_path: Path):
    marker = tmp_path / "ran"
    shard = image_shard(tmp_path / "a.tar", range(1))
    with pytest.raises(ValueError, match=r"data.path=.*: is not read; give a path with no scheme, or one of http, https, s3"):
        source("webdataset", url.format(marker=marker, shard=shard))
    assert not marker.exists()


@pytest.mark.parametrize("command", ["{pipe:touch MARKER,a}", "{pipe,http}:touch MARKER"])
def test_webdataset_runs_nothing_that_braces_hide(command: str, tmp_path: Path):
    marker = tmp_path / "ran"
    with pytest.raises(ValueError, match=r"data.path"):
        source("webdataset", command.replace("MARKER", str(marker)))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", "a.pickle", "a.pkl", "a.latent.pt", "a.pth", "a.BIN"])
def test_webdataset_refuses_hostile_members(name: str, tmp_path: Path):
    shard = write_tar(tmp_path / "a.tar", {"b.png": encoded(picture()), "b.txt": b"b", name: b"x"})
    with pytest.raises(ValueError, match=r"data.path: .*a.tar holds .* refused"):
        source("webdataset", shard)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_webdataset_refuses_links_and_devices(kind: bytes, tmp_path: Path):
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(ValueError, match=r"data.path: .*a.tar holds 'a.png'.*refused"):
        source("webdataset", shard)


class _Marker:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_webdataset_never_unpickles_an_array(tmp_path: Path):
    marker = tmp_path / "ran"
    data = npy(np.array([_Marker(marker)], dtype=object), allow_pickle=True)
    np.load(io.BytesIO(data), allow_pickle=True)
    assert marker.exists(), "the array is a trap"
    marker.unlink()
    shard = write_tar(tmp_path / "a.tar", {"a.latent.npy": data, "a.txt": b"a"})
    with pytest.raises(ValueError, match=r"data.path: sample a of .*: unreadable latent"):
        source("webdataset", shard).batch([0])
    assert not marker.exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "holds no sample"),
        ({"readme.md": b"x"}, "holds no sample"),
        ({"a.txt": b"a"}, "sample a of .*: no image"),
        ({"a.png": encoded(picture())}, "sample a of .*: no caption"),
        ({"a.latent.npy": npy(np.zeros((4, 8, 8), np.float32))}, "sample a of .*: no caption"),
        ({"a.png": encoded(picture()), "a.txt": b"", "b.latent.npy": npy(np.zeros((4, 8, 8))), "b.txt": b""}, "use one kind"),
    ],
)
def test_webdataset_names_what_is_missing(members: dict[str, bytes], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"data.path.*{message}"):
        source("webdataset", write_tar(tmp_path / "a.tar", members))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.latent.npy": npy(np.zeros((4, 8), np.float32)), "a.txt": b"a"}, r"float `latent` \(C, h, w\)"),
        ({"a.latent.npy": npy(np.zeros((4, 8, 8), np.int64)), "a.txt": b"a"}, r"float `latent` \(C, h, w\)"),
        ({"a.latent.npy": npy(np.zeros((4, 8, 8)))[:200], "a.txt": b"a"}, "sample a of .*: unreadable latent"),
        ({"a.latent.safetensors": b"\x00" * 20, "a.txt": b"a"}, "sample a of .*: unreadable latent"),
        ({"a.latent.safetensors": safetensors.torch.save({"other": torch.zeros(1)}), "a.txt": b"a"}, "sample a"),
        (
            {"a.png": encoded(picture()), "a.json": b'{"caption": "a"}'},
            r"sample a of .*: no caption \(data.caption_column=text, .* has caption",
        ),
        ({"a.png": encoded(picture()), "a.json": b'{"text": 3}'}, "sample a of .*: caption is not text"),
        ({"a.png": encoded(picture()), "a.json": b"{"}, "sample a of .*: caption is not json"),
        ({"a.png": encoded(picture()), "a.txt": b"\xff"}, "sample a of .*: caption is not UTF-8"),
        ({"a.png": encoded(picture()), "a.txt": b" "}, "sample a of .*: empty caption"),
        ({"a.latent.npy": npy(np.full((4, 8, 8), np.nan)), "a.txt": b"a"}, "sample a of .*: not finite"),
    ],
)
def test_webdataset_names_the_sample_that_cannot_be_read(members: dict[str, bytes], message: str, tmp_path: Path):
    data = source("webdataset", write_tar(tmp_path / "a.tar", members))
    with pytest.raises(ValueError, match=f"data.path: .*{message}"):
        data.batch([0])


def test_webdataset_refuses_latents_of_two_sizes_in_a_batch(tmp_path: Path):
    members = {f"{n}.latent.npy": npy(np.zeros((4, 8, 8 + n))) for n in range(2)} | {f"{n}.txt": b"a" for n in range(2)}
    with pytest.raises(ValueError, match=r"data.path: .*one size"):
        source("webdataset", write_tar(tmp_path / "a.tar", members)).batch([0, 1])


def test_webdataset_refuses_conditions_on_some_samples_only(tmp_path: Path):
    rows = [{"latent": torch.zeros(4, 8, 8)}, {"latent": torch.zeros(4, 8, 8), "cond.0": torch.zeros(2)}]
    members = {f"{n}.latent.safetensors": safetensors.torch.save(row) for n, row in enumerate(rows)} | {f"{n}.txt": b"a" for n in range(2)}
    with pytest.raises(ValueError, match=r"data.path: .*prepare all alike"):
        source("webdataset", write_tar(tmp_path / "a.tar", members)).batch([0, 1])


@pytest.mark.parametrize(
    "damage", ["cut in a member", "cut in a header", "cut between members", "broken header", "compressed", "no tar", "empty"]
)
def test_webdataset_refuses_a_broken_shard(damage: str, tmp_path: Path):
    shard = image_shard(tmp_path / "a.tar", range(3))
    with tarfile.open(shard) as archive:
        last = archive.getmembers()[-1]
    whole = shard.read_bytes()
    gzipped = io.BytesIO()
    with tarfile.open(fileobj=gzipped, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    damaged = {
        "cut in a member": whole[: last.offset_data + 1],
        "cut in a header": whole[: last.offset + 100],
        "cut between members": whole[: last.offset],
        "broken header": whole[: last.offset] + b"x" + whole[last.offset + 1 :],
        "compressed": gzipped.getvalue(),
        "no tar": b"hello" * 1000,
        "empty": b"",
    }
    shard.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"data.path.*a.tar: torn shard \(not a whole, uncompressed tar file"):
        source("webdataset", shard)


def test_webdataset_names_missing_shards_and_wrong_patterns(tmp_path: Path):
    image_shard(tmp_path / "a0.tar", range(1))
    with pytest.raises(ValueError, match=r"data.path=.*2 of 3 shards are no files \(first: .*a1.tar\)"):
        source("webdataset", tmp_path / "a{0..2}.tar")
    with pytest.raises(ValueError, match=r"data.path=.* is not a pattern"):
        source("webdataset", tmp_path / "a{0..2.tar")


def test_webdataset_names_a_shard_that_is_cut_while_in_use(tmp_path: Path):
    shard = image_shard(tmp_path / "a.tar", range(3))
    data = source("webdataset", shard)
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"data.path: .*ends early"):
        data.batch(range(3))
