"""The commands that use an adapter, as the README gives them, on a tiny teacher and from another directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyper_sd.config import FilesConfig
from hyper_sd.sample import stage_recipe
from hyper_sd.stages.tscd import STEP_COUNTS
from tests.adapters import teacher_config, write_adapter
from tests.released import write_clip
from tests.tiny import BETAS, tiny_sd15

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd15(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def lora(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    write_adapter(file, teacher_config(teacher), stage_recipe(BETAS, STEP_COUNTS, solver_steps=40, start=899))
    return file


def pinned(files: FilesConfig) -> tuple[tuple[str, str | None], ...]:
    """Overrides that point at a local model, whose checksum is not the released one's."""
    return ("path", files.path), ("file", files.file), ("sha256", "null")


def command(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=150, check=False)


@pytest.mark.slow
def test_sample(teacher: Path, lora: Path, tmp_path: Path) -> None:
    options = (f"lora={lora}", "teacher=sd15", f"teacher.path={teacher}", "out=here")
    done = command("sample.py", *options, "prompt=a red circle, on a blue background", "steps=1", "num_images=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = [tmp_path / line for line in done.stdout.split("\n") if line]
    assert [file.name for file in files] == [f"a_red_circle_on_a_blue_background_1steps_seed0_{i}.png" for i in (0, 1)]
    assert np.asarray(Image.open(files[1])).shape == (32, 32, 3)


@pytest.mark.slow
def test_evaluate_with_prompts_from_the_data(teacher: Path, lora: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        Image.new("RGB", (40, 40), (60 * i, 0, 0)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"a red circle {i}")
    clip = write_clip(tmp_path / "clip")
    options = (f"lora={lora}", "steps=[1,2]", "out=report", "teacher=sd15", f"teacher.path={teacher}", "data=folder", f"data.path={data}")
    metrics = (
        "metrics=[clip_score,cmmd,diversity]",
        *(f"{key}.{k}={v}" for key in ("rewards.clip_score", "features") for k, v in pinned(clip)),
    )
    settings = ("eval.judge=null", "eval.prompts=4", "eval.draws=1", "eval.teacher_steps=4", "diversity.prompts=2", "features=clip")
    done = command("evaluate.py", *options, *settings, *metrics, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[1:]] == [
        *("teacher, 4 steps", "teacher, 2 steps", "teacher, 1 step"),
        *("final, 2 steps", "final, 1 step"),
    ]
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["final"]["1"]["mse_to_teacher"] > 0
    assert all(figure["value"] is not None for figure in report["final"]["1"]["metrics"].values())
    assert done.stdout.splitlines()[0].split("  ")[-1].strip() == "diversity"
    assert sorted(report["grid_prompts"]) == [f"a red circle {i}" for i in range(4)]
    assert (tmp_path / "report" / "grid.png").exists() and (tmp_path / "report" / "report.html").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("evaluate.py", (), "run, lora: give one of them, run=DIR or lora=FILE; got run=None and lora=None"),
        ("evaluate.py", ("run=nowhere",), "run=nowhere: there is no nowhere/config.yaml"),
        ("sample.py", ("prompt=a", "lora=nowhere.safetensors"), "lora=nowhere.safetensors: there is no such file"),
        ("sample.py", ("lora=null",), "prompt: must be set"),
    ],
)
def test_bad_input_is_one_line(script: str, arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = command(script, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
