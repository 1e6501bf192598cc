"""scripts/slurm/train.sbatch on two nodes that are this machine: srun and scontrol are stood in for, everything else is real."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, finish, overrides, reached, wait_for
from tests.tiny import tiny_sd15

SRUN = """#!/usr/bin/env bash
shift # --kill-on-bad-exit=1
for node in 0 1; do SLURM_NODEID=$node "$@" & done
trap 'kill -TERM $(jobs -p)' TERM
while [ -n "$(jobs -rp)" ]; do wait; done
exit 1 # as a launcher does after a signal
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in show) echo 127.0.0.1 ;; *) echo "$@" >> "$REQUEUED" ;; esac
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_a_signal_saves_and_requeues(tmp_path: Path) -> None:
    tools, run_dir, requeued = tmp_path / "bin", tmp_path / "run", tmp_path / "requeued"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | slurm | {"PATH": path, "REQUEUED": str(requeued), "PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    arguments = overrides(tiny_sd15(tmp_path / "teacher"), run_dir, "only=[tscd_8]", "stages.tscd_8.max_steps=9999")
    command = ["bash", "scripts/slurm/train.sbatch", *arguments]
    job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: reached(run_dir, 2), job)
    job.send_signal(signal.SIGTERM)
    output = finish(job, timeout=100)
    assert requeued.read_text() == "requeue 7\n", output[-3000:]
    status = json.loads((run_dir / "run.json").read_text())
    assert (status["status"], status["engine"]["world_size"]) == ("interrupted", 2)
