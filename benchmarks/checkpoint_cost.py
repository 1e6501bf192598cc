"""What checkpoints cost: the seconds and bytes of one, and its share of the training time between two.

    python benchmarks/checkpoint_cost.py teacher=embedded rank=32 every=50
    python benchmarks/checkpoint_cost.py teacher=sdxl_random rank=64 every=500 step_s=2.0 folder=/the/disk/of/your/runs

Writes `saves` checkpoints of the size that a stage has on that network (adapters, Adam moments, counts; random numbers) into a
new directory below `folder`, and removes it. The time of a step is measured on the embedded teacher unless it is given (`step_s`),
as it must be for the full-size ones, of which no weight is made. `every` is engine.checkpoint_every_steps: 50 in the demo, 500 in
the recipes sd15 and sdxl. Prints a table and, last, one line of JSON.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from benchmarks import step_cost
from benchmarks.step_cost import Bench, build_engine, measure, parse_as
from hyper_sd.checkpoint import Checkpoint, save_checkpoint
from hyper_sd.structured import Count, Positive

LIMIT = 0.02


@dataclass(frozen=True, kw_only=True)
class Options:
    stage: Literal["tscd", "tscd_adversarial", "score"] = "tscd"
    teacher: Literal["embedded", "sd15_random", "sdxl_random"] = "embedded"
    rank: Count = 32
    batch_size: Count = 32
    every: Count = 50
    saves: Count = 5
    threads: Count | None = None
    step_s: Positive | None = None
    folder: str | None = None


def main(argv: list[str]) -> None:
    options = parse_as(Options, argv)
    if options.step_s is None and options.teacher != "embedded":
        raise SystemExit("step_s must be given for a full-size network: the seconds of a step on your device (benchmarks/step_cost.py)")
    step_options = step_cost.Options(
        stage=options.stage, teacher=options.teacher, rank=options.rank, batch_size=options.batch_size, threads=options.threads, steps=10
    )
    checkpoint = make_checkpoint(Bench.build(step_options, torch.device("meta")))
    save_s, num_bytes = measure_saves(checkpoint, options)
    step_s = options.step_s if options.step_s is not None else measure_step(step_options)
    result = {
        **asdict(options),
        "bytes": num_bytes,
        "save_s": statistics.median(save_s),
        "slowest_save_s": max(save_s),
        "step_s": step_s,
        "share": statistics.median(save_s) / (options.every * step_s),
        "step_s_at_two_percent": statistics.median(save_s) / (LIMIT * options.every),
    }
    print(f"a checkpoint of {options.stage} on {options.teacher}, rank {options.rank}: {num_bytes / 1e6:.1f} MB")
    print(f"{result['save_s']:.3f} s to save (slowest {result['slowest_save_s']:.3f} s), every {options.every} steps of {step_s:.3f} s")
    print(f"{result['share']:.2%} of training time; 2 % at {result['step_s_at_two_percent']:.3f} s a step")
    print(json.dumps(result))


def make_checkpoint(bench: Bench) -> Checkpoint:
    """Random numbers in the shapes that a stage saves."""
    roles = bench.ctx.roles
    adapters = {
        name: {key: torch.randn(param.shape) for key, param in roles.tensors(name).items()} for name in (*roles.adapters, *roles.attached)
    }
    moments = {
        f"{'+'.join(objective.trains)}/{moment}/{name}/{key}": torch.rand(param.shape)
        for objective in bench.objectives
        for name in objective.trains
        for key, param in roles.tensors(name).items()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    return Checkpoint(0, adapters, moments, {"+".join(objective.trains): 0 for objective in bench.objectives})


def measure_saves(checkpoint: Checkpoint, options: Options) -> tuple[list[float], int]:
    """Seconds of each save, and the bytes of one."""
    seconds: list[float] = []
    num_bytes = 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for step in range(options.saves):
            started = time.perf_counter()
            path = save_checkpoint(Path(folder), replace(checkpoint, step=step), keep_last=2)
            seconds.append(time.perf_counter() - started)
            num_bytes = sum(file.stat().st_size for file in path.iterdir())
    return seconds, num_bytes


def measure_step(options: step_cost.Options) -> float:
    engine = build_engine(options)
    step_s, _ = measure(Bench.build(options, engine.device), engine, options)
    return statistics.median(step_s)


if __name__ == "__main__":
    main(sys.argv[1:])
