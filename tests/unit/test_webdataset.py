import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from hyper_sd.config import DataConfig
from hyper_sd.data import build_source
from tests.shards import encoded, image_shard, npy, number_of, picture, source, write_tar


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
