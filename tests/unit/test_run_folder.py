"""What is noted about a run in run.json."""

import json
from pathlib import Path

from hyper_sd.cli import compose
from hyper_sd.config import run_config
from hyper_sd.run_folder import RunFolder


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
