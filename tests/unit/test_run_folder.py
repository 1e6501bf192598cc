"""What is noted about a run in run.json."""

import json
from pathlib import Path

import pytest

from hyper_sd.cli import compose
from hyper_sd.config import run_config
from hyper_sd.run_folder import RunFolder, continue_command


def test_the_first_error_of_any_process_stays(tmp_path: Path) -> None:
    config = run_config(compose("train", [f"run.dir={tmp_path / 'run'}"]))
    main, other = RunFolder(config, {}), RunFolder(config, {})
    other.note_failure("before there is a run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lora.safetensors.7.partial").write_bytes(b"half a file of a process that was killed")
    main.create(config)
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"config.yaml", "lock.json", "run.json"}
    other.note_failure("data.path: a photo cannot be read")
    main.note_failure("rank 1 died or hangs")
    main.release()
    status = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (status["status"], status["error"]) == ("failed", "data.path: a photo cannot be read") and status["continue"]


def test_a_run_that_failed_before_its_first_step_may_be_started_again(tmp_path: Path) -> None:
    config = run_config(compose("train", [f"run.dir={tmp_path / 'run'}"]))
    failed = RunFolder(config, {})
    failed.create(config)
    failed.note_failure("teacher.path: the weights are truncated")
    failed.release()
    again = RunFolder(config, {})
    again.create(config)
    again.append_metrics({"run_step": 10})
    again.release()
    with pytest.raises(ValueError, match=r"is not empty and resume=never"):
        RunFolder(config, {})


def test_what_to_type_names_the_devices_that_were_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert not continue_command().startswith("env ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert continue_command().startswith("env CUDA_VISIBLE_DEVICES= ")
