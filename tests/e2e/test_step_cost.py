"""The benchmark of a step's cost runs as the documentation says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import checkpoint_cost, memory
from benchmarks.passes import forward_equivalents, judged
from benchmarks.step_cost import Bench, parse

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_last_line_is_the_result() -> None:
    options = ["stage=tscd", "batch_size=2", "rank=4", "threads=1", "warmup=0", "steps=3", "peak_tflops=1"]
    command = [sys.executable, "benchmarks/step_cost.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ratio"] == result["step_s"] / result["bare_s"] > 0
    assert result["samples_per_s"] == 2 / result["step_s"]
    assert 2**27 < result["peak_memory_bytes"] < 2**33
    assert result["mfu"] == result["flops_per_step"] / result["step_s"] / 1e12 > 0


@pytest.mark.parametrize(
    ("stage", "forwards", "seen"),
    [
        ("tscd", 5, (0, 0, 0)),
        ("tscd_adversarial", 8, (0, 0, 0)),
        ("score", 10, (0, 0, 0)),
        ("refl", 6, (1, 1, 0)),
        ("refl_perceptual", 9, (2, 1, 1)),
    ],
)
def test_forward_equivalents_of_an_update_of_the_student(stage: str, forwards: int, seen: tuple[int, int, int]) -> None:
    bench = Bench.build(parse([f"stage={stage}", "rank=4", "batch_size=2"]), torch.device("meta"))
    assert forward_equivalents(bench.passes, 2) == forwards
    assert tuple(judged(bench.stage, bench.ctx, bench.batch(0)).values()) == seen


@pytest.mark.parametrize(("backbone", "limit"), [("frozen", 11e9), ("lora", 13.5e9)])
def test_all_roles_fit_beside_sdxl(backbone: str, limit: float) -> None:
    result = memory.count(memory.Options(backbone=backbone))  # pyright: ignore[reportArgumentType]
    assert result["base"] == pytest.approx(2 * 2.567e9, rel=1e-3) and result["adapter student"] == 4 * 196_751_360
    assert 10e9 < result["resident"] < limit
    assert result["activations, gradient checkpointing"] < result["activations"] / 10


def test_a_checkpoint_of_tscd_is_two_adapters_and_two_moments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    checkpoint_cost.main(["rank=4", "saves=2", "every=10", "step_s=0.5", f"folder={tmp_path}"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    adapter = memory.count(memory.Options(teacher="embedded", rank=4))["adapter student"]
    assert 4 * adapter < result["bytes"] < 4 * adapter + 600_000  # the names of the tensors
    assert result["share"] == pytest.approx(result["blocked_s"] / 5) and result["write_share"] == pytest.approx(result["write_s"] / 5)
    assert 0 < result["blocked_s"] < result["write_s"] and list(tmp_path.iterdir()) == []


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="steeps: unknown key; did you mean steps"):
        parse(["steeps=3"])


def test_values_are_typed() -> None:
    options = parse(["teacher=sdxl_random", "compile=true", "peak_tflops=989"])
    assert (options.teacher, options.compile, options.peak_tflops) == ("sdxl_random", True, 989.0)
    with pytest.raises(ValueError, match="steps"):
        parse(["steps=0"])


def test_help_says_what_it_does_and_every_option_with_what_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("What a training step costs")
    for line in ('stage="tscd"  tscd|tscd_adversarial|score|refl|refl_perceptual', "threads=null  int or null", "steps=30  int"):
        assert line.split() in [shown.split() for shown in text.splitlines()]
