"""The adversarial term: what it trains, what it costs, and problems whose answer is known."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from hyper_sd.denoiser import Denoiser
from hyper_sd.objective import Batch, Context, Objective, Shared
from hyper_sd.randomness import Draws, Purpose, normal
from hyper_sd.roles import LoraSpec, Roles
from hyper_sd.stages.adversarial import HEADS, Adversarial, Heads
from hyper_sd.stages.score import Score
from hyper_sd.stages.tscd import TSCD, GuidanceRange
from tests.networks import sd_schedule, unet_batch, unet_denoiser

GUIDED = GuidanceRange(min=2.0, max=2.0)
FROZEN = TSCD(segments=2, guidance=GUIDED, adversarial=Adversarial(weight=0.5))
WITH_LORA = replace(FROZEN, adversarial=Adversarial(weight=0.5, backbone="lora", r1_weight=1.0))


def start(stage: TSCD | Score, *, checkpointing: bool = False) -> tuple[Denoiser, tuple[Objective, ...]]:
    denoiser = unet_denoiser(stage.adapters, encoder_only=stage.encoder_only, checkpointing=checkpointing)
    denoiser.roles.attach({name: build(denoiser.roles.net, 0) for name, build in stage.modules.items()})
    stage_objectives = stage.objectives(Context(denoiser, denoiser.roles))
    denoiser.roles.trainable(tuple(name for objective in stage_objectives for name in objective.trains))
    return denoiser, stage_objectives


def step(objectives: tuple[Objective, ...], batch: Batch, denoiser: Denoiser) -> dict[str, list[Tensor]]:
    """Every objective's gradients, by what it trains."""
    shared: Shared = {}
    gradients = {}
    for objective in objectives:
        value = objective.loss(batch, shared).value
        gradients["+".join(objective.trains)] = list(torch.autograd.grad(value, denoiser.roles.params(objective.trains)))
    return gradients


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        (FROZEN, ["student", "heads"]),
        (WITH_LORA, ["student", "disc+heads"]),
        (Score(rollout=(1,), adversarial=Adversarial(weight=1.0, real="data")), ["student", "fake", "heads"]),
    ],
)
def test_every_objective_reaches_all_it_trains(stage: TSCD | Score, trained: list[str]) -> None:
    denoiser, objectives = start(stage)
    gradients = step(objectives, unet_batch(), denoiser)
    assert list(gradients) == trained
    for name, values in gradients.items():
        assert all(value.isfinite().all() for value in values)
        # a fresh adapter is B A with B = 0, so that its A has no gradient yet
        assert all(value.any() for value in values if name == "student"), name
        assert sum(bool(value.any()) for value in values) >= len(values) / 2, name


def test_heads_are_a_function_of_their_seed() -> None:
    one, two, other = (Heads((8, 16), 8, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_the_students_gradient_flows_through_the_frozen_backbone() -> None:
    only = replace(FROZEN, distance_weight=0.0, adversarial=Adversarial(weight=1.0))
    denoiser, (student, _) = start(only)
    value = student.loss(unet_batch(), {}).value
    assert all(gradient.any() for gradient in torch.autograd.grad(value, denoiser.roles.params(("student",)), retain_graph=True))
    held_back_by_the_engine = torch.autograd.grad(value, denoiser.roles.params((HEADS,)), allow_unused=True)
    assert any(gradient is not None for gradient in held_back_by_the_engine)
    assert not denoiser.roles.net.conv_in.weight.requires_grad
    assert not any(p.requires_grad for p in denoiser.roles.params(("target",)))


def test_both_turns_show_the_same_captions() -> None:
    """Else the discriminator could tell fake from real by whether the caption was dropped."""
    denoiser, _ = start(FROZEN)
    stage, seen = replace(FROZEN, empty_prompt_ratio=0.5), []

    def noted(x_t: Tensor, t: Tensor, cond: tuple[Tensor, ...]) -> Tensor:
        seen.append(cond[0][: len(x_t)])
        return denoiser.forward(x_t, t, cond)

    objectives = stage.objectives(Context(replace(denoiser, forward=noted), denoiser.roles))
    batch, shared = unet_batch(), {}
    objectives[0].loss(batch, shared)
    of_the_student, calls = seen[-1], len(seen)
    assert not torch.equal(of_the_student, batch.cond[0])
    objectives[1].loss(batch, shared)
    assert len(seen) > calls and all(torch.equal(cond, of_the_student) for cond in seen[calls:])


@pytest.mark.parametrize("rollout", [(1,), (1, 2)])
def test_a_score_stages_discriminator_learns_in_every_step(rollout: tuple[int, ...]) -> None:
    stage = Score(rollout=rollout, fake_updates=2, adversarial=Adversarial(weight=1.0, real="data"))
    denoiser, objectives = start(stage)
    assert [objective.every for objective in objectives] == [2, 1, 1]
    batch, shared = unet_batch(step=1), {}
    for objective in objectives[1:]:  # a step without the student's turn
        value = objective.loss(batch, shared).value
        assert all(gradient.any() for gradient in torch.autograd.grad(value, denoiser.roles.params(objective.trains)[1:2]))
    prediction = denoiser(("student",), *stage.student_input(denoiser, batch), batch.cond)
    own, noise = (batch.draws.normal(p, batch.x0.shape[1:]) for p in (Purpose.ADVERSARIAL_REAL, Purpose.ADVERSARIAL_NOISE))
    clean = torch.full((len(batch.x0),), -1)
    if rollout == (1,):  # LCM's sampler ends at x0 itself
        fake, real = prediction.x0, batch.x0
    else:  # TCD's at the clean end, which has noise: the data have as much of it, or it would tell them apart
        fake, real = denoiser.jump(prediction, clean), denoiser.noise(batch.x0, own, clean)
    for name, points in (("adversarial_fake", fake), ("adversarial_real", real)):
        torch.testing.assert_close(shared[name], denoiser.renoise(points, clean, noise, shared["adversarial_t"]).detach())


class _Scores(nn.Module):
    """Heads whose logits are the sums of the features over channels."""

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [feature.sum(1) for feature in features]


@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
def test_both_losses_are_the_written_formulas(loss: Literal["hinge", "non_saturating"]) -> None:
    term = Adversarial(weight=0.5, loss=loss, r1_weight=0.3, r1_noise=0.2)
    denoiser, batch, shared = unet_denoiser(()), unet_batch(), Shared()
    denoiser.roles.attach({HEADS: _Scores()})
    fake, real, s = batch.x0 + 1, batch.x0, torch.full((len(batch.x0),), 100)

    def logits(x_t: Tensor) -> list[Tensor]:
        return [feature.sum(1) for feature in denoiser.features((), x_t, shared["adversarial_t"], batch.cond)]

    def mean(parts: Iterable[Tensor]) -> Tensor:
        return torch.stack([part.mean() for part in parts]).mean()

    student = term.generator_loss(denoiser, batch, shared, fake, real, s, 999).value
    fooled, seen, true = shared["adversarial_fake"], term.discriminator_loss(denoiser, batch, shared).value, shared["adversarial_real"]
    near = true + 0.2 * batch.draws.normal(Purpose.R1_NOISE, true.shape[1:])
    r1 = mean((a - b) ** 2 for a, b in zip(logits(true), logits(near), strict=True))
    if loss == "hinge":
        ours = mean(-d for d in logits(fooled))
        theirs = mean((1 - d).clamp(min=0) for d in logits(true)) + mean((1 + d).clamp(min=0) for d in logits(fooled))
    else:
        ours = mean(torch.log(1 + torch.exp(-d)) for d in logits(fooled))
        theirs = mean(torch.log(1 + torch.exp(-d)) for d in logits(true)) + mean(torch.log(1 + torch.exp(d)) for d in logits(fooled))
    torch.testing.assert_close(student, ours)
    torch.testing.assert_close(seen, theirs + 0.3 * r1)
    assert r1 > 0


@pytest.mark.parametrize("stage", [FROZEN, Score(rollout=(1,), ode_weight=0.0, adversarial=Adversarial(weight=0.5, real="data"))])
def test_the_term_is_added_with_its_weight(stage: TSCD | Score) -> None:
    denoiser, (student, *_) = start(stage)
    plain = replace(stage, adversarial=None).objectives(Context(denoiser, denoiser.roles))[0]
    batch = unet_batch()
    with_term, without = student.loss(batch, {}), plain.loss(batch, {})
    torch.testing.assert_close(with_term.value, without.value + 0.5 * with_term.logs["adversarial"])
    assert with_term.logs["adversarial"].abs() > 1e-3


def test_t_max_bounds_the_noise_but_never_below_the_points() -> None:
    draws = unet_batch(range(64)).draws
    s = torch.tensor([-1, 700] * 32)
    t = Adversarial(weight=1.0, t_max=0.5).times(draws, s, 999, 1000)
    assert t[::2].max() < 500 and t[::2].max() > 400 and t[1::2].eq(700).all()


def test_without_weight_the_student_learns_as_without_the_term() -> None:
    denoiser, (student, _) = start(replace(FROZEN, adversarial=Adversarial(weight=0.0)))
    plain = TSCD(segments=2, guidance=GUIDED).objectives(Context(denoiser, denoiser.roles))[0]
    batch = unet_batch()
    torch.testing.assert_close(student.loss(batch, {}).value, plain.loss(batch, {}).value)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    for stage in (FROZEN, WITH_LORA, Score(rollout=(1,), ode_one_in=2, adversarial=Adversarial(weight=1.0, real="data"))):
        (one, plain), (two, checkpointed) = start(stage), start(stage, checkpointing=True)
        expected, got = step(plain, unet_batch(), one), step(checkpointed, unet_batch(), two)
        for name, values in expected.items():
            torch.testing.assert_close(got[name], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [FROZEN, Score(rollout=(1, 2), ode_weight=0.5, adversarial=Adversarial(weight=1.0, real="data"))])
def test_micro_batches_are_the_whole(stage: TSCD | Score) -> None:
    denoiser, objectives = start(stage)
    whole = step(objectives, unet_batch(range(4)), denoiser)
    halves = [step(objectives, unet_batch(half), denoiser) for half in (range(2), range(2, 4))]
    for name, values in whole.items():
        means = [(one + other) / 2 for one, other in zip(*(half[name] for half in halves), strict=True)]
        error = sum((mean - value).square().sum() for mean, value in zip(means, values, strict=True))
        assert error < 1e-8 * sum(value.square().sum() for value in values), name  # 1e-4 of the norm


def test_the_discriminator_sees_the_segment_and_times_no_lower_than_the_points() -> None:
    _, (student, _) = start(replace(FROZEN, segments=4))
    seen: list[int] = []
    for number in range(50):
        batch, shared = unet_batch(step=number), {}
        student.loss(batch, shared)
        t, _, s = TSCD(segments=4).draw_points(batch.draws, 1000)
        noised = shared["adversarial_t"]
        assert (noised >= s).all() and torch.equal(noised // 250, t // 250)
        seen += noised.tolist()
    assert len(set(seen)) > 100


def test_one_batch_serves_both_turns_in_8_passes() -> None:
    """A forward is 1, a backward through the frozen network is 1, a pass through the encoder half counted as whole."""
    denoiser, (student, discriminator) = start(FROZEN)
    net, batch, passes = denoiser.roles.net, unet_batch(), Counter[str]()
    net.conv_in.register_forward_hook(lambda _, args, out: passes.update({"forward": len(args[0])}))

    def watch(_: nn.Module, args: object, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda gradient: passes.update({"backward": len(gradient)}))

    net.mid_block.register_forward_hook(watch)
    shared: Shared = {}
    student.loss(batch, shared).value.backward(inputs=denoiser.roles.params(("student",)))
    discriminator.loss(batch, shared).value.backward(inputs=denoiser.roles.params((HEADS,)))
    assert passes["forward"] == 6 * len(batch.x0)  # teacher 2, target, student, encoder of the student's and of the real points
    assert passes["backward"] == 2 * len(batch.x0)  # through the student's pass and through the encoder of its points


def test_renoising_is_the_forward_process() -> None:
    denoiser, _ = start(FROZEN)
    x0, first, second = (normal((key,), range(6), (4, 8, 8)) for key in (1, 2, 3))
    s, t = torch.tensor([-1, 0, 100, 499, 300, 998]), torch.tensor([0, 0, 100, 500, 999, 999])
    (alpha_s, sigma_s), (alpha_t, sigma_t) = denoiser.schedule(s), denoiser.schedule(t)
    ratio = alpha_t / alpha_s
    spread = (sigma_t.square() - (ratio * sigma_s).square()).clamp(min=0).sqrt()
    got = denoiser.renoise(denoiser.noise(x0, first, s), s, second, t)
    shape = (-1, 1, 1, 1)
    want = alpha_t.view(shape) * x0 + (ratio * sigma_s).view(shape) * first + spread.view(shape) * second
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((ratio * sigma_s).square() + spread.square(), sigma_t.square())


class _Identity(nn.Module):
    """A network whose one feature map is its input, and whose adapter moves nothing that is looked at."""

    class config:
        block_out_channels = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks, self.mid_block = nn.ModuleList([nn.Identity()]), nn.Identity()
        self.to_q = nn.Linear(1, 1)

    def forward(self, x_t: Tensor, t: Tensor, cond: tuple[Tensor, ...]) -> Tensor:
        return self.mid_block(self.down_blocks[0](x_t))


@pytest.mark.parametrize(("gap", "loss"), [(3.0, "hinge"), (3.0, "non_saturating"), (0.5, "non_saturating"), (0.0, "non_saturating")])
def test_the_discriminator_reaches_the_known_optimum(gap: float, loss: str) -> None:
    """Fake and real are one number a sample, standard normal around -gap and +gap; the best logit is 2 gap x."""
    net = _Identity()
    roles = Roles(net, LoraSpec(rank=1, alpha=1.0, targets=("to_q",)), ("student",))
    denoiser = Denoiser(net, roles, sd_schedule(), "eps")
    term = Adversarial(weight=1.0, loss=loss, hidden=32)  # pyright: ignore[reportArgumentType]
    roles.attach({HEADS: Heads((1, 1), 32, 0)})
    roles.trainable((HEADS,))
    optimizer = torch.optim.Adam(roles.params((HEADS,)), lr=5e-3)
    values = []
    for number in range(600):
        numbers = torch.randn((2, 256, 1, 1, 1), generator=torch.Generator().manual_seed(number)).expand(-1, -1, -1, 3, 3)
        batch = Batch(numbers[0], (torch.zeros(256, 1),), (torch.zeros(256, 1),), Draws(0, number, tuple(range(256))))
        shared = {"adversarial_t": torch.zeros(256, dtype=torch.long), "adversarial_real": numbers[1] + gap}
        shared |= {f"adversarial_feature_{index}": numbers[0] - gap for index in range(2)}
        value = term.discriminator_loss(denoiser, batch, shared).value
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    logit = 2 * gap * (gap + torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    best = 2 * (nn.functional.softplus(-logit) if loss == "non_saturating" else nn.functional.relu(1 - logit.sign())).mean().item()
    reached = sum(values[-100:]) / 100
    assert reached == pytest.approx(best, abs=0.06)
    if gap == 0:
        assert best == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (TSCD(segments=1, adversarial=Adversarial(weight=-1.0)), "stage.adversarial.weight must not be negative"),
        (TSCD(segments=1, adversarial=Adversarial(weight=1.0, hidden=12)), "stage.adversarial.hidden must be a multiple of 8"),
        (TSCD(segments=1, adversarial=Adversarial(weight=1.0, t_max=0.0)), "stage.adversarial.t_max must be above 0"),
        (TSCD(segments=1, compare="x0", adversarial=Adversarial(weight=1.0)), "stage.adversarial.real=target"),
        (Score(adversarial=Adversarial(weight=1.0)), "stage.adversarial.real must be data"),
    ],
)
def test_bad_keys_are_named(stage: TSCD | Score, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage.check(1000)
