"""What a training step costs beyond its bare network passes.

    python benchmarks/step_cost.py stage=tscd teacher=embedded batch_size=32

A step is everything `fit` does for a batch that is ready: draws, noising, the teacher's solver step, the target, the loss,
backward, clipping, optimizer step and EMA; for score distillation, both steps of a cycle with one update of the student and
two of the fake score; for feedback, a four-step student at its last step, and with the perceptual term images that enter its
rollout at the half. Its bare passes are the calls of the network in it,
recorded and repeated with nothing between them (benchmarks/passes.py), on the same network, dtype, roles, batch and threads.
The two are timed in turn and compared by their medians. Prints a table and, last, one line of JSON.

The options are the fields of `Options`. `sd15_random` and `sdxl_random` are the full-size networks with random weights.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import passes
from benchmarks.networks import Network, build_network, network_config, sd_schedule
from hyper_sd.config import EngineConfig, LrSchedulerConfig, OptimizerConfig
from hyper_sd.denoiser import Denoiser
from hyper_sd.engine import Engine
from hyper_sd.engines import start_engine
from hyper_sd.loop import update
from hyper_sd.objective import Batch, Context, Feedback, Objective, Shared, WeightedReward
from hyper_sd.randomness import Draws
from hyper_sd.roles import LoraSpec, Roles
from hyper_sd.stages.adversarial import Adversarial
from hyper_sd.stages.refl import ReFL
from hyper_sd.stages.score import Score
from hyper_sd.stages.tscd import TSCD, GuidanceRange
from hyper_sd.structured import Count, NonNegativeInt, Positive, structured

T = TypeVar("T")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GUIDANCE = GuidanceRange(min=3.0, max=8.0)
STAGES: dict[str, TSCD | Score | ReFL] = {
    "tscd": TSCD(segments=4, guidance=GUIDANCE),
    "tscd_adversarial": TSCD(segments=4, guidance=GUIDANCE, adversarial=Adversarial(weight=0.1)),
    "score": Score(rollout=(1,), fake_updates=2, ode_weight=0.0, guidance=GUIDANCE),
    "refl": ReFL(rollout=(4,), trained_step="last"),
    "refl_perceptual": ReFL(rollout=(4,), trained_step="last", perceptual_weight=0.05, perceptual_rollout=(4,)),
}
FREE_FEEDBACK = Feedback(  # decoder, reward and segmenter that cost nothing: their calls are counted, and what they cost is theirs
    decode=lambda x0: x0[:, :3],
    rewards={"mean": WeightedReward(lambda images, prompts: images.flatten(1).mean(1), 1.0, 1e3)},
    segment=lambda images, instances: images.flatten(1).mean(1),
)
PEAK_TFLOPS = {  # dense bf16 with float32 accumulation, from the vendors' data sheets
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """`steps` are measured after `warmup` unmeasured ones. `threads` is for the CPU; null leaves torch's default.

    Gradient checkpointing and torch.compile apply to the step and to its bare passes alike. `peak_tflops` is what MFU is
    relative to; null looks the device up, and leaves MFU out where it is unknown.
    """

    stage: Literal["tscd", "tscd_adversarial", "score", "refl", "refl_perceptual"] = "tscd"
    teacher: Literal["embedded", "sd15_random", "sdxl_random"] = "embedded"
    batch_size: Count = 32
    dtype: Literal["fp32", "bf16"] = "bf16" if torch.cuda.is_available() else "fp32"
    rank: Count = 64
    gradient_checkpointing: bool = False
    compile: bool = False
    threads: Count | None = None
    warmup: NonNegativeInt = 5
    steps: Count = 30
    peak_tflops: Positive | None = None


@dataclass(frozen=True)
class Bench:
    """A stage on a network: what the steps and the bare passes share."""

    stage: TSCD | Score | ReFL
    network: Network
    ctx: Context
    batch_size: int

    @classmethod
    def build(cls, options: Options, device: torch.device) -> "Bench":
        """On the meta device the passes can be counted at no cost in memory or time."""
        stage = STAGES[options.stage]
        network = build_network(*network_config(options.teacher), device, DTYPES[options.dtype])
        roles = Roles(network.net, LoraSpec(rank=options.rank), stage.adapters)
        with device:
            roles.attach({name: build(network.net, 0) for name, build in stage.modules.items()})
        denoiser = Denoiser(network.forward, roles, sd_schedule(), "eps")
        bench = cls(stage, network, Context(denoiser, roles, FREE_FEEDBACK if stage.uses_rewards else None), options.batch_size)
        roles.trainable(tuple(name for objective in bench.objectives for name in objective.trains))
        return bench

    @cached_property
    def objectives(self) -> tuple[Objective, ...]:
        return self.stage.objectives(self.ctx)

    @cached_property
    def passes(self) -> list[passes.Pass]:
        """The network's calls in one cycle."""
        return passes.record(self.stage, self.ctx, self.batch(0))

    def batch(self, step: int) -> Batch:
        size, network = self.batch_size, self.network
        draws = Draws(seed=0, step=step, samples=tuple(range(step * size, (step + 1) * size)))
        return Batch(network.latents(size), network.cond(size), network.cond(size), draws, ("",) * size)


def main(argv: list[str]) -> None:
    options = parse(argv)
    engine = build_engine(options)
    bench = Bench.build(options, engine.device)
    if options.gradient_checkpointing:
        bench.ctx.roles.enable_gradient_checkpointing()
    if options.compile:
        bench.network.net.compile(dynamic=False)
    step_s, bare_s = measure(bench, engine, options)
    equivalents = passes.forward_equivalents(bench.passes, options.batch_size)
    if engine.is_main:
        judged = passes.judged(bench.stage, bench.ctx, bench.batch(0))
        report(options, engine.device, step_s, bare_s, equivalents, judged, peak_memory_bytes(engine.device))
    engine.close()


def build_engine(options: Options) -> Engine:
    return start_engine(
        EngineConfig(
            gradient_checkpointing=options.gradient_checkpointing,
            accumulation=1,
            checkpoint_every_steps=1,
            checkpoint_every_seconds=None,
            keep_last=1,
            cpu_threads=options.threads,
        )
    )


def measure(bench: Bench, engine: Engine, options: Options) -> tuple[list[float], list[float]]:
    """Seconds of every measured step and of every measured set of bare passes, taken in turn."""
    roles = bench.ctx.roles
    for objective in bench.objectives:
        params = {f"{name}/{key}": p for name in objective.trains for key, p in roles.tensors(name).items()}
        engine.train(objective.trains, params, OptimizerConfig(lr=1e-6), LrSchedulerConfig(), options.warmup + options.steps)
    bare = partial(passes.repeat, bench.passes, bench.ctx.denoiser, bench.batch(0))
    step_s: list[float] = []
    bare_s: list[float] = []
    for index in range(options.warmup + options.steps):
        first = index * passes.cycle(bench.objectives)
        batches = [bench.batch(first + step) for step in range(passes.cycle(bench.objectives))]
        step_s.append(timed(engine.device, partial(training_cycle, bench, engine, first, batches)))
        roles.trainable(tuple(name for objective in bench.objectives for name in objective.trains))  # a turn leaves only its own
        bare_s.append(timed(engine.device, bare))
        for objective in bench.objectives:
            for param in roles.params(objective.trains):
                param.grad = None
    return step_s[options.warmup :], bare_s[options.warmup :]


def training_cycle(bench: Bench, engine: Engine, first: int, batches: Sequence[Batch]) -> None:
    for step, batch in enumerate(batches, first):
        shared: Shared = {}
        for objective in bench.objectives:
            if step % objective.every == 0:
                update(objective, [(batch, shared)], engine)
        bench.stage.after_step(bench.ctx, step)


def count_flops(options: Options) -> int:
    """Floating point operations of the bare passes, counted on the meta device; recomputed activations do not count."""
    bench = Bench.build(replace(options, batch_size=1), torch.device("meta"))  # torch's linear leaves the meta device for large inputs
    _ = bench.passes  # recorded before the counter counts
    with FlopCounterMode(display=False) as counter:
        passes.repeat(bench.passes, bench.ctx.denoiser, bench.batch(0))
    return options.batch_size * counter.get_total_flops()


def timed(device: torch.device, function: Callable[[], None]) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The peak of what torch allocated on the GPU, or of the process's resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report(
    options: Options,
    device: torch.device,
    step_s: list[float],
    bare_s: list[float],
    equivalents: float,
    judged: Mapping[str, float],
    peak_bytes: int,
) -> None:
    step, bare = statistics.median(step_s), statistics.median(bare_s)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    flops = count_flops(options)
    peak_flops = 1e12 * (options.peak_tflops or next((tflops for part, tflops in PEAK_TFLOPS.items() if part in name), 0.0))
    result = {
        **asdict(options),
        "device": name,
        "step_s": step,
        "bare_s": bare,
        "ratio": step / bare,
        "forward_equivalents": equivalents,
        **judged,
        "samples_per_s": options.batch_size / step,
        "peak_memory_bytes": peak_bytes,
        "flops_per_step": flops,
        "mfu": flops / step / peak_flops if peak_flops else None,
    }
    print(f"{options.stage} on {options.teacher}: {name}, {options.dtype}, batch {options.batch_size}, {options.steps} steps")
    print(f"{'':20}{'median':>12}{'10 %':>12}{'90 %':>12}  ms")
    for row, seconds in (("step", step_s), ("bare network passes", bare_s)):
        low, *_, high = statistics.quantiles(seconds, n=10) if len(seconds) > 1 else seconds * 2
        print(f"{row:20}{1e3 * statistics.median(seconds):12.1f}{1e3 * low:12.1f}{1e3 * high:12.1f}")
    print(f"{equivalents:g} forward-equivalents a sample, a backward counted as one and half a network as a whole", end="")
    print("; beside them " + ", ".join(f"{count:g} {name}" for name, count in judged.items()) if judged["decoded"] else "")
    print(f"ratio {result['ratio']:.3f}   {result['samples_per_s']:.2f} samples/s   peak {peak_bytes / 2**30:.2f} GiB", end="")
    print(f"   {flops / 1e12:.3f} TFLOP a step" + (f"   MFU {result['mfu']:.1%}" if result["mfu"] else ""))
    print(json.dumps(result))


def parse(argv: list[str]) -> Options:
    return parse_as(Options, argv)


def parse_as(cls: type[T], argv: list[str]) -> T:
    """`key=value` arguments as a dataclass, or `--help`; raises ValueError naming the key."""
    if "--help" in argv or "-h" in argv:
        print(usage(cls))
        raise SystemExit(0)
    values: dict[str, Any] = {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"got {argument!r}, expected key=value")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    return structured(cls, values)


def usage(cls: type) -> str:
    """What the program does, and every option with its default and what is allowed."""
    hints = get_type_hints(cls)
    options = (f"  {field.name}={json.dumps(field.default)}".ljust(32) + _allowed(hints[field.name]) for field in fields(cls))
    return "\n".join([str(sys.modules[cls.__module__].__doc__), *options])


def _allowed(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_args(hint):
        return " or ".join(map(_allowed, get_args(hint)))
    return "null" if hint is type(None) else str(hint.__name__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"step_cost: {error}")
