"""The DeepSpeed engine's updates against plain ones, in real processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT

CONFIGS = ROOT / "configs" / "accelerate"


def offloaded(folder: Path) -> Path:
    """deepspeed_zero2.yaml with torch's Adam on the host."""
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    file = folder / "zero2.json"
    file.write_text(json.dumps({"zero_optimization": offload, "zero_force_ds_cpu_optimizer": False}))
    text = (CONFIGS / "deepspeed_zero2.yaml").read_text()
    before, _, rest = text.partition("deepspeed_config:\n")
    kept = rest[rest.index("num_machines") : rest.index("mixed_precision")]  # which accelerate refuses beside a file
    (folder / "offload.yaml").write_text(f"{before}deepspeed_config:\n  deepspeed_config_file: {file}\n  zero3_init_flag: false\n{kept}")
    return folder / "offload.yaml"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "on_host", "num_processes"), [("zero1", False, 1), ("zero2", True, 1), ("zero2", False, 2)])
def test_updates_are_the_plain_ones_and_those_that_are_not_finite_leave_no_trace(
    stage: str, on_host: bool, num_processes: int, tmp_path: Path
) -> None:
    """With Adam on the host or not; of two processes only the first has losses that are not finite."""
    config = offloaded(tmp_path) if on_host else CONFIGS / f"deepspeed_{stage}.yaml"
    options = ["--config_file", str(config), "--num_processes", str(num_processes), "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "tests.dist.updates"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(num_processes):
        assert f"rank {rank}, {stage}, AdamW: 7 updates are the plain ones" in done.stdout
