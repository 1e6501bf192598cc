"""Whole training runs on a tiny teacher: in this process, or as a user starts them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hyper_sd.cli import compose
from hyper_sd.config import run_config
from hyper_sd.plan import run_plan

ROOT = Path(__file__).parents[1]
TSCD_STAGES = ("tscd_8", "tscd_4", "tscd_2", "tscd_1")
STAGES = (*TSCD_STAGES, "refl", "score")
SCORE = ("only=[tscd_1,score]", "stages.score.max_steps=6")
ADVERSARIAL = (
    *SCORE,
    "stages.tscd_1.adversarial={weight: 0.1, backbone: lora}",
    "stages.tscd_1.optimizers.heads.lr=1e-3",
    "stages.score.adversarial={weight: 0.1, real: data}",
)


def overrides(teacher: Path, run_dir: Path, *extra: str) -> list[str]:
    """The smoke recipe on another teacher, without a table at the end."""
    return ["recipe=smoke", "teacher=sd15", f"teacher.path={teacher}", f"run.dir={run_dir}", "eval.judge=null", "eval.prompts=0", *extra]


def train(teacher: Path, run_dir: Path, *extra: str) -> Path:
    run_plan(run_config(compose("train", overrides(teacher, run_dir, *extra))))
    return run_dir


def start(teacher: Path, run_dir: Path, *extra: str, launcher: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    command = [sys.executable, *launcher, str(ROOT / "scripts" / "train.py"), *overrides(teacher, run_dir, *extra)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: "subprocess.Popen[str]", timeout: float = 240) -> str:
    """Its output; a run that fails or hangs fails the test with what it printed."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"no end after {timeout} s: {process.communicate()[0][-3000:]}") from None
    assert process.returncode == 0, output[-3000:]
    return output


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", timeout: float = 120) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"ended early: {process.communicate()[0][-3000:]}"
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.005)


def reached(run_dir: Path, step: int, stage: str = "tscd_8") -> bool:
    """Whether a stage has saved so many steps; the checkpoint itself may be gone again."""
    saved = (path.name.removeprefix("step_") for path in (run_dir / stage / "checkpoints").glob("step_*"))
    return any(name.isdigit() and int(name) >= step for name in saved)


def adapters(run_dir: Path) -> dict[str, Tensor]:
    """Every tensor of every exported LoRA of a run, by stage."""
    files = {stage: run_dir / stage / "lora.safetensors" for stage in STAGES} | {"run": run_dir / "lora.safetensors"}
    return {f"{stage}/{name}": value for stage, file in files.items() if file.exists() for name, value in load_file(file).items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Equal tensors: bitwise, or with a largest difference relative to the tensor's largest value."""
    assert first.keys() == second.keys() and first
    for name, value in first.items():
        if tolerance == 0:
            assert torch.equal(value, second[name]), name
        else:
            error = (value - second[name]).abs().max() / value.abs().max().clamp(min=1e-12)
            assert error <= tolerance, f"{name}: {error}"
