"""Losses that are not finite: skipped, counted, and after too many in a row the end."""

import json
import shutil
from pathlib import Path

import pytest

from hyper_sd.bad_steps import FILE
from hyper_sd.checkpoint import latest_checkpoint
from tests.runs import adapters, assert_same, train
from tests.shards import write_latents
from tests.tiny import tiny_sd15


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd15(tmp_path_factory.mktemp("teacher"))


def test_a_bad_sample_costs_its_update_and_a_resumed_run_counts_on(teacher: Path, tmp_path: Path) -> None:
    data = write_latents(tmp_path / "data", num=16, bad=(5,))
    settings = (*data, "only=[tscd_8]", "stages.tscd_8.max_steps=8", "engine.checkpoint_every_steps=5")
    straight = train(teacher, tmp_path / "straight", *settings)
    for values in adapters(straight).values():
        assert values.isfinite().all()
    rows = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines() if "skipped" in line]
    assert [row["student/skipped"] for row in rows] == [2]  # 32 samples are two epochs of 16
    assert all(str(value) not in ("nan", "inf") for row in rows for value in row.values())

    again = shutil.copytree(straight, tmp_path / "again")
    for file in (again / "lora.safetensors", again / "tscd_8" / "lora.safetensors"):
        file.unlink()
    shutil.rmtree(again / "tscd_8" / "checkpoints" / "step_00000008")
    kept = shutil.copytree(again, tmp_path / "kept")
    train(teacher, again, *settings, "resume=auto")
    assert_same(adapters(straight), adapters(again))
    middle, last = (latest_checkpoint(run / "tscd_8" / "checkpoints") for run in (kept, again))
    assert middle is not None and last is not None and (middle.skipped, last.skipped) == ({"student": 1}, {"student": 2})


def test_too_many_in_a_row_end_the_run_and_their_samples_are_written_down(teacher: Path, tmp_path: Path) -> None:
    data = write_latents(tmp_path / "data", num=4, bad=(0,))
    with pytest.raises(FloatingPointError, match=r"stages\.tscd_8: the last \d+ updates of student were skipped .*max_bad_steps=3"):
        train(teacher, tmp_path / "run", *data, "only=[tscd_8]", "stages.tscd_8.max_steps=40", "engine.max_bad_steps=3")
    rows = json.loads((tmp_path / "run" / "tscd_8" / FILE).read_text())
    assert rows[0] == {
        "step": 0,
        "role": "student",
        "grad_norm": "nan",
        "losses": rows[0]["losses"],
        "positions": [0, 3],
        "names": rows[0]["names"],
        "captions": rows[0]["captions"],
    }
    shard = data[1].removeprefix("data.path=")
    assert sorted(rows[0]["names"]) == [f"sample {n:03} of {shard}" for n in range(4)]
    assert rows[0]["losses"][0] in ("nan", "inf") and sorted(rows[0]["captions"]) == [f"sample {n}" for n in range(4)]
    status = json.loads((tmp_path / "run" / "run.json").read_text())
    assert status["status"] == "failed" and FILE in status["error"]
    saved = latest_checkpoint(tmp_path / "run" / "tscd_8" / "checkpoints")
    assert saved is None or all(value.isfinite().all() for value in saved.adapters["student"].values())
