"""Every process does the same work at every step: what changes its amount is drawn for the whole batch, never for a process's part."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hyper_sd.cli import compose
from hyper_sd.config import run_config
from hyper_sd.denoiser import Denoiser
from hyper_sd.guidance import Cond
from hyper_sd.objective import Context, Stage
from hyper_sd.plain_engine import PlainEngine
from hyper_sd.plan_checks import check_work
from hyper_sd.stages.adversarial import Adversarial
from hyper_sd.stages.score import Score
from hyper_sd.stages.tscd import TSCD, GuidanceRange
from hyper_sd.structured import build_target
from tests.networks import unet_batch, unet_denoiser

Call = tuple[tuple[str, ...], int, bool]  # role, samples, whether it is for a gradient
GUIDANCE = GuidanceRange(min=2.0, max=5.0)
ADVERSARIAL = Adversarial(weight=0.1, real="data", hidden=8)
STAGES = [
    TSCD(segments=4, guidance=GUIDANCE, adversarial=ADVERSARIAL, empty_prompt_ratio=0.5, offset_noise=0.1),
    Score(guidance=GUIDANCE, ode_steps=2, ode_one_in=4, tscd_weight=0.5, adversarial=ADVERSARIAL),
]


def calls(stage: Stage, denoiser: Denoiser, samples: range, step: int) -> list[Call]:
    """The network's calls of one process in one step."""
    made: list[Call] = []

    def noted(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        made.append((denoiser.roles.active, len(x_t), torch.is_grad_enabled()))
        return denoiser.forward(x_t, t, cond)

    objectives = stage.objectives(Context(replace(denoiser, forward=noted), denoiser.roles))
    batch, shared = unet_batch(samples, step=step), {}
    for objective in objectives:
        if step % objective.every == 0:
            objective.loss(batch, shared)
    return made


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: type(stage).__name__)
def test_all_processes_make_the_same_calls(stage: TSCD | Score) -> None:
    denoiser = unet_denoiser(stage.adapters)
    denoiser.roles.attach({name: build(denoiser.roles.net, 0) for name, build in stage.modules.items()})
    amounts: Counter[int] = Counter()
    for step in range(8):
        first, second = (calls(stage, denoiser, samples, step) for samples in (range(4), range(4, 8)))
        assert first == second, step
        amounts[len(first)] += 1
    assert len(amounts) > 1 or isinstance(stage, TSCD), "no step of these did other work than another: nothing was compared"


def test_where_processes_differ_zero3_is_refused() -> None:
    """Two samples a process, of which every fourth is followed: one process has one, the other none."""
    stage = Score(guidance=GUIDANCE, rollout=(1,), ode_steps=2, ode_one_in=4)
    denoiser = unet_denoiser(stage.adapters)
    assert calls(stage, denoiser, range(2), 0) != calls(stage, denoiser, range(2, 4), 0)
    config = run_config(compose("train", ["recipe=smoke", "data.batch_size=2"]))
    engine = PlainEngine(config.engine)
    check_work(engine, config.stages["score"], stage)
    engine.collective_forward = True  # as DeepSpeedEngine's is in ZeRO-3
    with pytest.raises(ValueError, match=r"stages.score: under ZeRO-3 .* a multiple of 4, or use configs/accelerate/deepspeed_zero2.yaml"):
        check_work(engine, config.stages["score"], stage)
    check_work(engine, replace(config.stages["score"], batch_size=8), stage)
    check_work(engine, config.stages["score"], replace(stage, ode_weight=0.0))


def test_prompts_of_a_guard_are_enough_for_every_process() -> None:
    config = run_config(compose("train", ["recipe=smoke", "stages.refl.guard.prompts=4"]))
    plan, engine = config.stages["refl"], PlainEngine(config.engine)
    stage = build_target(plan.method, plan.key)
    for world_size, zero3, fits in ((4, True, True), (3, False, True), (3, True, False), (5, False, False)):
        engine.world_size, engine.collective_forward = world_size, zero3
        plan = replace(plan, batch_size=world_size * config.engine.accumulation)
        with nullcontext() if fits else pytest.raises(ValueError, match=r"stages.refl.guard.prompts=4: .* the [35] processes"):
            check_work(engine, plan, stage)
