"""What is refused before a weight is loaded and a directory is written to: settings that cannot be trained or measured."""

from pathlib import Path

from hyper_sd.config import RewardConfig, RunConfig, StagePlan
from hyper_sd.data import Source
from hyper_sd.engine import Engine
from hyper_sd.evaluate import check_prompts
from hyper_sd.lora_file import inspect_lora
from hyper_sd.measure import check_judge
from hyper_sd.objective import Stage
from hyper_sd.rewards import check_rewards
from hyper_sd.rewards.tiny_decoder import check_tiny_decoder
from hyper_sd.structured import build_target, suggestion
from hyper_sd.teachers import TeacherFacts, layer_names


def check_plan(config: RunConfig, facts: TeacherFacts) -> dict[str, Stage]:
    """The selected stages' mathematics. Raises ValueError, naming the key, for anything that cannot run on this teacher."""
    facts.schedule.check(facts.prediction)
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
        _check_start(config, stage, facts.schedule.num_steps)
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
    size = len(engine.micro_batches(plan.batch_size, start=0)[0])
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


def _check_start(config: RunConfig, stage: Stage, num_steps: int) -> None:
    """Raise ValueError for an eval.start that the samplers of a stage which leaves its start to it do not have."""
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
