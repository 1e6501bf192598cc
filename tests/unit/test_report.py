import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hyper_sd import report
from hyper_sd.report import draw_grid, facts_of, save_grid, table, to_image, write

PROMPTS = ["a red circle", "a small blue square at the top left and a large <red> cross at the bottom right on a black background"]


def images(side: int = 32, num: int = len(PROMPTS)) -> Tensor:
    return torch.rand(num, 3, side, side, generator=torch.Generator().manual_seed(side))


def figures(frechet: float | None = 2.5, gap: float | None = 0.07) -> dict[str, Any]:
    values = {"accuracy": 0.9, "frechet": frechet, "gap": gap, "mse_to_teacher": 0.02}
    return values | {"standard_error": {name: value and value / 10 for name, value in values.items()}, "guidance": 3.0, "rewards": {}}


def results(**changes: Any) -> dict[str, Any]:
    sweep = {"adapter": "final", "steps": 4, "guidance": 1.0, "eta": 0.3, "start": None, "accuracy": 0.9, "frechet": 2.5, "chosen": True}
    return {
        "teacher": {"guidance": 3.0, "25": figures(gap=0.0), "1": figures(), "best_guidance": {"1": figures(gap=1.0)}},
        "stages": {"tscd_2": {"2": figures()}},
        "final": {"1": figures(frechet=4.321), "2": figures()},
        "changes": {},
        "evaluation": {"prompts": 2, "draws": 1, "floor": 0.5, "floor_accuracy": 0.99},
        "sampler": {"final": {"1": {"eta": 0.0}}, "sweep": [sweep]},
        "grid_prompts": PROMPTS,
    } | changes


FACTS = {"engine": {"type": "NO", "world_size": 1, "backend": "none"}, "resumed_from": [2], "wall_s": 3.0, "peak_rss_bytes": 10**9}


def test_a_report_is_written_whole(tmp_path: Path):
    grids = {"": {"teacher": images(), "1 step": images()}, "tscd_2": {"teacher": images()}, "teacher": {"teacher": images()}}
    written = write(tmp_path, results(), grids, FACTS)
    assert json.loads((tmp_path / "report.json").read_text()) == written == results() | FACTS | {"guards": {}}
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        *("report.json", "report.html", "grid.png", "grid_teacher.png"),
        "tscd_2/grid.png",
    }
    page = (tmp_path / "report.html").read_text()
    assert base64.b64encode((tmp_path / "tscd_2" / "grid.png").read_bytes()).decode() in page
    assert "4.321 ± 0.432" in page
    assert "world_size" in page
    assert 'class="chosen"' in page
    assert "http" not in page  # self-contained


def test_a_later_evaluation_keeps_the_facts_of_the_run(tmp_path: Path):
    assert facts_of(tmp_path) == {}
    write(tmp_path, results(), {}, FACTS)
    assert facts_of(tmp_path) == FACTS


def test_numbers_that_are_not_numbers_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        write(tmp_path, results(final={"1": figures(frechet=float("nan"))}), {}, FACTS)
    assert not (tmp_path / "report.json").exists()


def test_the_table_has_a_line_a_row_and_leaves_out_what_was_not_measured():
    lines = table(results()).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "teacher, 25 steps",
        "teacher, 1 step",
        "teacher, 1 step, best guidance 3",
        "tscd_2, 2 steps",
        "final, 2 steps",
        "final, 1 step",
    ]
    assert "4.321 ± 0.432" in lines[-1]
    unjudged = figures(frechet=None, gap=None)
    teacher = {"guidance": 3.0, "25": unjudged, "best_guidance": {}}
    head = table(results(teacher=teacher, stages={}, final={"1": unjudged})).splitlines()[0]
    assert "frechet" not in head
    assert "mse to teacher" in head


def test_small_images_are_enlarged_by_whole_pixels(tmp_path: Path):
    save_grid(tmp_path / "new" / "grid.png", {"teacher 25 steps": images(), "1 step": images().flip(0)}, PROMPTS)
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    cell = np.asarray(to_image(images()[0])).repeat(4, 0).repeat(4, 1)
    found = [(y, x) for y in range(grid.shape[0] - 127) for x in range(grid.shape[1] - 127) if (grid[y, x : x + 4] == cell[0, :4]).all()]
    assert any((grid[y : y + 128, x : x + 128] == cell).all() for y, x in found)


def test_large_images_are_reduced():
    size = draw_grid({"a": images(64), "b": images(64)}, PROMPTS).size
    assert draw_grid({"a": images(1024), "b": images(1024)}, PROMPTS).width < size[0] + 2 * 256


def test_an_image_is_rounded_not_cut():
    assert np.asarray(to_image(torch.full((3, 2, 2), 0.999)))[0, 0, 0] == 255


def test_a_grid_that_cannot_be_written_leaves_no_file(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_grid(tmp_path / "file" / "grid.png", {"a": images()}, PROMPTS)
    assert report.facts_of(tmp_path) == {}
