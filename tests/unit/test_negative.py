"""Scenes of two objects, what a caption says of the second, and whether it is found."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hyper_sd.config import EvalConfig
from hyper_sd.data.scenes import EMPTY, NUM_PLACES, captions, phrases, sample_scenes
from hyper_sd.evaluate import evaluate
from hyper_sd.negative import finds_second
from hyper_sd.processes import Processes
from hyper_sd.sample import stage_recipe
from hyper_sd.stages.tscd import STEP_COUNTS
from tests.adapters import teacher_config, write_adapter
from tests.tiny import BETAS, tiny_sd15

SCENES = sample_scenes(3, np.arange(64))
TWO = SCENES.rows(np.flatnonzero((SCENES.shape != EMPTY).sum(axis=1) == 2))


def test_a_caption_is_made_of_its_phrases() -> None:
    assert len(TWO) > 20
    for caption, parts in zip(captions(TWO), phrases(TWO), strict=True):
        assert len(parts) == 2 and caption.startswith(" and ".join(parts))


def test_the_second_object_is_found_where_and_as_it_is_named() -> None:
    labels, rows = TWO.labels(), torch.arange(len(TWO))
    assert finds_second(labels, TWO).all()
    second = (TWO.shape != EMPTY) & (np.arange(NUM_PLACES)[None] != TWO.first[:, None])
    place = torch.from_numpy(second.argmax(axis=1))
    gone = labels.clone()
    gone[rows, place] = EMPTY
    assert not finds_second(gone, TWO).any()
    first_gone = labels.clone()
    first_gone[rows, torch.from_numpy(TWO.first)] = EMPTY
    assert finds_second(first_gone, TWO).all()
    other_color = labels.clone()
    other_color[rows, NUM_PLACES + place] += 1
    assert not finds_second(other_color, TWO).any()


@pytest.mark.parametrize(("guidance", "rows"), [(3.0, ["teacher", "final", "final"]), (1.0, [])])
def test_rows_with_guidance_are_drawn_with_a_negative_prompt(guidance: float, rows: list[str], tmp_path: Path) -> None:
    config, file = teacher_config(tiny_sd15(tmp_path / "teacher")), tmp_path / "lora.safetensors"
    write_adapter(file, config, stage_recipe(BETAS, STEP_COUNTS, solver_steps=8, guidance=guidance))
    small = {"prompts": 6, "steps": (1, 2), "teacher_steps": 2, "reference": 300, "batch_size": 4, "negatives": 6}
    cfg = EvalConfig(every_steps=None, judge="embedded", seed=5, **small)  # pyright: ignore[reportArgumentType]
    results = evaluate(config, cfg, {}, file, Processes(1)).to_json()["negative_prompts"]
    assert [result["adapter"] for result in results] == rows
    assert all(result["prompts"] == 6 and 0 <= result["found_with"] <= 1 for result in results)
