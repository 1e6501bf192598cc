"""What data parallelism costs: bytes between processes, and the efficiency they leave on 8, 64 and 512 GPUs.

    python benchmarks/scaling.py teacher=sdxl_random stage=score batch_size=8 step_s=2.1
    python benchmarks/scaling.py measure=true          also two gloo processes against one, on this machine

Trained numbers are counted on the meta device. `step_s` is what `benchmarks/step_cost.py` measured on one GPU for one cycle of the
stage; where it is null, the cycle's counted operations at `tflops`. Model of a mean over n processes: a ring moves 2 (n-1)/n of the
bytes through each link, in nodes of 8 over NVLink first and then, each node as one, over its network; every bucket waits 2 log2(n)
times `latency_us`. A role's reduce hides behind the last backward pass, one forward-equivalent of the cycle. ZeRO-1 and -2 move as
many bytes as the plain engine; ZeRO-3 also gathers the frozen network in every forward and every backward pass.

    efficiency = step / (step + what of the communication is not hidden)

The options are the fields of `Options`. Prints tables and, last, one line of JSON.
"""

import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import step_cost
from benchmarks.passes import cycle, forward_equivalents
from benchmarks.step_cost import Bench, count_flops, parse_as
from hyper_sd.plain_engine import BUCKET_BYTES
from hyper_sd.structured import Count, NonNegative, Positive

ROOT = Path(__file__).parents[1]
GPUS_PER_NODE = 8
NUM_GPUS = (8, 64, 512)
NVLINK = 450e9  # bytes a second out of one H100, one direction
NETWORKS = {"NVLink": None, "400 Gbit": 400e9 / 8, "100 Gbit": 100e9 / 8}  # bytes a second out of one node; None: NVLink between all


@dataclass(frozen=True, kw_only=True)
class Options:
    """`batch_size` is that of one GPU. `achieved` is the share of a link's bandwidth that a collective reaches."""

    teacher: Literal["embedded", "sd15_random", "sdxl_random"] = "sdxl_random"
    stage: Literal["tscd", "tscd_adversarial", "score"] = "score"
    rank: Count = 64
    batch_size: Count = 8
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    step_s: Positive | None = None
    tflops: Positive = 350.0
    achieved: Positive = 0.7
    latency_us: NonNegative = 10.0
    measure: bool = False


@dataclass(frozen=True)
class Traffic:
    """What one GPU's cycle moves: numbers by role with its updates in a cycle, the frozen network's bytes and passes through it."""

    roles: dict[str, int]
    updates: dict[str, int]
    base_bytes: int
    base_passes: int
    equivalents: float

    def reduced(self, bytes_each: int) -> dict[str, int]:
        """Bytes a role hands to the mean in each of its updates."""
        return {role: bytes_each * size for role, size in self.roles.items()}


def main(argv: list[str]) -> None:
    options = parse_as(Options, argv)
    traffic = count(options)
    step_s = options.step_s or cycle_flops(options) / (options.tflops * 1e12)
    bytes_each = 2 if options.reduce_dtype == "bf16" else 4
    rows = [predict(options, traffic, step_s, network, gpus) for network in NETWORKS for gpus in NUM_GPUS]
    result: dict[str, Any] = {
        **asdict(options),
        "step_s": step_s,
        "reduced_bytes": traffic.reduced(bytes_each),
        "updates": traffic.updates,
        "gathered_bytes_zero3": traffic.base_bytes * traffic.base_passes,
        "predicted": rows,
    }
    print(f"{options.stage} on {options.teacher}, rank {options.rank}, batch {options.batch_size} a GPU, cycle of {step_s:.3f} s")
    for role, size in result["reduced_bytes"].items():
        print(f"{role:20}{size / 1e6:10.1f} MB an update, {traffic.updates[role]} in a cycle")
    print(f"{'ZeRO-3 gathers':20}{result['gathered_bytes_zero3'] / 1e6:10.1f} MB a cycle, {traffic.base_passes} passes")
    print(f"{'':10}{'GPUs':>6}{'reduce':>12}{'plain':>9}{'no overlap':>12}{'ZeRO-3':>9}")
    for row in rows:
        shares = f"{row['plain']:9.1%}{row['no_overlap']:12.1%}{row['zero3']:9.1%}"
        print(f"{row['network']:10}{row['gpus']:6}{1e3 * row['reduce_s']:9.1f} ms{shares}")
    if options.measure:
        result["measured"] = measured = measure()
        print(f"two gloo processes: {measured['efficiency']:.1%} of twice one ({measured['samples_per_s']} samples/s)")
    print(json.dumps(result))


def count(options: Options) -> Traffic:
    """Counted on the meta device, from the calls that a cycle of the stage makes."""
    bench = build(options, options.batch_size)
    length = cycle(bench.objectives)
    names = {"+".join(objective.trains): objective for objective in bench.objectives}
    sizes = {name: sum(p.numel() for p in bench.ctx.roles.params(objective.trains)) for name, objective in names.items()}
    updates = {name: length // objective.every for name, objective in names.items()}
    adapters = {id(p) for name in bench.ctx.roles.adapters for p in bench.ctx.roles.params((name,))}
    base = sum(p.numel() * p.element_size() for p in bench.network.net.parameters() if id(p) not in adapters)
    passes = sum(1 + call.gradient for call in bench.passes)
    return Traffic(sizes, updates, base, passes, forward_equivalents(bench.passes, options.batch_size))


def build(options: Options, batch_size: int) -> Bench:
    return Bench.build(_step_options(options, batch_size), torch.device("meta"))


def cycle_flops(options: Options) -> int:
    return count_flops(_step_options(options, options.batch_size))


def predict(options: Options, traffic: Traffic, step_s: float, network: str, gpus: int) -> dict[str, Any]:
    """Seconds of a cycle's means and gathers, and the efficiencies they leave."""
    bytes_each = 2 if options.reduce_dtype == "bf16" else 4
    hidden = step_s / traffic.equivalents
    reduce_s = exposed = 0.0
    for role, size in traffic.reduced(bytes_each).items():
        seconds = 2 * ring_s(options, size, network, gpus) + 2 * latency_s(options, size, gpus)
        last = min(size, BUCKET_BYTES * bytes_each // 4)  # the last bucket has nothing left to hide behind
        shown = max(seconds - hidden, seconds * last / size)
        reduce_s += traffic.updates[role] * seconds
        exposed += traffic.updates[role] * shown
    gathered = traffic.base_passes * ring_s(options, traffic.base_bytes, network, gpus)
    return {
        "network": network,
        "gpus": gpus,
        "reduce_s": reduce_s,
        "gather_s": gathered,
        "plain": step_s / (step_s + exposed),
        "no_overlap": step_s / (step_s + reduce_s),
        "zero3": step_s / (step_s + exposed + max(0.0, gathered - step_s)),
    }


def ring_s(options: Options, size: int, network: str, gpus: int) -> float:
    """Seconds of a reduce-scatter, or of an all-gather, of so many bytes: in the node over NVLink, then between the nodes."""
    bandwidth = NETWORKS[network]
    if bandwidth is None:
        return (gpus - 1) / gpus * size / (NVLINK * options.achieved)
    nodes = gpus // GPUS_PER_NODE
    inside = (GPUS_PER_NODE - 1) / GPUS_PER_NODE * size / (NVLINK * options.achieved)
    return inside + (nodes - 1) / nodes * size / (bandwidth * options.achieved)


def latency_s(options: Options, size: int, gpus: int) -> float:
    return math.ceil(size / BUCKET_BYTES) * math.log2(gpus) * options.latency_us * 1e-6


def measure() -> dict[str, Any]:
    """The embedded teacher with one thread and one batch a process: samples a second of two processes over twice those of one."""
    arguments = ["benchmarks/step_cost.py", "stage=tscd", "teacher=embedded", "batch_size=16", "threads=1", "steps=20"]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu_2proc.yaml", "--main_process_port", "0"]
    speeds = []
    for command in ([sys.executable, *arguments], [sys.executable, *launcher, *arguments]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        speeds.append(json.loads(done.stdout.splitlines()[-1])["samples_per_s"])
    one, two = speeds[0], 2 * speeds[1]
    return {"samples_per_s": [round(one, 2), round(two, 2)], "efficiency": two / (2 * one)}


def _step_options(options: Options, batch_size: int) -> step_cost.Options:
    return step_cost.Options(stage=options.stage, teacher=options.teacher, rank=options.rank, batch_size=batch_size, dtype="bf16")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"scaling: {error}")
