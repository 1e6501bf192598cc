"""What checkpoints cost: how long training stands still for one, how long it takes to write, and the shares of the time between two.

    python benchmarks/checkpoint_cost.py teacher=embedded rank=32 every=50
    python benchmarks/checkpoint_cost.py teacher=sdxl_random rank=64 every=500 step_s=2.0 folder=/the/disk/of/your/runs

Saves, `saves` times, a state of the size that a stage has on that network (adapters, Adam moments, counts; random numbers) as training
does: training waits for the copy to host memory (`blocked_s`; the first copy also allocates), a thread writes the copy (`write_s`,
`write_cpu_s`) into a new directory below `folder`, which is removed. Nothing trains meanwhile. The time of a step is measured on the
embedded teacher unless it is given (`step_s`), as it must be for the full-size ones, of which no weight is made. `every` is
engine.checkpoint_every_steps: 50 in the demo, 500 in the recipes sd15 and sdxl. Prints a table and, last, one line of JSON.
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
from torch import Tensor

from benchmarks import step_cost
from benchmarks.step_cost import Bench, build_engine, measure, parse_as
from hyper_sd.checkpoint import Checkpoint, save_checkpoint
from hyper_sd.host_copies import HostCopies
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


@dataclass(frozen=True)
class Cost:
    """Seconds of one save."""

    blocked: float
    write: float
    write_cpu: float


def main(argv: list[str]) -> None:
    options = parse_as(Options, argv)
    if options.step_s is None and options.teacher != "embedded":
        raise SystemExit("step_s must be given for a full-size network: the seconds of a step on your device (benchmarks/step_cost.py)")
    step_options = step_cost.Options(
        stage=options.stage, teacher=options.teacher, rank=options.rank, batch_size=options.batch_size, threads=options.threads, steps=10
    )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    state = make_checkpoint(Bench.build(step_options, torch.device("meta")))
    costs, num_bytes = measure_saves(state, options)
    step_s = options.step_s if options.step_s is not None else measure_step(step_options)
    blocked, write, write_cpu = (
        statistics.median(values) for values in zip(*((c.blocked, c.write, c.write_cpu) for c in costs), strict=True)
    )
    between = options.every * step_s
    result = {
        **asdict(options),
        "bytes": num_bytes,
        "blocked_s": blocked,
        "first_blocked_s": costs[0].blocked,
        "write_s": write,
        "slowest_write_s": max(cost.write for cost in costs),
        "write_cpu_s": write_cpu,
        "step_s": step_s,
        "share": blocked / between,
        "first_share": costs[0].blocked / between,
        "write_share": write / between,
        "step_s_at_two_percent": blocked / (LIMIT * options.every),
    }
    print(f"a checkpoint of {options.stage} on {options.teacher}, rank {options.rank}: {num_bytes / 1e6:.1f} MB")
    print(f"training stands still for {blocked:.3f} s (first {costs[0].blocked:.3f} s), every {options.every} steps of {step_s:.3f} s")
    print(f"written in {write:.3f} s beside it (slowest {result['slowest_write_s']:.3f} s; {write_cpu:.3f} s of a processor)")
    print(
        f"{result['share']:.3%} of training time (first {result['first_share']:.3%}), {result['write_share']:.2%} if it waited for the disk"
    )
    print(f"2 % at {result['step_s_at_two_percent']:.4f} s a step")
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


def measure_saves(state: Checkpoint, options: Options) -> tuple[list[Cost], int]:
    """The cost of each save, and the bytes of one."""
    costs: list[Cost] = []
    num_bytes, copies = 0, HostCopies(torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for step in range(options.saves):
            started = time.perf_counter()
            copy = replace(state, step=step, **copied(state, copies))
            blocked, cpu, started = time.perf_counter() - started, time.thread_time(), time.perf_counter()
            path = save_checkpoint(Path(folder), copy, keep_last=2)
            costs.append(Cost(blocked, time.perf_counter() - started, time.thread_time() - cpu))
            num_bytes = sum(file.stat().st_size for file in path.iterdir())
    return costs, num_bytes


def copied(state: Checkpoint, copies: HostCopies) -> dict[str, dict[str, dict[str, Tensor]] | dict[str, Tensor]]:
    adapters = {
        adapter: {name: copies.take(f"{adapter}/{name}", value) for name, value in tensors.items()}
        for adapter, tensors in state.adapters.items()
    }
    return {"adapters": adapters, "optimizer": {name: copies.take(name, value) for name, value in state.optimizer.items()}}


def measure_step(options: step_cost.Options) -> float:
    engine = build_engine(options)
    step_s, _ = measure(Bench.build(options, engine.device), engine, options)
    return statistics.median(step_s)


if __name__ == "__main__":
    main(sys.argv[1:])
