"""What is refused before a weight is loaded and a directory is written to: settings that cannot be trained or measured."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from hyper_sd.config import RewardConfig, RunConfig, StagePlan
from hyper_sd.data import Source
from hyper_sd.data.scenes import IMAGE_SIZE
from hyper_sd.engine import Engine
from hyper_sd.evaluate import check_prompts
from hyper_sd.lora_file import inspect_lora
from hyper_sd.measure import check_judge
from hyper_sd.objective import Stage
from hyper_sd.rewards import check_rewards
from hyper_sd.rewards.tiny_decoder import check_tiny_decoder
from hyper_sd.stages.refl import ReFL
from hyper_sd.stages.rollout import RollsOut
from hyper_sd.stages.tscd import STEP_COUNTS
from hyper_sd.structured import build_target, suggestion
from hyper_sd.teachers import TeacherFacts, layer_names


def check_plan(config: RunConfig, facts: TeacherFacts) -> dict[str, Stage]:
    """The selected stages' mathematics. Raises ValueError, naming the key, for anything that cannot run on this teacher."""
    facts.schedule.check(facts.prediction)
    if config.teacher.dtype == "fp16":
        raise ValueError("teacher.dtype=fp16: gradients of distances this small are zero in float16; train with auto, bf16 or fp32")
    check_judge(config.eval, facts.image_size)
    check_prompts(config.eval)
    _check_targets(config)
    _check_rewards(config, facts)
    stages = {name: build_target(plan.method, plan.key) for name, plan in config.selected.items()}
    for name, stage in stages.items():
        try:
            stage.check(facts.schedule.num_steps)
        except ValueError as error:
            raise ValueError(str(error).replace("stage.", f"{config.stages[name].key}.")) from None
        _check_sampler(config, config.stages[name], stage, facts.schedule.num_steps)
        _check_feedback(config, config.stages[name], stage)
        if unknown := config.stages[name].optimizers.keys() - set(stage.trains):
            given, allowed = ", ".join(sorted(unknown)), ", ".join(stage.trains)
            raise ValueError(f"{config.stages[name].key}.optimizers: there is no {given} to train; the stage trains {allowed}")
    if config.init is not None:
        header = inspect_lora(Path(config.init), key="init")
        header.require_rank(config.lora.rank)
        header.require_base(facts.fingerprint)
    return stages


def check_work(engine: Engine, plan: StagePlan, stage: Stage) -> None:
    """Raise ValueError unless every process gets micro-batches, and, where they share the network, calls it equally often."""
    size = len(engine.micro_batches(plan.batch_size, start=0, key=plan.key)[0])
    if engine.collective_forward and size % stage.sample_period:
        raise ValueError(
            f"{plan.key}: under ZeRO-3 every process must call the network equally often, but every {stage.sample_period}th sample "
            f"(ode_one_in) is given more calls than the others, and a process has {size} samples at a time; make batch_size / (processes "
            f"x engine.accumulation) a multiple of {stage.sample_period}, or use configs/accelerate/deepspeed_zero2.yaml"
        )
    if plan.guard is not None:
        uneven = engine.collective_forward and plan.guard.prompts % engine.world_size
        if plan.guard.prompts < engine.world_size or uneven:
            raise ValueError(
                f"{plan.key}.guard.prompts={plan.guard.prompts}: every process draws a share of them, so there must be as many as the "
                f"{engine.world_size} processes at least, and under ZeRO-3 a multiple of that"
            )


def check_groups(config: RunConfig, source: Source) -> None:
    """Raise ValueError for a stage whose batches would not be the groups that the source's samples come in."""
    for plan in config.selected.values():
        if source.batch_size not in (None, plan.batch_size):
            raise ValueError(
                f"{plan.key}.batch_size={plan.batch_size}: samples of several sizes or sources come in groups of "
                f"data.batch_size={source.batch_size}; all stages must have the same"
            )


def notices(config: RunConfig, facts: TeacherFacts, stages: Mapping[str, Stage]) -> Iterator[str]:
    """What is allowed, but hardly what was meant."""
    first = next(iter(config.selected))
    if config.init is None and first != next(iter(config.stages)):
        yield f"only: {first} starts from a fresh adapter; init=FILE.safetensors starts it from that of an earlier stage"
    uses_rewards = any(stage.uses_rewards for stage in stages.values())
    if uses_rewards and facts.image_size != IMAGE_SIZE and any(reward.kind == "embedded" for reward in config.rewards.values()):
        yield (
            f"rewards: {', '.join(config.rewards)} knows scenes of {IMAGE_SIZE} pixels alone, and the teacher draws {facts.image_size}: "
            "its feedback means nothing here. recipe=demo_tscd has none; docs/rewards.md lists rewards for photographs"
        )
    for name, stage in stages.items():
        if isinstance(stage, ReFL) and not (stage.reward_weight or stage.tscd_weight or stage.perceptual_weight):
            yield f"{config.stages[name].key}: reward_weight=0 leaves the distance to the student itself, so nothing will be learnt"
    made_for = {count for stage in stages.values() for count in stage.step_counts}
    if config.eval.prompts and (others := sorted(set(config.eval.steps) - made_for - set(STEP_COUNTS))):
        yield f"eval.steps: no stage's adapter is made for {', '.join(map(str, others))} steps; the teacher alone is measured there"


def _check_sampler(config: RunConfig, plan: StagePlan, stage: Stage, num_steps: int) -> None:
    """Raise ValueError for a stage whose adapter would be sampled in another way than it is trained for."""
    if isinstance(stage, RollsOut) and stage.step_counts != (1,) and stage.eta != config.eval.eta:
        raise ValueError(f"{plan.key}.eta={stage.eta}: adapters are sampled with eval.eta={config.eval.eta}; set eval.eta alone")
    start, stride = config.eval.start, num_steps // stage.solver_steps
    if start is None or stage.start is not None or 1 not in stage.step_counts:
        return
    if not stride - 1 <= start < num_steps or (start + 1) % stride:
        raise ValueError(
            f"eval.start must be a timestep of the samplers' grid, {stride - 1}, {2 * stride - 1}, ... {num_steps - 1}: got {start}; "
            "or null for the last"
        )


def _check_targets(config: RunConfig) -> None:
    """Raise ValueError for a name in lora.targets that no layer of the network has."""
    layers = layer_names(config.teacher)
    for target in config.lora.targets:
        if not any(f".{layer}".endswith(f".{target}") for layer in layers):
            ends = sorted({layer.rpartition(".")[2] for layer in layers} - {"0", "2"})
            raise ValueError(f"lora.targets: no layer of the network ends in {target!r}{suggestion(target, ends)}")


def _check_rewards(config: RunConfig, facts: TeacherFacts) -> None:
    if config.decode.tiny is not None:
        check_tiny_decoder(config.decode.tiny, facts.image_size, facts.latent_shape, key="decode.tiny")
    for name, reward in config.rewards.items():
        if config.heldout is not None and _weights(reward) == _weights(config.heldout):
            raise ValueError(
                f"heldout.kind={config.heldout.kind}: rewards.{name} is trained on it; what a guard looks at must be another reward"
            )
    check_rewards(config.judges)


def _weights(reward: RewardConfig) -> tuple[str | None, ...]:
    """Equal for two that are the same file, under whatever kind; the embedded ones have theirs by their kind."""
    return reward.path, reward.file or reward.kind


def _check_feedback(config: RunConfig, plan: StagePlan, stage: Stage) -> None:
    if stage.uses_rewards and not config.rewards:
        raise ValueError(f"{plan.key} is trained on rewards, and there are none; add one, e.g. +reward@rewards.embedded=embedded")
    if stage.uses_instances and config.segmenter is None:
        raise ValueError(f"{plan.key}.perceptual_weight needs a segmenter, and there is none; choose one, e.g. segmenter=mask2former")
    if plan.guard is None:
        return
    if not plan.guard.steps:
        raise ValueError(f"{plan.key}.guard.steps is empty: name some of {', '.join(map(str, stage.step_counts))}")
    if plan.guard.patience is not None and not stage.uses_rewards:
        raise ValueError(
            f"{plan.key}.guard.patience={plan.guard.patience} waits for trained rewards to rise, and the stage trains on none; set "
            f"{plan.key}.guard.patience=null, and the guard only keeps the best adapter"
        )
    if config.heldout is None:
        raise ValueError(
            f"{plan.key}.guard looks at a held-out reward, and there is none; add one, e.g. reward@heldout=embedded_heldout, or set "
            f"{plan.key}.guard=null"
        )
    if unknown := set(plan.guard.steps) - set(stage.step_counts):
        raise ValueError(
            f"{plan.key}.guard.steps: the stage's adapter is made for {', '.join(map(str, stage.step_counts))} steps, not for "
            f"{', '.join(map(str, sorted(unknown)))}"
        )
