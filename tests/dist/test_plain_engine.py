"""The plain engine on two real processes on gloo."""

import subprocess
import sys

import pytest

from tests.runs import ROOT


@pytest.mark.slow
def test_buckets_rounding_idle_roles_and_ranks_that_differ() -> None:
    config = str(ROOT / "configs" / "accelerate" / "cpu_2proc.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    done = subprocess.run([*launch, "-m", "tests.dist.gradients"], cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"rank {rank} checked everything" in done.stdout for rank in range(2))
