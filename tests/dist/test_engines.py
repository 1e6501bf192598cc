"""One run, by every engine: each continues a copy of what another left, and all end where one process does.

The figures that tolerances are compared with are norms of differences relative to norms, over all tensors of an adapter: single
numbers differ more, because Adam makes a step of full size out of a gradient that is nothing but rounding.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hyper_sd.checkpoint import Checkpoint, load_checkpoint
from tests.runs import ROOT, finish, start, train
from tests.tiny import tiny_sd15

pytestmark = pytest.mark.slow

STEPS = 5
PLAN = (
    "only=[tscd_1,score]",
    *(f"stages.{stage}.max_steps={STEPS}" for stage in ("tscd_1", "score")),
    "stages.score.adversarial={weight: 0.1, real: data}",
    "stages.score.rollout=[1,2]",
    "stages.score.ode_steps=2",
    "stages.score.ode_one_in=2",  # two of four samples a process: under ZeRO-3 each must hold one
    "engine.checkpoint_every_steps=1",
    "engine.checkpoint_every_seconds=null",
    "engine.keep_last=99",
)
SAME_PROCESSES = 1e-6  # another engine on as many processes: sums in another order
OTHER_PROCESSES = 1e-5  # also another batch size in every convolution


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd15(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def alone(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, batch 4."""
    return train(teacher, tmp_path_factory.mktemp("alone") / "run", *PLAN)


def launch(teacher: Path, run_dir: Path, launcher: Path, *extra: str, processes: int = 2) -> Path:
    options = ("--config_file", str(launcher), "--num_processes", str(processes), "--main_process_port", "0")
    command = ("-m", "accelerate.commands.launch", *options)
    finish(start(teacher, run_dir, *PLAN, *extra, launcher=command), timeout=400)
    return run_dir


def left_after(run_dir: Path, copy: Path, stage: str, step: int) -> Path:
    """A copy of a run as it was when it had just saved a step of a stage."""
    shutil.copytree(run_dir, copy)
    stages = [name for name in ("tscd_1", "score") if (copy / name).is_dir()]
    for name in stages[stages.index(stage) :]:
        (copy / name / "lora.safetensors").unlink()
        for path in (copy / name / "checkpoints").iterdir():
            if name != stage or int(path.name[-8:]) > step:
                shutil.rmtree(path)
    (copy / "lora.safetensors").unlink()
    return copy


def saved(run_dir: Path, stage: str, step: int = STEPS) -> Checkpoint:
    return load_checkpoint(run_dir / stage / "checkpoints" / f"step_{step:08d}")


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys() and first
    squares = [((value - second[name]).square().sum(), value.square().sum()) for name, value in first.items()]
    return float((sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5)  # pyright: ignore[reportArgumentType]


def assert_ends_like(run_dir: Path, other: Path, tolerance: float, stages: tuple[str, ...] = ("tscd_1", "score")) -> None:
    """Every adapter, the heads, and Adam's moments, after the last step of each stage."""
    for stage in stages:
        ours, theirs = saved(run_dir, stage), saved(other, stage)
        assert ours.updates == theirs.updates and ours.adapters.keys() == theirs.adapters.keys()
        for name in ours.adapters:
            assert distance(ours.adapters[name], theirs.adapters[name]) <= tolerance, (stage, name)
        assert distance(ours.optimizer, theirs.optimizer) <= 100 * tolerance, stage


def test_two_micro_batches_of_two_are_the_batch_of_four(teacher: Path, alone: Path, tmp_path: Path) -> None:
    assert_ends_like(train(teacher, tmp_path / "run", *PLAN, "engine.accumulation=2"), alone, OTHER_PROCESSES)


@pytest.mark.timeout(900)
def test_every_engine_goes_on_where_another_was(teacher: Path, alone: Path, tmp_path: Path) -> None:
    """plain on 1 process -> plain or ZeRO-1 on 2 -> ZeRO-2 -> ZeRO-3 -> plain on 1; then all engines have trained both stages."""
    configs = ROOT / "configs" / "accelerate"
    plain = launch(teacher, left_after(alone, tmp_path / "0", "tscd_1", 1), configs / "cpu_2proc.yaml", "resume=auto")
    assert_ends_like(plain, alone, OTHER_PROCESSES)
    zero1 = launch(teacher, left_after(alone, tmp_path / "1", "tscd_1", 1), configs / "deepspeed_zero1.yaml", "resume=auto")
    assert_ends_like(zero1, plain, SAME_PROCESSES)
    assert_ends_like(zero1, alone, OTHER_PROCESSES)
    zero2 = launch(teacher, left_after(zero1, tmp_path / "2", "tscd_1", 2), configs / "deepspeed_zero2.yaml", "resume=auto")
    assert_ends_like(zero2, zero1, SAME_PROCESSES)
    zero3 = launch(teacher, left_after(zero2, tmp_path / "3", "tscd_1", 4), shards_tiny_weights(tmp_path), "resume=auto")
    assert_ends_like(zero3, zero2, SAME_PROCESSES)
    again = train(teacher, left_after(zero3, tmp_path / "again", "score", 3), *PLAN, "resume=auto")
    assert_ends_like(again, alone, OTHER_PROCESSES)
    for number, run_dir in enumerate((zero1, zero2, zero3), 1):
        status = json.loads((run_dir / "run.json").read_text())
        assert status["engine"] == {"type": f"zero{number}", "world_size": 2, "backend": "gloo", "device": "cpu"}
        assert status["resumed_from"] == [1, 2, 4][:number]
        assert_idle_roles_rest(run_dir)
        assert_holds_adapters_alone(run_dir / "score" / "checkpoints" / f"step_{STEPS:08d}")


def test_on_one_process_another_engine_goes_on_bit_for_bit(teacher: Path, tmp_path: Path) -> None:
    """Without clipping, where DeepSpeed adds up the norm in another order."""
    changes = ("only=[tscd_1]", "optimizer.max_grad_norm=null")
    straight = train(teacher, tmp_path / "straight", *PLAN, *changes)
    copy = left_after(straight, tmp_path / "copy", "tscd_1", 2)
    launch(teacher, copy, ROOT / "configs" / "accelerate" / "deepspeed_zero1.yaml", *changes, "resume=auto", processes=1)
    assert json.loads((copy / "run.json").read_text())["engine"]["type"] == "zero1"
    assert_ends_like(copy, straight, 0.0, stages=("tscd_1",))


def test_feedback_its_guard_and_its_merge_are_the_same_under_zero3(teacher: Path, tmp_path: Path) -> None:
    feedback = (
        "only=[refl]",
        "stages.refl.max_steps=3",
        "stages.refl.rollout=[1,2]",
        "stages.refl.guard={every_steps: 1, prompts: 4, steps: [1,2], patience: null}",
    )
    alone = train(teacher, tmp_path / "alone", *PLAN, *feedback)
    shared = launch(teacher, tmp_path / "zero3", shards_tiny_weights(tmp_path), *feedback)
    first, second = (json.loads((run_dir / "refl" / "guard.json").read_text()) for run_dir in (alone, shared))
    assert first["kept"] == second["kept"] and len(first["history"]) == len(second["history"]) == 4
    for ours, theirs in zip(first["history"], second["history"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    for part in ("parts/feedback", "lora"):
        ours, theirs = (changes_of(run_dir / "refl" / f"{part}.safetensors") for run_dir in (alone, shared))
        assert any(value.any() for value in ours.values()) and distance(ours, theirs) <= 10 * OTHER_PROCESSES, part


def changes_of(file: Path) -> dict[str, Tensor]:
    """B A of every layer: a merge may put it together of other factors."""
    tensors = {name: value.flatten(1) for name, value in load_file(file).items() if value.ndim > 1}
    down = ".lora_down.weight"
    return {name: tensors[name.replace(down, ".lora_up.weight")] @ a for name, a in tensors.items() if name.endswith(down)}


def shards_tiny_weights(folder: Path) -> Path:
    """deepspeed_zero3.yaml with a DeepSpeed file: without it DeepSpeed keeps weights as small as the tiny network's whole."""
    file = folder / "zero3.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 500}}))
    text = (ROOT / "configs" / "accelerate" / "deepspeed_zero3.yaml").read_text()
    before, _, rest = text.partition("deepspeed_config:\n")
    kept = rest[rest.index("num_machines") : rest.index("mixed_precision")]  # which accelerate refuses beside a file
    (folder / "zero3.yaml").write_text(f"{before}deepspeed_config:\n  deepspeed_config_file: {file}\n  zero3_init_flag: false\n{kept}")
    return folder / "zero3.yaml"


def assert_holds_adapters_alone(checkpoint: Path) -> None:
    """Nothing of the frozen network: LoRA tensors, the discriminator's heads, and two moments of what is trained."""
    saved = load_checkpoint(checkpoint)
    assert saved.adapters.keys() == {"student", "target", "fake", "heads"}
    assert all(".lora_" in name for adapter, tensors in saved.adapters.items() if adapter != "heads" for name in tensors)
    trained = [saved.adapters[name] for name in ("student", "fake", "heads")]
    assert len(saved.optimizer) == 2 * sum(len(tensors) for tensors in trained)
    num = sum(value.numel() for tensors in (*saved.adapters.values(), *trained, *trained) for value in tensors.values())
    size, tensors = sum(file.stat().st_size for file in checkpoint.iterdir()), 2 * len(saved.optimizer)
    assert 4 * num < size < 4 * num + 256 * tensors  # float32, and a line of the header for each tensor


def assert_idle_roles_rest(run_dir: Path) -> None:
    """The score stage updates the student in steps 0, 2 and 4, the fake score and the heads in all; who rests moves by exactly 0."""
    steps = [saved(run_dir, "score", step).adapters for step in range(1, STEPS + 1)]
    for step, (before, after) in enumerate(zip(steps, steps[1:], strict=False), 1):
        for role in ("student", "heads", "fake"):
            rests = all(torch.equal(value, after[role][name]) for name, value in before[role].items())
            assert rests == (role == "student" and step % 2 == 1), (role, step)
