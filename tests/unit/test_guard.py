"""A held-out reward ends a stage that hacks the others, and the best adapter is kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hyper_sd.checkpoint import latest_checkpoint
from hyper_sd.cli import compose
from hyper_sd.config import run_config
from hyper_sd.guard import falls
from hyper_sd.plan_checks import check_plan
from hyper_sd.teachers import inspect_teacher
from tests.released import write_reward
from tests.runs import adapters, assert_same, train
from tests.tiny import tiny_sd15

HACKED = (
    "only=[refl]",
    "data.batch_size=8",
    "stages.refl.max_steps=8",
    "stages.refl.rollout=[1]",
    "stages.refl.reference_weight=0",
    "stages.refl.optimizer.lr=5e-3",
    "stages.refl.guard={every_steps: 1, patience: 2, steps: [1]}",
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd15(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny aesthetic predictors on one CLIP model. `against` has its last layer turned round: it and `trained` cannot rise together."""
    folder = tmp_path_factory.mktemp("predictors")
    write_reward("aesthetic", folder)
    head = torch.load(folder / "aesthetic.pt", weights_only=True)
    for name, factor in (("trained", 1), ("against", -1), ("along", 2)):
        (folder / name).mkdir()
        turned = {key: factor * value if key.startswith("layers.7.") else value for key, value in head.items()}
        save_file(turned, folder / name / "head.safetensors")
    return folder


def judged_by(predictors: Path, heldout: str) -> tuple[str, ...]:
    """The run is trained on one predictor, and another is held out."""
    base = f"{{path: {predictors / 'clip'}, file: model.safetensors}}"
    files = [
        f"{{kind: aesthetic, path: {predictors / name}, file: head.safetensors, base: {base}, alpha: 50}}" for name in ("trained", heldout)
    ]
    return ("~rewards.embedded", f"++rewards.mine={files[0]}", "~heldout", f"++heldout={files[1]}")


def history(run_dir: Path) -> list[dict[str, float]]:
    return _guard(run_dir)["history"]


def _guard(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "refl" / "guard.json").read_text())


def test_only_falls_in_a_row_while_the_trained_rewards_rise_count() -> None:
    def rows(*pairs: tuple[float, float]) -> list[dict[str, float]]:
        return [{"heldout": heldout, "trained": trained} for heldout, trained in pairs]

    assert falls(rows()) == falls(rows((1, 0))) == falls(rows((1, 0), (2, 1))) == 0
    assert falls(rows((3, 0), (2, 1), (1, 2))) == 2
    assert falls(rows((3, 0), (2, 1), (2, 2))) == 0
    assert falls(rows((3, 0), (2, 1), (4, 2), (3, 3))) == 1
    assert falls(rows((3, 0), (2, 1), (1, 1))) == 0


@pytest.mark.slow
def test_a_run_that_hacks_its_reward_is_stopped_and_hands_on_the_best(
    teacher: Path, predictors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hacked = (*HACKED, *judged_by(predictors, "against"))
    run_dir = train(teacher, tmp_path / "run", *hacked)
    seen = history(run_dir)
    assert [row["step"] for row in seen] == [0, 1, 2] and falls(seen) == 2 and _guard(run_dir)["kept"] == 0
    assert "refl: ended at step 2: the held-out reward fell 2 times in a row" in capsys.readouterr().out
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "samples_per_s" in row] == [2]  # its last steps are logged
    student = adapters(run_dir)
    assert all(not value.any() for name, value in student.items() if "lora_up" in name)  # best before the first step: nothing was learnt
    watched = train(teacher, tmp_path / "watched", *hacked, "stages.refl.guard.patience=null", "stages.refl.guard.keep=last")
    assert history(watched)[:3] == seen and len(history(watched)) == 9 and _guard(watched)["kept"] == 8
    unguarded = train(teacher, tmp_path / "unguarded", *hacked, "stages.refl.guard=null")
    assert any(value.any() for name, value in adapters(unguarded).items() if "lora_up" in name)
    assert_same(adapters(watched), adapters(unguarded))


@pytest.mark.slow
def test_what_the_heldout_reward_likes_goes_on_and_a_continued_run_is_the_straight_one(
    teacher: Path, predictors: Path, tmp_path: Path
) -> None:
    hacked = (*HACKED, *judged_by(predictors, "along"))
    straight = train(teacher, tmp_path / "run", *hacked)
    seen = history(straight)
    assert len(seen) == 9 and max(seen, key=lambda row: row["heldout"])["step"] == 8
    checkpoint = latest_checkpoint(straight / "refl" / "checkpoints")
    assert checkpoint is not None and checkpoint.history == seen and "best" in checkpoint.adapters
    before = adapters(straight)
    newest = sorted((straight / "refl" / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)  # the one before it is of two steps earlier
    for path in (straight / "refl" / "lora.safetensors", straight / "lora.safetensors"):
        path.unlink()
    train(teacher, straight, *hacked, "resume=auto")
    assert history(straight) == seen
    assert_same(before, adapters(straight))


HPS = (
    "+reward@rewards.hps=hps_v2_1", "rewards.hps.path=/nowhere", "rewards.hps.base.path=/nowhere", "reward@heldout=hps_v2_1",
    "heldout.path=/nowhere",
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["~rewards.embedded"], r"stages\.refl is trained on rewards, and there are none"),
        (["heldout=null"], r"stages\.refl\.guard looks at a held-out reward, and there is none"),
        (["heldout.kind=embedded"], r"heldout\.kind=embedded: rewards\.embedded is trained on it"),
        ([*HPS, "heldout.kind=image_reward"], r"heldout\.kind=image_reward: rewards\.hps is trained on it"),
        ([*HPS, "heldout.file=HPS_v2_compressed.pt"], r"rewards\.hps\.base\.path=/nowhere is no directory"),
        (["heldout.kind=pickscore", "heldout.path=/nowhere"], r"heldout\.path=/nowhere is no directory"),
        (["rewards.embedded.kind=pickscore", "rewards.embedded.path=/nowhere"], r"rewards\.embedded\.path=/nowhere is no directory"),
        (["stages.refl.guard.steps=[]"], r"stages\.refl\.guard\.steps is empty: name some of 1, 2, 4"),
        (
            ["stages.refl.reward_weight=0", "stages.refl.tscd_weight=1"],
            r"refl\.guard\.patience=3 waits for trained rewards .*set stages\.refl\.guard\.patience=null",
        ),
        (["stages.refl.guard.steps=[1,8]"], r"stages\.refl\.guard\.steps: .* made for 1, 2, 4 steps, not for 8"),
        (["~rewards.embedded", "~stages.refl", "stages.score.reward_weight=1"], r"stages\.score is trained on rewards"),
    ],
)
def test_a_plan_that_cannot_be_guarded_is_refused(changes: list[str], message: str) -> None:
    config = run_config(compose("train", changes))
    with pytest.raises(ValueError, match=message):
        check_plan(config, inspect_teacher(config.teacher))


@pytest.mark.parametrize("name", ["heldout", "trained", "step"])
def test_no_reward_takes_a_name_of_the_history(name: str) -> None:
    with pytest.raises(ValueError, match=rf"rewards\.{name}: .* another name"):
        run_config(compose("train", [f"+reward@rewards.{name}=embedded"]))
