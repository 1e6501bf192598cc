"""The feedback stage against its equations."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hyper_sd.denoiser import Denoiser
from hyper_sd.guidance import Cond
from hyper_sd.instances import Instances
from hyper_sd.objective import Batch, Context, Feedback, Shared
from hyper_sd.randomness import Draws, Purpose
from hyper_sd.roles import Role
from hyper_sd.schedule import PredictionType
from hyper_sd.stages.feedback import reward_loss
from hyper_sd.stages.refl import ReFL
from hyper_sd.stages.score import Score
from hyper_sd.stages.tscd import TSCD
from tests.feedback import brightness, context, contrast, decode
from tests.networks import SHAPE, tiny_batch, tiny_denoiser, unet_batch, unet_denoiser

T = 1000
ADAPTERS = ("student", "feedback", "reference")
PLAIN = ReFL(rollout=(1,), reference_weight=0.0)
PROMPTS = tuple("a" * length for length in range(8))


def batch(**changes: object) -> Batch:
    return replace(tiny_batch(**changes), prompts=PROMPTS)  # pyright: ignore[reportArgumentType]


def student_loss(stage: ReFL, ctx: Context, of: Batch) -> Tensor:
    ctx.roles.trainable(ADAPTERS)
    (objective,) = stage.objectives(ctx)
    return objective.loss(of, {}).value


def gradients(ctx: Context, role: Role, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, ctx.roles.params(role)))


def hinges(images: Tensor, alpha: float) -> Tensor:
    low = torch.relu(alpha - brightness(images, PROMPTS)), torch.relu(alpha - contrast(images, PROMPTS))
    return (0.5 * low[0] + 2.0 * low[1]).mean()


@pytest.mark.parametrize(("alpha", "slice"), [(50.0, 8), (50.0, 3), (0.6, 3)])
def test_the_reward_loss_and_its_gradient_are_those_of_the_formula(alpha: float, slice: int) -> None:
    ctx = context(tiny_denoiser(ADAPTERS), alpha=alpha, slice=slice)
    x0 = batch().x0.float().requires_grad_()
    loss = reward_loss(ctx, x0, batch())
    wanted = hinges(decode(x0), alpha)
    torch.testing.assert_close(loss.value, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(value, x0)[0] for value in (loss.value, wanted)))
    pixels = decode(x0.detach()).requires_grad_()
    (at_pixels,) = torch.autograd.grad(2 * torch.relu(alpha - contrast(pixels, PROMPTS)).mean(), pixels)
    torch.testing.assert_close(loss.logs["grad_contrast"], at_pixels.norm())
    torch.testing.assert_close(loss.logs["reward_brightness"], brightness(pixels, PROMPTS).mean().detach())


def test_above_alpha_nothing_is_asked_for() -> None:
    ctx = context(tiny_denoiser(ADAPTERS), alpha=-1.0)
    value = student_loss(PLAIN, ctx, batch())
    assert value.item() == 0 and all(not gradient.any() for gradient in gradients(ctx, ("feedback",), value))


def test_a_bounded_reference_holds_what_is_near_and_lets_go_of_what_has_left() -> None:
    before, stage = torch.zeros(2, *SHAPE), ReFL(reference_scale=0.01)
    x = torch.stack([torch.full(SHAPE, 1e-3), torch.full(SHAPE, 1.0)]).requires_grad_()
    distance = stage.reference_distance(x, before)
    torch.testing.assert_close(distance, torch.tensor([1e-6, 0.01 * math.log(101.0)]), rtol=1e-4, atol=0.0)
    (grad,) = torch.autograd.grad(distance.sum(), x)
    (squared,) = torch.autograd.grad(ReFL().reference_distance(x, before).sum(), x)
    torch.testing.assert_close((grad / squared).flatten(1).mean(1), torch.tensor([1.0, 1 / 101]), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(("adapter", "role"), [("feedback", ("student", "feedback")), ("student", ("student",))])
def test_the_student_gradient_is_that_of_the_formula(adapter: str, role: Role) -> None:
    ctx = context(tiny_denoiser(ADAPTERS))
    stage = ReFL(rollout=(2,), trained_step="last", adapter=adapter, reward_weight=0.7, reference_weight=3.0)  # pyright: ignore[reportArgumentType]
    got = gradients(ctx, stage.trains, student_loss(stage, ctx, batch()))

    z, t = stage.student_input(ctx.denoiser, batch())
    assert t.eq(499).all()
    end, reference = torch.full((8,), -1), ("student",) if adapter == "feedback" else ("reference",)
    x, before = (ctx.denoiser.jump(ctx.denoiser(r, z, t, batch().cond), end) for r in (role, reference))
    wanted = 0.7 * hinges(decode(x), 50.0) + 3.0 * (x - before.detach()).square().mean()
    for mine, theirs in zip(got, gradients(ctx, stage.trains, wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9)


def test_only_what_learns_gets_a_gradient() -> None:
    ctx = context(tiny_denoiser(ADAPTERS))
    (objective,) = PLAIN.objectives(ctx)
    ctx.roles.trainable(objective.trains)
    objective.loss(batch(), {}).value.backward()
    assert all(p.grad is not None and p.grad.any() for p in ctx.roles.params(("feedback",)))
    assert all(p.grad is None for p in ctx.roles.params(("student", "reference")))


@pytest.mark.parametrize(
    ("changes", "adapters", "fresh", "exports"),
    [
        ({}, ("student", "feedback"), ("feedback",), ("student", "feedback")),
        ({"adapter": "student"}, ("student", "reference"), (), ("student",)),
        ({"adapter": "student", "reference_weight": 0.0}, ("student",), (), ("student",)),
    ],
)
def test_a_stage_asks_for_the_adapters_it_uses(
    changes: dict[str, object], adapters: tuple[str, ...], fresh: tuple[str, ...], exports: Role
) -> None:
    stage = ReFL(**changes)  # pyright: ignore[reportArgumentType]
    assert (stage.adapters, stage.fresh, stage.exports, stage.trains) == (adapters, fresh, exports, exports[-1:])


def test_the_step_is_drawn_for_the_whole_batch_and_covers_every_position() -> None:
    seen = Counter(ReFL().draw_rollout(Draws(0, step, (step % 7,))) for step in range(300))
    assert seen.keys() == {(n, i) for n in (1, 2, 4) for i in range(n)}
    last = {ReFL(trained_step="last").draw_rollout(Draws(0, step, (5,))) for step in range(99)}
    assert last == {(1, 0), (2, 1), (4, 3)}
    assert all(ReFL().draw_rollout(Draws(0, step, (1,))) == ReFL().draw_rollout(Draws(0, step, (8, 9))) for step in range(50))


def test_micro_batches_are_the_whole_batch() -> None:
    ctx = context(tiny_denoiser(ADAPTERS), slice=3)
    stage = replace(PLAIN, reference_weight=1.0)
    whole, halves = batch(), [batch().rows(range(4)), batch().rows(range(4, 8))]
    torch.testing.assert_close(student_loss(stage, ctx, whole), sum(student_loss(stage, ctx, half) for half in halves) / 2)


@pytest.mark.parametrize("adapter", ["feedback", "student"])
def test_the_consistency_term_is_that_of_the_role_that_learns(adapter: str) -> None:
    stage = ReFL(rollout=(1,), adapter=adapter, reward_weight=0.0, reference_weight=0.0, tscd_weight=2.0)  # pyright: ignore[reportArgumentType]
    denoiser = tiny_denoiser(ADAPTERS)
    ctx = Context(denoiser, denoiser.roles)
    got = student_loss(stage, ctx, batch())
    wanted = _with_summed_student(denoiser) if adapter == "feedback" else denoiser
    online = TSCD(segments=1, target="online")
    torch.testing.assert_close(got, 2 * online.student_loss(wanted, batch(), {}).value)


def _with_summed_student(denoiser: Denoiser) -> Denoiser:
    def forward(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with denoiser.roles.use(("student", "feedback") if denoiser.roles.active else ()):
            return denoiser.forward(x_t, t, cond)

    return replace(denoiser, forward=forward)


@pytest.mark.parametrize(("reference_weight", "forwards"), [(0.0, 5), (1.0, 6)])
def test_an_update_of_a_four_step_student_costs_no_more_than_three_forwards_beside_its_own(reference_weight: float, forwards: int) -> None:
    """At the last of four steps; a forward counts 1 a sample, a backward through the frozen base 1."""
    denoiser = unet_denoiser(ADAPTERS)
    cost, decoded = 0, 0

    def counted(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        nonlocal cost
        output = plain(x_t, t, cond)
        cost += len(x_t) * (2 if output.requires_grad else 1)
        return output

    def counted_decode(x0: Tensor) -> Tensor:
        nonlocal decoded
        decoded += len(x0)
        return decode(x0)

    plain, denoiser = denoiser.forward, replace(denoiser, forward=lambda *args: counted(*args))
    ctx = context(denoiser)
    assert ctx.feedback is not None
    ctx = replace(ctx, feedback=replace(ctx.feedback, decode=counted_decode))
    stage = ReFL(rollout=(4,), trained_step="last", reference_weight=reference_weight)
    ctx.roles.trainable(stage.trains)
    shared: Shared = {}
    stage.objectives(ctx)[0].loss(replace(unet_batch(), prompts=("a",) * 4), shared).value.backward()
    assert cost == forwards * 4 and decoded == 4


@pytest.mark.parametrize("prediction", ["v", "flow", "x0"])
def test_any_teacher_runs_the_same_stage(prediction: PredictionType) -> None:
    ctx = context(tiny_denoiser(ADAPTERS, prediction=prediction))
    value = student_loss(ReFL(tscd_weight=0.5), ctx, batch())
    assert value > 0 and all(gradient.isfinite().all() for gradient in gradients(ctx, ("feedback",), value))


def test_a_reward_of_a_score_stage_adds_its_hinge() -> None:
    ctx = context(tiny_denoiser(("student", "target", "fake")))
    stage = Score(rollout=(1,), ode_weight=0.0, fake_updates=1, reward_weight=2.0)
    assert stage.uses_rewards and not replace(stage, reward_weight=0.0).uses_rewards
    ctx.roles.trainable(("student",))
    ctx.roles.reset("fake")  # no gradient but the reward's
    got = stage.objectives(ctx)[0].loss(batch(), {}).value
    x0 = ctx.denoiser(("student",), *stage.student_input(ctx.denoiser, batch()), batch().cond).x0
    wanted = 2 * hinges(decode(x0), 50.0)
    torch.testing.assert_close(got, wanted.to(got))
    for mine, theirs in zip(*(gradients(ctx, ("student",), value) for value in (got, wanted)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": (3,)}, "stage.rollout must be step counts that divide stage.solver_steps=40: got"),
        ({"start": 0}, "stage.start must be a timestep from 1 to 999: got 0"),
        ({"reference_weight": -1.0}, "stage.reference_weight must not be negative"),
        ({"reward_weight": 0.0, "reference_weight": 0.0}, "nothing is left to learn"),
        ({"perceptual_weight": -1.0}, "stage.perceptual_weight must not be negative"),
        ({"reference_scale": 0.0}, "stage.reference_scale must be positive, or null for a distance without a bound: got 0.0"),
        ({"perceptual_weight": 1.0, "perceptual_rollout": (3,)}, "stage.perceptual_rollout must be step counts that divide"),
        ({"perceptual_weight": 1.0, "perceptual_rollout": (1,)}, "stage.perceptual_start must be a timestep from 999"),
        ({"perceptual_weight": 1.0, "perceptual_start": 1000}, "to 999: got 1000"),
    ],
)
def test_bad_keys_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReFL(**changes).check(T)  # pyright: ignore[reportArgumentType]


# ---- the perceptual term

PERCEPTUAL = ReFL(reward_weight=0.0, reference_weight=0.0, perceptual_weight=0.3, perceptual_rollout=(4,), trained_step="last")


def objects(num: int) -> tuple[Instances, ...]:
    """One object in each image, of a size and a label of its own."""
    corner = torch.arange(SHAPE[1]) <= torch.arange(num)[:, None] % SHAPE[1]
    return tuple(Instances((row[:, None] & row)[None], torch.tensor([number])) for number, row in enumerate(corner))


def segment(images: Tensor, instances: Sequence[Instances]) -> Tensor:
    """How far the mean inside each mask is from its label."""
    insides = [image[:, one.masks[0]].mean() - one.labels[0] for image, one in zip(images, instances, strict=True)]
    return torch.stack(insides).square()


def seen_by(denoiser: Denoiser, slice: int = 8) -> Context:
    return Context(denoiser, denoiser.roles, Feedback(decode, {}, slice, segment))


def with_objects(of: Batch) -> Batch:
    return replace(of, instances=objects(8))


@pytest.mark.parametrize(("adapter", "slice"), [("feedback", 8), ("student", 3)])
def test_the_perceptual_gradient_is_that_of_the_formula(adapter: str, slice: int) -> None:
    denoiser = tiny_denoiser(ADAPTERS)
    stage = replace(PERCEPTUAL, adapter=adapter)  # pyright: ignore[reportArgumentType]
    stage.check(T)
    assert stage.uses_instances and not stage.uses_rewards
    role, of = stage.student_role, with_objects(batch())
    ctx = seen_by(denoiser, slice)
    ctx.roles.trainable(stage.trains)
    loss = stage.objectives(ctx)[0].loss(of, {})

    draws = of.draws.branch(Purpose.PERCEPTUAL_TERM)
    eps, fresh = (draws.normal(Purpose.ROLLOUT_NOISE, SHAPE, *number).double() for number in ((), (1,)))
    t, u = torch.full((8,), 499), torch.full((8,), 249)
    z = denoiser.noise(of.x0, eps, t)
    s, end = torch.zeros_like(u), torch.full_like(u, -1)
    z = denoiser.renoise(denoiser.jump(denoiser(role, z, t, of.cond), s), s, fresh, u).detach()
    images = decode(denoiser.jump(denoiser(role, z, u, of.cond), end))
    wanted = segment(images, of.instances).mean()
    torch.testing.assert_close(loss.value, (0.3 * wanted).to(loss.value), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss.logs["perceptual"].double(), wanted.detach(), rtol=1e-5, atol=1e-7)
    pixels = images.detach().requires_grad_()
    (at_pixels,) = torch.autograd.grad(segment(pixels, of.instances).mean(), pixels)
    torch.testing.assert_close(loss.logs["grad_perceptual"].double(), at_pixels.norm(), rtol=1e-5, atol=1e-7)
    for mine, theirs in zip(gradients(ctx, stage.trains, loss.value), gradients(ctx, stage.trains, 0.3 * wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9)


def test_images_enter_rollouts_below_the_start_and_every_step_from_there_is_trained() -> None:
    denoiser = tiny_denoiser(ADAPTERS)
    stage = replace(PERCEPTUAL, perceptual_rollout=(4, 8), trained_step="random", perceptual_start=400)
    seen = [stage.perceptual_input(denoiser, replace(batch(), draws=Draws(0, step, tuple(range(8)))))[1] for step in range(80)]
    assert all(t.eq(t[0]).all() for t in seen)
    assert {int(t[0]) for t in seen} == {374, 249, 124}
    stage.check(T)
    with pytest.raises(ValueError, match=r"stage.perceptual_start must be a timestep from 499, the last of a rollout"):
        replace(stage, perceptual_rollout=(2, 8)).check(T)


def test_the_draws_of_the_terms_are_apart() -> None:
    """Or the noise of an image would be that from which its reward is drawn."""
    stage, denoiser = ReFL(perceptual_weight=1.0, perceptual_rollout=(2,), rollout=(2,)), tiny_denoiser(ADAPTERS)
    t = torch.full((8,), 499)
    eps = (stage.perceptual_input(denoiser, batch())[0] - denoiser.noise(batch().x0, torch.zeros_like(batch().x0), t)) / denoiser.schedule(
        t[:1]
    )[1]
    assert not torch.allclose(eps, batch().draws.normal(Purpose.ROLLOUT_NOISE, SHAPE).double(), atol=0.1)
    torch.testing.assert_close(eps, batch().draws.branch(Purpose.PERCEPTUAL_TERM).normal(Purpose.ROLLOUT_NOISE, SHAPE).double())


def test_all_terms_add_up_and_micro_batches_are_the_whole_batch() -> None:
    denoiser = tiny_denoiser(ADAPTERS)
    ctx, rewards = seen_by(denoiser, slice=3), context(denoiser).feedback
    assert rewards is not None and ctx.feedback is not None
    ctx = replace(ctx, feedback=replace(ctx.feedback, rewards=rewards.rewards))
    both = ReFL(rollout=(2,), perceptual_weight=0.3, perceptual_rollout=(4,))
    of = with_objects(batch())
    parts = [replace(both, perceptual_weight=0.0), replace(PERCEPTUAL, trained_step="random")]
    torch.testing.assert_close(student_loss(both, ctx, of), sum(student_loss(part, ctx, of) for part in parts))
    halves = [of.rows(range(4)), of.rows(range(4, 8))]
    torch.testing.assert_close(student_loss(both, ctx, of), sum(student_loss(both, ctx, half) for half in halves) / 2)


def test_the_perceptual_term_alone_costs_its_own_rollout_only() -> None:
    """Two steps below the start: a forward without a gradient, then one with and its backward; each sample is decoded once."""
    denoiser = unet_denoiser(ADAPTERS)
    calls: list[bool] = []
    decoded: list[int] = []

    def counted(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        output = plain(x_t, t, cond)
        calls.append(output.requires_grad)
        return output

    def counted_decode(x0: Tensor) -> Tensor:
        decoded.append(len(x0))
        return decode(x0)

    plain, denoiser = denoiser.forward, replace(denoiser, forward=lambda *args: counted(*args))
    feedback = Feedback(counted_decode, {}, 3, lambda images, instances: images.flatten(1).mean(1))
    ctx = Context(denoiser, denoiser.roles, feedback)
    ctx.roles.trainable(PERCEPTUAL.trains)
    PERCEPTUAL.objectives(ctx)[0].loss(replace(unet_batch(), instances=objects(4)), {}).value.backward()
    assert calls == [False, True] and decoded == [3, 1]


def test_clean_latents_are_only_asked_for_where_they_are_looked_at() -> None:
    ctx = context(tiny_denoiser(ADAPTERS))
    empty = replace(batch(), x0=torch.zeros_like(batch().x0))
    for tscd_weight in (0.0, 0.5):
        stage = ReFL(rollout=(2,), trained_step="last", tscd_weight=tscd_weight)
        looks = not torch.equal(student_loss(stage, ctx, batch()), student_loss(stage, ctx, empty))
        assert looks == stage.uses_latents == (tscd_weight > 0)
