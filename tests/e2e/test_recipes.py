"""Every recipe trains two steps a stage, on tiny pipelines of the real classes and on real files."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as rle
from safetensors import safe_open
from torch import Tensor

from hyper_sd.ablation import run_ablation
from hyper_sd.cli import compose, literal
from hyper_sd.config import run_config
from hyper_sd.data.scenes import captions, render, sample_scenes
from hyper_sd.data.scenes_data import scene_instances
from hyper_sd.paths import asset_dir
from hyper_sd.plan import run_plan
from hyper_sd.report import to_image
from tests.released import write_reward
from tests.runs import STAGES, TSCD_STAGES
from tests.tiny import tiny_decoder, tiny_sd15, tiny_sdxl

SHORT = [f"stages.{stage}.max_steps=2" for stage in STAGES]
GPU_STAGES = (*TSCD_STAGES, "score")  # rewards for real images are chosen by who has them
GPU_SHORT = [f"stages.{stage}.max_steps=2" for stage in GPU_STAGES]


def train(*overrides: str) -> None:
    run_plan(run_config(compose("train", ["engine.cpu_threads=1", *(literal(text) for text in overrides)])))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight captioned PNG files."""
    folder = tmp_path_factory.mktemp("photos")
    scenes = sample_scenes(0, np.arange(8))
    for number, (image, caption) in enumerate(zip(render(scenes), captions(scenes), strict=True)):
        to_image(image).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same in two tar files."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(4 * shard, 4 * shard + 4):
                for suffix in ("png", "txt"):
                    content = (photos / f"{number}.{suffix}").read_bytes()
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "{0..1}.tar")


def check_run(run_dir: Path, rank: int, stages: tuple[str, ...] = STAGES) -> None:
    for stage in stages:
        with safe_open(run_dir / stage / "lora.safetensors", framework="pt") as file:
            assert {file.get_slice(name).get_shape()[0] for name in file.keys() if "lora_down" in name} == {rank}  # noqa: SIM118 - no dict
        assert (run_dir / stage / "grid.png").stat().st_size > 0
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"


def test_sd15_with_another_size_channel_count_and_vocabulary(photos: Path, tmp_path: Path) -> None:
    teacher = tiny_sd15(
        tmp_path / "teacher", image_size=64, latent_channels=3, vocabulary=("a", "photo", "of", "fox"), prediction_type="v_prediction"
    )
    run_dir = tmp_path / "run"
    data = ["data=folder", f"data.path={photos}", "data.batch_size=2", "engine.accumulation=1"]
    train(
        "recipe=sd15",
        f"teacher.path={teacher}",
        *data,
        *GPU_SHORT,
        f"run.dir={run_dir}",
        "eval.prompts=4",
        "eval.teacher_steps=2",
        "lora.rank=8",
    )
    check_run(run_dir, rank=8, stages=GPU_STAGES)
    report = json.loads((run_dir / "report.json").read_text())
    assert report["final"]["1"]["mse_to_teacher"] >= 0 and report["final"]["1"]["accuracy"] is None


def test_sdxl_from_shards(shards: str, tmp_path: Path) -> None:
    teacher, run_dir = tiny_sdxl(tmp_path / "teacher"), tmp_path / "run"
    data = ["data=webdataset", f"data.path={shards}", "data.batch_size=2", "engine.accumulation=2"]
    train(
        "recipe=sdxl",
        f"teacher.path={teacher}",
        *data,
        *GPU_SHORT,
        f"run.dir={run_dir}",
        "eval.prompts=0",
        "eval.teacher_steps=2",
        "lora.rank=8",
    )
    check_run(run_dir, rank=8, stages=GPU_STAGES)


@pytest.fixture(scope="module")
def annotated(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same photos with the masks of their objects, and a segmenter that calls the shapes by names of COCO."""
    folder = tmp_path_factory.mktemp("coco")
    names = ("person", "airplane", "couch", "tv", "dog")
    images = [{"id": i, "file_name": f"{i}.png", "height": 32, "width": 32} for i in range(8)]
    objects = [
        {"id": 10 * i + place, "image_id": i, "category_id": int(label), "segmentation": encoded(mask), "iscrowd": 0}
        for i, found in enumerate(scene_instances(sample_scenes(0, np.arange(8)), 32))
        for place, (mask, label) in enumerate(zip(found.masks, found.labels, strict=True))
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    texts = [{"image_id": i, "caption": (photos / f"{i}.txt").read_text()} for i in range(8)]
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    (folder / "captions.json").write_text(json.dumps({"annotations": texts}))
    segmenter = Path(shutil.copytree(asset_dir("segmenter"), folder / "segmenter"))
    facts = json.loads((segmenter / "config.json").read_text())
    facts["id2label"] = dict(enumerate(("person", "aeroplane", "sofa", "tvmonitor", "dog")))
    (segmenter / "config.json").write_text(json.dumps(facts))
    files = [f"data.annotations={folder / 'instances.json'}", f"data.captions={folder / 'captions.json'}"]
    return ["data=coco", f"data.path={photos}", *files, "segmenter=mask2former", f"segmenter.path={segmenter}"]


def encoded(mask: Tensor) -> dict[str, object]:
    code = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": [32, 32], "counts": code["counts"].decode()}


def small_rewards(folder: Path) -> list[str]:
    """Overrides for tiny models in the place of the released ones of the feedback recipes."""
    chosen = {"rewards.image_reward": "image_reward", "rewards.aesthetic": "aesthetic", "heldout": "pickscore"}
    changes = []
    for key, kind in chosen.items():
        (folder / kind).mkdir()
        config = write_reward(kind, folder / kind)
        parts = {key: config, **({f"{key}.base": config.base} if config.base else {})}
        for place, files in parts.items():
            changes += [f"{place}.path={files.path}", f"{place}.file={files.file}", f"{place}.sha256=null"]
    return changes


FEEDBACK = [
    "only=[tscd_1,refl]",
    "stages.tscd_1.max_steps=2",
    "stages.refl.max_steps=2",
    "stages.refl.guard={every_steps: 2, prompts: 2, steps: [1], patience: 3}",
    "lora.rank=8",
]


def test_sd15_with_feedback_and_the_perceptual_term(annotated: list[str], tmp_path: Path) -> None:
    """On annotated photos, decoded by a tiny decoder: everything that the stage can be trained on at once."""
    teacher, run_dir = tiny_sd15(tmp_path / "teacher", image_size=64, latent_channels=3), tmp_path / "run"
    tiny = [f"decode.tiny.path={tiny_decoder(tmp_path / 'tiny', latent_channels=3)}", "decode.tiny.sha256=null"]
    small = ["data.batch_size=2", "engine.accumulation=2", "eval.prompts=0", "eval.teacher_steps=2", f"run.dir={run_dir}"]
    perceptual = ["stages.refl.perceptual_weight=0.1", *annotated, "+decoder@decode.tiny=taesd", *tiny]
    train("recipe=sd15_feedback", f"teacher.path={teacher}", *perceptual, *small_rewards(tmp_path), *FEEDBACK, *small)
    check_run(run_dir, rank=8, stages=("tscd_1", "refl"))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = {name.rpartition("/")[2]: value for row in rows for name, value in row.items()}
    terms = ("reward_image_reward", "reward_aesthetic", "grad_aesthetic", "reference", "perceptual", "grad_perceptual")
    assert all(np.isfinite(logged[name]) for name in terms) and logged["grad_perceptual"] > 0
    assert len(json.loads((run_dir / "refl" / "guard.json").read_text())["history"]) == 2


def test_sdxl_with_feedback(shards: str, tmp_path: Path) -> None:
    teacher, run_dir = tiny_sdxl(tmp_path / "teacher"), tmp_path / "run"
    data = ["data=webdataset", f"data.path={shards}", "data.batch_size=2", "engine.accumulation=1", "eval.prompts=0"]
    train("recipe=sdxl_feedback", f"teacher.path={teacher}", *data, *small_rewards(tmp_path), *FEEDBACK, f"run.dir={run_dir}")
    check_run(run_dir, rank=8, stages=("tscd_1", "refl"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["stages.refl.perceptual_weight=0.1"], r"stages\.refl\.perceptual_weight needs a segmenter, and there is none"),
        (["stages.refl.perceptual_weight=0.1", "segmenter=embedded", "data=folder", "data.path={photos}"], "data=folder has no instances"),
        (["segmenter=embedded", "decode.tiny={path: '{photos}'}"], r"decode\.tiny\.path=\S+ holds no config\.json"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(changes: list[str], message: str, photos: Path, tmp_path: Path) -> None:
    overrides = [change.replace("{photos}", str(photos)) for change in changes]
    with pytest.raises(ValueError, match=message):
        train("recipe=smoke", "only=[refl]", *overrides, f"run.dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("recipe", "stages"), [("demo", STAGES), ("demo_long", TSCD_STAGES), ("cfg_preserving", TSCD_STAGES)])
def test_demo_recipes(recipe: str, stages: tuple[str, ...], tmp_path: Path) -> None:
    teacher, run_dir = tiny_sd15(tmp_path / "teacher"), tmp_path / "run"
    tiny = [
        f"teacher.path={teacher}",
        "data.batch_size=4",
        "eval.prompts=8",
        "eval.teacher_steps=2",
        "eval.reference=64",
        "eval.negatives=4",
    ]
    train(f"recipe={recipe}", *tiny, *SHORT[: len(stages)], f"run.dir={run_dir}")
    check_run(run_dir, rank=32, stages=stages)


def test_a_dedicated_one_step_model(tmp_path: Path) -> None:
    teacher, run_dir = tiny_sd15(tmp_path / "teacher"), tmp_path / "run"
    tiny = [f"teacher.path={teacher}", "data.batch_size=4", "eval.prompts=8", "eval.teacher_steps=2", "eval.reference=64"]
    dedicated = ["only=[tscd_1,score]", "stages.score.rollout=[1]", "stages.score.start=800", "eval.negatives=4"]
    train("recipe=demo", *tiny, *SHORT, *dedicated, f"run.dir={run_dir}")
    report = json.loads((run_dir / "report.json").read_text())
    assert list(report["final"]) == ["1"] and report["sampler"]["final"]["1"]["timesteps"] == [800]
    assert list(report["stages"]) == ["tscd_1", "score"]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_trackers(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    teacher, run_dir = tiny_sd15(tmp_path / "teacher"), tmp_path / "run"
    tiny = [f"teacher.path={teacher}", "data.batch_size=4", "eval.prompts=0", "eval.judge=null", "eval.teacher_steps=2", "only=[tscd_8]"]
    train("recipe=smoke", *tiny, "stages.tscd_8.max_steps=2", f"run.dir={run_dir}", f"tracker={tracker}")
    written = list(run_dir.rglob("events.out.tfevents*" if tracker == "tensorboard" else "offline-run-*"))
    assert written


@pytest.mark.slow
@pytest.mark.timeout(400)  # the whole chain and its evaluation, up to four times
@pytest.mark.parametrize(
    ("recipe", "seeds", "short", "rows"),
    [
        (
            "demo_ablation",
            2,
            [*SHORT[:-2], "plans.single_stage.consistency.max_steps=8"],
            {"full": {"stage k = 4 at 4 steps", "final at 2 steps"}, "single_stage": {"final at 1 step", "final at 2 steps"}},
        ),
        (
            "ablation",
            1,
            [*GPU_SHORT, "plans.dmd.score.max_steps=18", "plans.tcd_dmd.tcd.max_steps=8"],
            {"full": {"before score at 2 steps", "final at 1 step"}, "dmd": {"final at 1 step"}, "tcd_dmd": {"before score at 2 steps"}},
        ),
    ],
)
def test_an_ablation_makes_its_table(recipe: str, seeds: int, short: list[str], rows: dict[str, set[str]], tmp_path: Path) -> None:
    teacher, run_dir = tiny_sd15(tmp_path / "teacher"), tmp_path / "run"
    tiny = [f"teacher.path={teacher}", "data.batch_size=4", "lora.rank=4", "engine.cpu_threads=1"]
    tiny += ["eval.prompts=8", "eval.teacher_steps=2", "eval.reference=64"]
    run_ablation(run_config(compose("train", [f"recipe={recipe}", f"seeds={seeds}", *tiny, *short, f"run.dir={run_dir}"])))
    plans = json.loads((run_dir / "ablation.json").read_text())["plans"]
    assert plans.keys() == rows.keys() and all(rows[name] <= plans[name].keys() for name in rows)
    assert all(len(values) == seeds for found in plans.values() for row in found.values() for values in row.values())
    assert "| final at 2 steps | accuracy |" in (run_dir / "ablation.md").read_text()
