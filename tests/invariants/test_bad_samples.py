"""The count of bad samples goes on after an interruption, at any number of processes."""

import json
import shutil
from pathlib import Path

import pytest

from hyper_sd.checkpoint import load_checkpoint
from tests.dist.test_two_processes import LAUNCH
from tests.runs import finish, start, train
from tests.tiny import tiny_sd15
from tests.unit.test_prepare import numbered


def counts(run: Path) -> dict[int, float]:
    """By step, from metrics.jsonl and from the checkpoints that are left."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    saved = [load_checkpoint(path) for path in (run / "tscd_8" / "checkpoints").glob("step_*")]
    return {row["step"]: row["bad_samples"] for row in rows if "bad_samples" in row} | {c.step: float(c.bad_samples) for c in saved}


def cut(run: Path, to: Path, step: int) -> Path:
    """The run as it stood after a step."""
    shutil.copytree(run, to)
    for file in (to / "lora.safetensors", to / "tscd_8" / "lora.safetensors"):
        file.unlink()
    for checkpoint in (to / "tscd_8" / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    return to


@pytest.mark.slow
def test_bad_samples_are_counted_on_where_a_run_stopped(tmp_path: Path) -> None:
    teacher, folder = tiny_sd15(tmp_path / "teacher", image_size=32), numbered(tmp_path / "photos", 6)
    (folder / "003.png").write_bytes(b"not an image")
    options = ("data=folder", f"data.path={folder}", "only=[tscd_8]", "stages.tscd_8.max_steps=12", "engine.checkpoint_every_steps=4")
    options = (*options, "engine.keep_last=3", "engine.checkpoint_every_seconds=null")
    straight = train(teacher, tmp_path / "straight", *options, "data.max_bad_fraction=0.5")
    expected = counts(straight)
    assert expected.keys() == {4, 8, 10, 12} and 0 < expected[4] < expected[8] <= expected[10] <= expected[12] == 8
    again = cut(straight, tmp_path / "again", 4)
    train(teacher, again, *options, "data.max_bad_fraction=0.5", "resume=auto")
    assert counts(again) == expected
    two = cut(straight, tmp_path / "two", 4)
    finish(start(teacher, two, *options, "data.max_bad_fraction=0.5", "resume=auto", launcher=LAUNCH))
    assert counts(two) == expected
    limited = cut(straight, tmp_path / "limited", 8)
    with pytest.raises(
        ValueError, match=r"8 of 4\d samples read were bad, more than data.max_bad_fraction=0.07 allows; .*bad_samples.jsonl"
    ):
        train(teacher, limited, *options, "data.max_bad_fraction=0.07", "resume=auto")
    (listed,) = [json.loads(line) for line in (again / "bad_samples.jsonl").read_text().splitlines()]
    assert listed["name"].endswith("003.png")
