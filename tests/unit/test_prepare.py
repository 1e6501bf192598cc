"""Preparing on tiny real teachers: what is kept, what is dropped and why, and that training on the cache is training on the data."""

import csv
import json
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hyper_sd.cli import compose, literal
from hyper_sd.commands import PrepareConfig
from hyper_sd.config import DataConfig
from hyper_sd.data import BadSamples, Samples, build_source
from hyper_sd.data.cache import CacheSource, Manifest
from hyper_sd.data.images import decode, place
from hyper_sd.data.prompts import PromptsSource
from hyper_sd.data.scenes import captions, render, sample_scenes
from hyper_sd.job import Feed
from hyper_sd.prepare.build import Score, prepare
from hyper_sd.processes import Processes
from hyper_sd.rewards import build_reward
from hyper_sd.structured import resolved, structured
from hyper_sd.teachers import Teacher, load_teacher
from tests.caches import write_cache
from tests.fixtures.render import CAPTION, PHOTOS, landscape
from tests.runs import adapters, assert_same, train
from tests.shards import encoded, image_folder, picture, write_tar
from tests.tiny import tiny_sd15, tiny_sdxl


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"), image_size=32)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd15(tmp_path_factory.mktemp("sd15"), image_size=32)


@pytest.fixture(scope="module")
def processes() -> Processes:
    return Processes(cpu_threads=1)


def config(teacher: Path, out: Path, *overrides: str) -> PrepareConfig:
    family = "sdxl" if (teacher / "tokenizer_2").is_dir() else "sd15"
    given = [f"teacher={family}", f"teacher.path={teacher}", f"out={out}", "encode_batch=3", *map(literal, overrides)]
    return structured(PrepareConfig, resolved(compose("prepare", given)))


def made(teacher: Path, out: Path, processes: Processes, *overrides: str, score: Score | None = None) -> Manifest:
    manifest = prepare(config(teacher, out, *overrides), processes, score)
    assert manifest is not None
    return manifest


def loaded(teacher: Path) -> Teacher:
    return load_teacher(config(teacher, Path("unused"), "data.path=unused").teacher, torch.device("cpu"), torch.float32)


def numbered(path: Path, num: int) -> Path:
    """Photos that differ, captioned by their numbers."""
    path.mkdir()
    for number in range(num):
        picture(40 + number % 3, 32, (number * 7 % 255, 90, 255 - number * 5)).save(path / f"{number:03}.png")
        (path / f"{number:03}.txt").write_text(f"a red circle {number}")
    return path


def latents_of(out: Path) -> dict[str, torch.Tensor]:
    source = CacheSource(str(out), 0, 1)
    rows = [source.row(index) for index in range(source.num_samples)]
    return {row.caption: row.latent for row in rows}


def files_of(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir() if file.suffix in (".tar", ".json", ".jsonl", ".safetensors")}


def test_every_photo_is_kept_or_dropped_for_a_reason(sdxl: Path, tmp_path: Path, processes: Processes, capsys: Any) -> None:
    out = tmp_path / "cache"
    filters = ("filters.min_side=20", "filters.max_ratio=3", "filters.min_sharpness=50")
    options = ("data=folder", f"data.path={PHOTOS}", "data.max_bad_fraction=0.5", "data.num_workers=2", "shard_size=7")
    manifest = made(sdxl, out, processes, *options, *filters, "embeddings=true", "dtype=fp32")
    assert manifest.dropped == {
        "unreadable image": 2, "too many pixels": 1, "no caption": 1, "empty caption": 1, "caption is not UTF-8": 1,
        "filter: min_side": 1, "filter: max_ratio": 1, "filter: min_sharpness": 1,
    }  # fmt: skip
    assert manifest.num_read == 19 and manifest.num_samples == 10 and manifest.buckets == {"32x32": 10}
    listed = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert {Path(sample["name"]).name: sample["reason"] for sample in listed}["blurred.jpg"] == "filter: min_sharpness" and len(listed) == 9
    printed = capsys.readouterr().out
    assert "kept 10 of 19 (52.6%)" in printed and "filter: max_ratio" in printed and "contact_sheet.png" in printed
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width == 6 * 192 and np.asarray(sheet).std() > 10
    teacher, source = loaded(sdxl), CacheSource(str(out), 0, 4, fingerprint=loaded(sdxl).fingerprint)
    row = next(row for row in map(source.row, range(10)) if row.caption == f"{CAPTION}, plain")
    placed = place(decode(PHOTOS / "plain.jpg", ""), 32, 32)
    torch.testing.assert_close(row.latent, teacher.encode_images(placed.tensor()[None])[0], atol=1e-5, rtol=1e-4)
    for found, expected in zip(row.cond[:2], teacher.encode_prompts([row.caption])[:2], strict=True):
        torch.testing.assert_close(found, expected[0], atol=1e-5, rtol=1e-4)
    assert row.sizes == (64, 96, 0, 8, 32, 32) == placed.sizes


def test_buckets_keep_the_shape_and_sizes_reach_sdxl(sdxl: Path, tmp_path: Path, processes: Processes) -> None:
    folder, out = tmp_path / "photos", tmp_path / "cache"
    folder.mkdir()
    for number, (width, height) in enumerate([(90, 50), (50, 90), (60, 60)] * 4):
        landscape(width, height).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a circle {number}")
    manifest = made(sdxl, out, processes, "data=folder", f"data.path={folder}", "buckets={step: 8, max_ratio: 2.5}")
    assert manifest.buckets == {"40x24": 4, "24x40": 4, "32x32": 4}
    run = train(
        sdxl, tmp_path / "run", "teacher=sdxl", f"teacher.path={sdxl}", "data=cache", f"data.path={out}", "only=[tscd_2]",
        "data.batch_size=2", "engine.accumulation=2", "stages.tscd_2.max_steps=12",
    )  # fmt: skip
    rows = [row for line in (run / "metrics.jsonl").read_text().splitlines() if "checkpoint_s" not in (row := json.loads(line))]
    assert [row["bad_samples"] for row in rows] == [0, 0] and all(0 <= row["data_wait"] < 1 for row in rows)
    with pytest.raises(ValueError, match=r"stages.tscd_2.batch_size=4: .* groups of data.batch_size=2; all stages must have the same"):
        train(
            sdxl, tmp_path / "other", "teacher=sdxl", f"teacher.path={sdxl}", "data=cache", f"data.path={out}", "only=[tscd_2]",
            "data.batch_size=2", "stages.tscd_2.batch_size=4",
        )  # fmt: skip


def test_what_is_stored_reaches_the_batch(sdxl: Path, tmp_path: Path) -> None:
    teacher = loaded(sdxl)
    source = CacheSource(str(write_cache(tmp_path / "cache", [[(64, 64), (48, 80)] * 2])), 0, 2)
    feed = Feed(source, teacher, 0, BadSamples(tmp_path / "bad.jsonl", 0.5), lambda prompts, positions: torch.zeros(0))
    for positions in (range(2), range(2, 4)):
        batch = feed.batch(source.batch(positions), positions, step=0)
        for cond in (batch.cond, batch.uncond):
            assert cond[2].tolist() == [[100, 200, 3, 4, 8 * batch.x0.shape[2], 8 * batch.x0.shape[3]]] * 2
        assert batch.draws.samples == tuple(positions)


def test_nothing_is_encoded_or_drawn_for_a_stage_that_looks_at_no_latents(sdxl: Path, tmp_path: Path) -> None:
    def draw(prompts: Sequence[str], positions: Sequence[int]) -> torch.Tensor:
        raise AssertionError("25 guided steps of the teacher for nothing")

    teacher = loaded(sdxl)
    teacher.pipeline.vae.encoder.register_forward_hook(lambda *_: pytest.fail("encoded for nothing"))
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    feed = Feed(PromptsSource(str(tmp_path / "prompts.txt"), 0), teacher, 0, BadSamples(tmp_path / "bad.jsonl", 0.5), draw)
    for samples in (feed.source.batch(range(2)), Samples(["a", "b"], images=torch.rand(2, 3, 32, 32))):
        x0 = feed.batch(samples, range(2), step=0, latents=False).x0
        assert x0.shape == (2, *teacher.latent_shape) and not x0.any()


def test_time_ids_are_the_sizes_of_the_samples(sdxl: Path) -> None:
    teacher, sizes = loaded(sdxl), torch.tensor([[64.0, 96, 0, 8, 32, 32], [10, 20, 3, 4, 24, 40]])
    cond = teacher.with_sizes(teacher.encode_prompts(["a", "b"]), sizes)
    assert torch.equal(cond[2], sizes)
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    plain = teacher.forward(x_t, t, teacher.encode_prompts(["a", "b"]))
    assert not torch.allclose(teacher.forward(x_t, t, cond), plain)


@pytest.mark.slow
def test_a_run_on_the_cache_is_the_run_on_the_photos(sdxl: Path, tmp_path: Path, processes: Processes) -> None:
    folder, out = numbered(tmp_path / "photos", 10), tmp_path / "cache"
    made(sdxl, out, processes, "data=folder", f"data.path={folder}", "dtype=fp32", "embeddings=true", "shard_size=4", "sheet=0")
    # Adam with its own eps would make of the last bits of a latent, where a gradient is next to nothing, a step of full length
    common = ("teacher=sdxl", f"teacher.path={sdxl}", "only=[tscd_2]", "optimizer.eps=1e-3")
    raw = train(sdxl, tmp_path / "raw", *common, "data=folder", f"data.path={folder}")
    cached = train(sdxl, tmp_path / "cached", *common, "data=cache", f"data.path={out}", "data.num_workers=2")
    assert_same(adapters(raw), adapters(cached), tolerance=1e-4)


def test_all_forms_of_one_data_set_make_the_same_latents(sd15: Path, tmp_path: Path, processes: Processes) -> None:
    import datasets

    folder = numbered(tmp_path / "photos", 5)
    rows = [{"file_name": f"{number:03}.png", "text": f"a red circle {number}"} for number in range(5)]
    forms = {"folder": ("data=folder", f"data.path={folder}")}
    for suffix in ("jsonl", "csv", "parquet", "json"):
        copy = tmp_path / suffix
        copy.mkdir()
        for row in rows:
            shutil.copy(folder / row["file_name"], copy)
            if suffix == "json":
                (copy / row["file_name"]).with_suffix(".json").write_text(json.dumps({"text": row["text"]}))
        forms[suffix] = ("data=folder", f"data.path={copy}")
    (tmp_path / "jsonl" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "csv" / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "parquet" / "metadata.parquet")
    images = {"image": [str(folder / row["file_name"]) for row in rows], "text": [row["text"] for row in rows]}
    whole = datasets.Dataset.from_dict(images).cast_column("image", datasets.Image())
    whole.save_to_disk(tmp_path / "arrow")  # paths
    stored = [{"image": {"bytes": (folder / row["file_name"]).read_bytes(), "path": None}, "text": row["text"]} for row in rows]
    for index, part in enumerate((stored[:3], stored[3:])):
        (tmp_path / "hf").mkdir(exist_ok=True)
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        data = datasets.Dataset.from_list(part, features=features)
        data.to_parquet(tmp_path / "hf" / f"train-{index:05}-of-00002.parquet")
    forms["hf parquet"] = ("data=hf", f"data.path={tmp_path / 'hf'}")
    forms["hf arrow"] = ("data=hf", f"data.path={tmp_path / 'arrow'}")
    members = {f"{n:03}.png": (folder / f"{n:03}.png").read_bytes() for n in range(5)}
    members |= {f"{n:03}.txt": f"a red circle {n}".encode() for n in range(5)}
    forms["webdataset"] = ("data=webdataset", f"data.path={write_tar(tmp_path / 'a.tar', members)}")
    found = {}
    for name, overrides in forms.items():
        made(sd15, tmp_path / f"cache {name}", processes, *overrides, "shard_size=2", "sheet=0")
        found[name] = latents_of(tmp_path / f"cache {name}")
    for name, latents in found.items():
        assert latents.keys() == {row["text"] for row in rows}, name
        assert all(torch.allclose(latents[key], found["folder"][key], atol=2e-3) for key in latents), name


def test_captions_that_come_again_are_dropped_across_units_and_parts(sd15: Path, tmp_path: Path, processes: Processes) -> None:
    folder, out = image_folder(tmp_path / "photos", 12), tmp_path / "cache"
    for number in range(12):
        (folder / f"{number:03}.txt").write_text(f"number {number % 5}")
    manifest = made(sd15, out, processes, f"data.path={folder}", "filters.unique_captions=true", "shard_size=4", "sheet=0")
    assert [shard["num_samples"] for shard in manifest.shards] == [4, 1, 0] and manifest.num_samples == 5
    listed = [json.loads(line)["name"] for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert sorted(listed) == [str(folder / f"{number:03}.png") for number in range(5, 12)]
    assert manifest.dropped == {"filter: unique_captions": 7} and latents_of(out).keys() == {f"number {n}" for n in range(5)}
    data = build_source(DataConfig(kind="cache", path=str(out), batch_size=5), seed=0, image_size=32)
    assert len(set(data.batch(range(5)).captions)) == 5


def test_what_scores_low_is_dropped(sd15: Path, tmp_path: Path, processes: Processes) -> None:
    folder = image_folder(tmp_path / "photos", 10)

    def score(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        assert images.shape[1:] == (3, 32, 32) and images.min() >= 0 and images.max() <= 1 and len(prompts) == len(images)
        return (images[:, 0].mean((1, 2)) * 255).round()

    overrides = (f"data.path={folder}", "filters.min_aesthetic=6", "sheet=0")
    manifest = made(sd15, tmp_path / "cache", processes, *overrides, score=score)
    assert manifest.num_samples == 4 and manifest.dropped == {"filter: min_aesthetic": 6}
    with pytest.raises(ValueError, match=r"filters.min_aesthetic=6.0 needs a scorer"):
        made(sd15, tmp_path / "other", processes, *overrides)


def test_the_reward_model_that_is_asked_for_filters(sd15: Path, tmp_path: Path, processes: Processes) -> None:
    folder = tmp_path / "scenes"
    folder.mkdir()
    chosen = sample_scenes(5, np.arange(6))
    pixels, texts = (render(chosen).permute(0, 2, 3, 1) * 255).round().byte().numpy(), captions(chosen)
    for number in range(6):
        for name, text in (("own", texts[number]), ("other", texts[(number + 3) % 6])):
            Image.fromarray(pixels[number]).save(folder / f"{number}_{name}.png")
            (folder / f"{number}_{name}.txt").write_text(text)
    scorer = config(sd15, tmp_path / "cache", f"data.path={folder}", "+reward@scorer=embedded").scorer
    assert scorer is not None
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).repeat(2, 1, 1, 1) / 255
    scores = build_reward(scorer, torch.device("cpu")).score(images, [*texts, *texts[3:], *texts[:3]])
    least = float(scores.sort().values[5:7].mean())
    options = (f"data.path={folder}", "+reward@scorer=embedded", "sheet=0")
    manifest = made(sd15, tmp_path / "cache", processes, *options, f"filters.min_aesthetic={least}")
    assert manifest.dropped == {"filter: min_aesthetic": 6} and (scores[:6] > least).sum() >= 5
    left_out = {json.loads(line)["name"] for line in (tmp_path / "cache" / "dropped.jsonl").read_text().splitlines()}
    names = [str(folder / f"{number}_{name}.png") for name in ("own", "other") for number in range(6)]
    assert left_out == {name for name, score in zip(names, scores.tolist(), strict=True) if score < least}
    with pytest.raises(ValueError, match=r"filters.min_aesthetic=None needs a scorer, .* and a scorer needs it; give both or none"):
        made(sd15, tmp_path / "other", processes, *options)


def test_the_teacher_draws_what_has_no_image(sd15: Path, tmp_path: Path, processes: Processes) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a circle {number}\n" for number in range(6)))
    options = (f"data.path={prompts}", "data.teacher_steps=2")
    manifest = made(sd15, tmp_path / "cache", processes, "data=prompts", *options, "sheet=6")
    assert manifest.num_samples == 6
    made(sd15, tmp_path / "again", processes, "data=prompts", *options, "encode_batch=2")
    first, second = latents_of(tmp_path / "cache"), latents_of(tmp_path / "again")
    assert len(first) == 6 and first.keys() == second.keys()
    for prompt, latent in first.items():
        torch.testing.assert_close(latent, second[prompt], rtol=1e-2, atol=1e-2)  # in fp16
    live, again = (train(sd15, tmp_path / name, "data=prompts", *options, "only=[tscd_2]") for name in ("live", "live again"))
    assert_same(adapters(live), adapters(again))
    train(sd15, tmp_path / "cached", "data=cache", f"data.path={tmp_path / 'cache'}", "only=[tscd_2]")


def test_going_on_gives_the_same_files_and_finished_work_is_not_done_again(sd15: Path, tmp_path: Path, processes: Processes) -> None:
    folder, straight, broken = numbered(tmp_path / "photos", 11), tmp_path / "straight", tmp_path / "broken"
    for part, numbers in enumerate((range(6), range(6, 11))):
        members = {f"{n}.png": (folder / f"{n:03}.png").read_bytes() for n in numbers}
        write_tar(tmp_path / f"{part}.tar", members | {f"{n}.txt": f"a circle {n}".encode() for n in numbers})
    small = ("shard_size=2", "sheet=0", "encode_batch=1", "filters.min_aesthetic=0")
    options = ("data=webdataset", f"data.path={tmp_path}/{{0..1}}.tar", *small)
    calls = 0

    def score(images: torch.Tensor, _: list[str]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return torch.ones(len(images))

    for done in (1, 2, 3):
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            made(sd15, broken, processes, *options, score=score)
        assert not (broken / "dataset.json").exists() and not list(broken.glob(".*partial")) and len(list(broken.glob("*.tar"))) == done
    calls = -100
    made(sd15, broken, processes, *options, score=score)
    assert calls == -95, "eleven images, six of them were done"
    made(sd15, straight, processes, *options, score=score)
    assert files_of(broken) == files_of(straight)
    calls = 3
    made(sd15, broken, processes, *options, score=score)
    assert calls == 3, "a finished cache is left alone"


def test_a_full_disk_is_one_error_and_going_on_works(sd15: Path, tmp_path: Path, processes: Processes) -> None:
    folder, out = numbered(tmp_path / "photos", 8), tmp_path / "cache"
    options = (f"data.path={folder}", "sheet=0", "dtype=fp32")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
    try:
        with pytest.raises(ValueError, match=r"out=.*cache cannot be written: .*the same command goes on"):
            made(sd15, out, processes, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(out.glob("*.tar*")) and not (out / "dataset.json").exists()
    assert made(sd15, out, processes, *options).num_samples == 8


def test_what_the_dtype_cannot_hold_is_dropped(sd15: Path, tmp_path: Path, processes: Processes) -> None:
    teacher, folder = tmp_path / "teacher", numbered(tmp_path / "photos", 3)
    shutil.copytree(sd15, teacher)
    config = json.loads((teacher / "vae" / "config.json").read_text())
    (teacher / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 1e9}))
    with pytest.raises(ValueError, match=r"no sample is left of 3: {'not finite': 3}"):
        made(teacher, tmp_path / "cache", processes, f"data.path={folder}", "sheet=0")
    listed = [json.loads(line) for line in (tmp_path / "cache" / "dropped.jsonl").read_text().splitlines()]
    assert [Path(sample["name"]).name for sample in listed] == ["000.png", "001.png", "002.png"]
    assert made(teacher, tmp_path / "fp32", processes, f"data.path={folder}", "sheet=0", "dtype=fp32").num_samples == 3


@pytest.mark.parametrize("file", ["dropped.jsonl", "contact_sheet.png"])
def test_a_disk_that_is_full_at_the_end_is_the_same_error(file: str, sd15: Path, tmp_path: Path, processes: Processes) -> None:
    folder, out = numbered(tmp_path / "photos", 4), tmp_path / "cache"
    for number in range(90 if file == "dropped.jsonl" else 0):
        (folder / f"{number:03}x.png").write_bytes(b"")
    options = (f"data.path={folder}", "sheet=4", "shard_size=5", "data.max_bad_fraction=1")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        with pytest.raises(ValueError, match=r"out=.*cache cannot be written: .*the same command goes on"):
            made(sd15, out, processes, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (out / file).exists() and (out / "00000-00000.tar").exists() and not list(out.glob(".*partial"))
    assert made(sd15, out, processes, *options).num_samples == 4 and (out / "contact_sheet.png").exists()


def test_what_is_refused(sd15: Path, sdxl: Path, tmp_path: Path, processes: Processes) -> None:
    import datasets

    folder, out = image_folder(tmp_path / "photos", 4), tmp_path / "cache"
    options = (f"data.path={folder}", "sheet=0")
    with pytest.raises(ValueError, match=r"no sample is left of 4: {'filter: min_side': 4}; see .*dropped.jsonl"):
        made(sd15, tmp_path / "none", processes, *options, "filters.min_side=1000")
    made(sd15, out, processes, *options)
    with pytest.raises(ValueError, match=r"was begun with dtype=fp16, now dtype=fp32; give another directory"):
        made(sd15, out, processes, *options, "dtype=fp32")
    picture().save(folder / "004.png")
    (folder / "004.txt").write_text("one more")
    with pytest.raises(ValueError, match=r"was begun with found=.*'known_entries': 4.*now found=.*'known_entries': 5"):
        made(sd15, out, processes, *options)
    with pytest.raises(ValueError, match=r"out=.*photos is not empty"):
        made(sd15, folder, processes, *options)
    with pytest.raises(ValueError, match=r"buckets.step=6 must"):
        made(sd15, tmp_path / "x", processes, *options, "buckets={step: 6, max_ratio: 2}")
    with pytest.raises(ValueError, match=r"data=scenes cannot be prepared"):
        made(sd15, tmp_path / "x", processes, "data=scenes")
    (tmp_path / "hf").mkdir()
    datasets.Dataset.from_dict({"image": ["x"], "text": ["y"]}).to_parquet(tmp_path / "hf" / "train.parquet")
    with pytest.raises(ValueError, match=r"data.caption_column=label: the data set has the columns"):
        made(sd15, tmp_path / "x", processes, "data=hf", f"data.path={tmp_path / 'hf'}", "data.caption_column=label")
    with pytest.raises(ValueError, match=r"6 of 19 samples are bad, more than data.max_bad_fraction=0.01"):
        made(sd15, tmp_path / "y", processes, f"data.path={PHOTOS}", "data.max_bad_fraction=0.01")
    hostile = write_tar(tmp_path / "a.tar", {"../a.png": encoded(picture()), "a.txt": b"a"})
    with pytest.raises(ValueError, match=r"holds '../a.png'.*refused"):
        made(sd15, tmp_path / "z", processes, "data=webdataset", f"data.path={hostile}")
    assert not (tmp_path / "a.png").exists() and not (tmp_path / "x").exists()
    common = ("data=cache", f"data.path={out}", "only=[tscd_2]")
    with pytest.raises(ValueError, match=r"was prepared for another teacher, .*: pipeline, unet_sha256 differ; change teacher.path"):
        train(sdxl, tmp_path / "run", "teacher=sdxl", f"teacher.path={sdxl}", *common)
    with pytest.raises(ValueError, match=r"was prepared with another VAE than that of teacher.path"):
        train(tiny_sd15(tmp_path / "other", seed=1), tmp_path / "run", *common)


def test_bad_samples_are_in_the_metrics_and_the_list_of_a_run(sd15: Path, tmp_path: Path) -> None:
    folder = numbered(tmp_path / "photos", 6)
    (folder / "003.png").write_bytes(b"not an image")
    options = ("data=folder", f"data.path={folder}", "only=[tscd_8]", "stages.tscd_8.max_steps=12", "engine.checkpoint_every_steps=12")
    run = train(sd15, tmp_path / "run", *options, "data.max_bad_fraction=0.5")
    rows = [row for line in (run / "metrics.jsonl").read_text().splitlines() if "checkpoint_s" not in (row := json.loads(line))]
    assert rows[0]["bad_samples"] >= 6 and rows[1]["bad_samples"] == 8  # one an epoch of six positions, 48 of them
    (listed,) = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert listed["name"].endswith("003.png") and listed["reason"] == "unreadable image"
    with pytest.raises(ValueError, match=r"samples read were bad, more than data.max_bad_fraction=0.02"):
        train(sd15, tmp_path / "other", *options, "data.max_bad_fraction=0.02")
