"""What the launcher was told is what runs, or there is one clear message."""

import json
import os
from pathlib import Path

import pytest
import torch

from hyper_sd.launcher import Launch, require_one_process
from hyper_sd.processes import Processes

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


def test_engines() -> None:
    assert Launch.read({}) == Launch(num_processes=1, zero_stage=0) and Launch.read({}).engine == "plain"
    told = Launch.read({"WORLD_SIZE": "16", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", **DEEPSPEED})
    assert (told.num_processes, told.engine) == (16, "zero3")


def test_the_stage_may_be_in_a_file_of_deepspeed(tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    environ = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file), **DEEPSPEED}
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert Launch.read(environ).engine == "zero1"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, "optimizer": {"type": "Adam"}}))
    with pytest.raises(ValueError, match=r"optimizer must not be given there"):
        Launch.read(environ)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, r"FSDP.* use configs/accelerate/deepspeed_zero3.yaml"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "MEGATRON_LM"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision must be no: got bf16; teacher.dtype"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0", **DEEPSPEED}, r"zero_stage must be 1, 2 or 3: got 0; use configs/accelerate/ddp.yaml"),
        ({"ACCELERATE_USE_CPU": "true", **DEEPSPEED}, "set use_cpu: false"),
    ],
)
def test_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Launch.read(environ)


def test_fewer_processes_than_started(monkeypatch: pytest.MonkeyPatch) -> None:
    Processes(1)
    monkeypatch.setenv("WORLD_SIZE", "2")  # what torchrun sets; alone it does not make accelerate join anybody
    with pytest.raises(ValueError, match="started 2 processes but 1 joined"):
        Processes(1)


def test_another_engine_than_the_launcher_asked_for() -> None:
    processes = Processes(1)
    with pytest.raises(ValueError, match="asks for the engine zero2 but accelerate set up plain"):
        processes.verify(Launch(num_processes=1, zero_stage=2))


@pytest.mark.parametrize(("local", "threads"), [(None, 6), ("2", 3), ("8", 1)])
def test_threads_are_the_cores_it_may_run_on_shared_with_its_neighbours(
    local: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    Processes()
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    assert found == threads


def test_commands_that_write_one_file_run_alone() -> None:
    require_one_process({}, "scripts/export.py")
    with pytest.raises(ValueError, match=r"scripts/export.py runs in one process: the launcher started 2"):
        require_one_process({"WORLD_SIZE": "2"}, "scripts/export.py")
