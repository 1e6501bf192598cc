"""The score stage against its equations, and on a problem whose answer is known."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hyper_sd.denoiser import Denoiser
from hyper_sd.guidance import Cond
from hyper_sd.objective import Batch, Context, Objective, Shared
from hyper_sd.randomness import Draws, Purpose, normal
from hyper_sd.roles import LoraSpec, Roles
from hyper_sd.schedule import PredictionType
from hyper_sd.stages.adversarial import Adversarial
from hyper_sd.stages.score import Score
from hyper_sd.stages.tscd import GuidanceRange
from tests.networks import SHAPE, constant_x0_denoiser, sd_schedule, tiny_batch, tiny_denoiser, unet_batch, unet_denoiser
from tests.rollout import rollout

T = 1000
ADAPTERS = ("student", "target", "fake")
PLAIN = Score(ode_weight=0.0, rollout=(1,), fake_updates=1)


def objectives(stage: Score, denoiser: Denoiser) -> tuple[Objective, Objective]:
    student, fake = stage.objectives(Context(denoiser, denoiser.roles))
    return student, fake


def gradients(denoiser: Denoiser, adapter: str, value: Tensor) -> list[Tensor]:
    denoiser.roles.trainable(ADAPTERS)
    return list(torch.autograd.grad(value, denoiser.roles.params((adapter,)), allow_unused=False))


def student_loss(stage: Score, denoiser: Denoiser, batch: Batch, shared: Shared | None = None) -> Tensor:
    denoiser.roles.trainable(ADAPTERS)
    return objectives(stage, denoiser)[0].loss(batch, {} if shared is None else shared).value


def test_no_gradient_where_the_fake_score_is_the_real_one() -> None:
    denoiser = tiny_denoiser(ADAPTERS)
    denoiser.roles.reset("fake")
    value = student_loss(PLAIN, denoiser, tiny_batch())
    assert value.item() == 0
    assert all(not gradient.any() for gradient in gradients(denoiser, "student", value))


def test_student_gradient_is_eq_8() -> None:
    denoiser, batch = tiny_denoiser(ADAPTERS), tiny_batch()
    stage = replace(PLAIN, guidance=GuidanceRange(min=2.0, max=2.0))
    got = gradients(denoiser, "student", student_loss(stage, denoiser, batch))

    z, t = stage.student_input(denoiser, batch)
    x = denoiser(("student",), z, t, batch.cond).x0
    s = batch.draws.integers(Purpose.TIMESTEP, 20, 979)
    x_s = denoiser.noise(x.detach(), batch.draws.normal(Purpose.NOISE, SHAPE).double(), s)
    with torch.no_grad():
        real = denoiser((), x_s, s, batch.cond, w=torch.full((8,), 2.0), uncond=batch.uncond).x0
        fake = denoiser(("fake",), x_s, s, batch.cond).x0
        direction = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    wanted = gradients(denoiser, "student", (direction * x).mean())
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-12)


def test_the_fake_score_denoises_the_students_samples_and_moves_nothing_else() -> None:
    denoiser, batch = tiny_denoiser(ADAPTERS), tiny_batch()
    denoiser.roles.trainable(ADAPTERS)
    shared: Shared = {}
    student_loss(PLAIN, denoiser, batch, shared)
    fake = objectives(PLAIN, denoiser)[1]
    with_sample, alone = fake.loss(batch, shared).value, fake.loss(batch, {}).value
    torch.testing.assert_close(with_sample, alone)
    alone.backward()
    assert all(p.grad is not None for p in denoiser.roles.params(("fake",)))
    assert all(p.grad is None for p in denoiser.roles.params(("student", "target")))


def test_step_counts_are_drawn_for_the_whole_batch_and_cover_every_position() -> None:
    stage, denoiser = Score(), tiny_denoiser(ADAPTERS)
    seen = Counter()
    for step in range(400):
        _, t = stage.student_input(denoiser, tiny_batch([step % 5], step=step))
        _, other = stage.student_input(denoiser, tiny_batch([99], step=step))
        assert torch.equal(t, other)
        seen[int(t[0])] += 1
    assert seen.keys() == {T - i * T // 8 - 1 for i in range(8)}
    assert Score(rollout=(1,), start=899).times(1, T) == [899] and Score(start=899).times(2, T) == [999, 499]


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_the_rollout_and_what_it_draws_are_tcd_sampling(eta: float) -> None:
    stage, denoiser = Score(rollout=(4,), eta=eta), tiny_denoiser(ADAPTERS)
    step = next(s for s in range(99) if Draws(0, s, (0,)).choice(Purpose.ROLLOUT_POSITION, 4) == 3)
    batch = tiny_batch(step=step)
    z, t = stage.student_input(denoiser, batch)
    drawn = stage.drawn(denoiser, denoiser(("student",), z, t, batch.cond))

    def fresh(number: int) -> Tensor:
        return normal((0, step, Purpose.ROLLOUT_NOISE, number + 1), range(8), SHAPE).double()

    noise = batch.draws.normal(Purpose.ROLLOUT_NOISE, SHAPE).double()
    torch.testing.assert_close(drawn, rollout(denoiser, ("student",), noise, [999, 749, 499, 249], batch.cond, eta=eta, fresh=fresh))
    assert t.eq(249).all()


def test_one_step_alone_draws_what_lcm_does() -> None:
    stage, denoiser, batch = Score(rollout=(1,)), tiny_denoiser(ADAPTERS), tiny_batch()
    prediction = denoiser(("student",), *stage.student_input(denoiser, batch), batch.cond)
    assert torch.equal(stage.drawn(denoiser, prediction), prediction.x0)


def test_the_ode_end_of_a_constant_teacher_is_its_constant() -> None:
    x0 = normal((7,), [0], SHAPE)[0].double()
    denoiser, batch = constant_x0_denoiser(x0, "v"), tiny_batch()
    z, _ = Score(start=899, rollout=(1,)).student_input(denoiser, batch)
    end = Score().ode_end(denoiser, batch, z)
    sigma = denoiser.schedule.sigmas[0]
    assert (end - denoiser.schedule.alphas[0] * x0).abs().max() < 10 * sigma


def test_the_ode_end_is_the_teachers_own_sampling_from_pure_noise() -> None:
    """Whatever timestep the student starts from: unit noise is a point of the teacher's trajectory at the last one alone."""
    stage, denoiser, batch = Score(start=799, rollout=(1,), ode_steps=2), tiny_denoiser(ADAPTERS), tiny_batch()
    z, t = stage.student_input(denoiser, batch)
    assert t.eq(799).all()
    high, low = torch.full((8,), 999), torch.full((8,), 499)
    with torch.no_grad():
        middle = denoiser.jump(denoiser((), z, high, batch.cond), low)
        end = denoiser.jump(denoiser((), middle, low, batch.cond), torch.full((8,), -1))
    torch.testing.assert_close(stage.ode_end(denoiser, batch, z), end)


def test_the_ode_term_of_some_samples_estimates_that_of_all() -> None:
    denoiser = tiny_denoiser(ADAPTERS)
    for size in (1, 3):
        seen = Counter()
        for step in range(0, 400, 2):
            draws = tiny_batch(range(step * size, (step + 1) * size), step=step).draws
            first = draws.choice(Purpose.ODE_ROWS, 4)
            seen.update(sample % 4 == first for sample in draws.samples)
        assert seen[True] / seen.total() == pytest.approx(0.25, abs=0.05)
    some, every = (replace(PLAIN, ode_weight=1.0, ode_one_in=n) for n in (4, 1))
    one, all_ = (
        sum(student_loss(stage, denoiser, tiny_batch(range(step * 4, step * 4 + 4), step=step)).item() for step in range(60))
        for stage in (some, every)
    )
    assert one == pytest.approx(all_, rel=0.2)


def test_the_samples_variety_is_that_of_the_batch() -> None:
    """One image for every caption has none, however wild its pixels are."""
    denoiser, batch = tiny_denoiser(ADAPTERS), tiny_batch()
    x = batch.x0.clone()
    _, logs = PLAIN.matching_gradient(denoiser, batch, x)
    assert logs["variety"].item() == pytest.approx(x.std(0).mean().item()) and logs["variety"] > 0.5
    _, logs = PLAIN.matching_gradient(denoiser, batch, x[:1].expand_as(x))
    assert logs["variety"].item() == pytest.approx(0) and logs["std_sample"] > 0.5


def test_the_consistency_term_has_draws_of_its_own() -> None:
    draws = tiny_batch().draws
    own = draws.branch(Purpose.TSCD_TERM)
    for purpose in (Purpose.TIMESTEP, Purpose.GUIDANCE):
        assert not (draws.uniform(purpose) == own.uniform(purpose)).any()
    assert torch.equal(own.uniform(Purpose.TIMESTEP), tiny_batch().draws.branch(Purpose.TSCD_TERM).uniform(Purpose.TIMESTEP))


def test_the_ode_term_is_the_same_in_micro_batches() -> None:
    stage, denoiser = Score(rollout=(1,), ode_weight=1.0, ode_one_in=3), tiny_denoiser(ADAPTERS)
    whole = student_loss(stage, denoiser, tiny_batch(range(8)))
    halves = [student_loss(stage, denoiser, tiny_batch(half)) for half in (range(4), range(4, 8))]
    torch.testing.assert_close(whole, sum(halves) / 2)
    assert whole > student_loss(replace(stage, ode_weight=0.0), denoiser, tiny_batch(range(8)))


def test_a_one_step_update_at_ratio_two_costs_ten_forwards() -> None:
    """A forward counts 1 a sample, a backward through the frozen base 1."""
    denoiser = unet_denoiser(ADAPTERS)
    cost = 0

    def counted(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        nonlocal cost
        output = plain(x_t, t, cond)
        cost += len(x_t) * (2 if output.requires_grad else 1)
        return output

    plain, denoiser = denoiser.forward, replace(denoiser, forward=lambda *args: counted(*args))
    stage = Score(rollout=(1,), fake_updates=2, ode_weight=0.0, guidance=GuidanceRange(min=3.0, max=3.0))
    denoiser.roles.trainable(ADAPTERS)
    for step in range(2):
        batch, shared = unet_batch(step=step), {}
        for objective in objectives(stage, denoiser):
            if step % objective.every == 0:
                objective.loss(batch, shared).value.backward()
    assert cost == 10 * 4


@pytest.mark.parametrize("prediction", ["v", "flow", "x0"])
@pytest.mark.parametrize("real_score", ["teacher", "consistency"])
def test_any_teacher_runs_the_same_stage(prediction: PredictionType, real_score: str) -> None:
    stage = Score(real_score=real_score, tscd_weight=0.5)  # pyright: ignore[reportArgumentType]
    denoiser = tiny_denoiser((*ADAPTERS, "consistency"), prediction=prediction)
    denoiser.roles.trainable(ADAPTERS)
    for objective in objectives(stage, denoiser):
        value = objective.loss(tiny_batch(), {}).value
        assert value.isfinite() and value > 0
        assert all(g.isfinite().all() for g in gradients(denoiser, objective.trains[0], value))


@pytest.mark.parametrize(
    ("changes", "looks"),
    [({}, False), ({"tscd_weight": 0.5, "ode_weight": 0.0}, True), ({"adversarial": Adversarial(weight=0.1, real="data")}, True)],
)
def test_clean_latents_are_only_asked_for_where_they_are_looked_at(changes: dict[str, object], looks: bool) -> None:
    """Score distillation alone needs prompts and no images."""
    stage = Score(rollout=(1,), **changes)  # pyright: ignore[reportArgumentType]
    assert stage.uses_latents == looks
    if stage.adversarial is None:
        denoiser, batch = tiny_denoiser(ADAPTERS), tiny_batch()
        values = [student_loss(stage, denoiser, of) for of in (batch, replace(batch, x0=torch.zeros_like(batch.x0)))]
        assert looks == (not torch.equal(*values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": (3,)}, "stage.rollout must be step counts that divide stage.solver_steps=40: got"),
        ({"rollout": ()}, "stage.rollout"),
        ({"eta": 1.5}, "stage.eta must be between 0 and 1: got 1.5"),
        ({"start": 1000}, "stage.start must be a timestep from 1 to 999: got 1000"),
        ({"start": 812}, "stage.start must be on the grid of samplers unless stage.rollout=[1]: got 812"),
        ({"fake_updates": 0}, "stage.fake_updates must be at least 1: got 0"),
        ({"t_min": 0.9, "t_max": 0.5}, "stage.t_min and stage.t_max"),
        ({"ode_weight": -1.0}, "stage.ode_weight must not be negative"),
        ({"solver_steps": 48}, "solver_steps"),
    ],
)
def test_bad_keys_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Score(**changes).check(T)  # pyright: ignore[reportArgumentType]


def test_a_model_of_one_step_alone_may_start_off_the_grid() -> None:
    Score(rollout=(1,), start=812).check(T)


MEAN, SCALE = 1.5, 0.5
SCHEDULE = sd_schedule()


class GaussianNet(nn.Module):
    """The exact eps of data N(MEAN, SCALE^2), plus a linear map of features with which an adapter can be any other Gaussian's."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 1, bias=False)
        nn.init.zeros_(self.to_q.weight)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        alpha, sigma = (value.float() for value in SCHEDULE(t))
        x = x_t[:, 0, 0, 0]
        eps = sigma * (x - alpha * MEAN) / (alpha**2 * SCALE**2 + sigma**2)
        shapes = [sigma / (alpha**2 * c**2 + sigma**2) for c in (0.25, 0.5, 1.0, 2.0)]
        features = torch.stack([f * v for f in shapes for v in (x, alpha)], dim=1)
        return (eps + self.to_q(features)[:, 0])[:, None, None, None]


def test_a_student_becomes_the_teachers_gaussian() -> None:
    net = GaussianNet()
    roles = Roles(net, LoraSpec(rank=1, alpha=1.0, targets=("to_q",)), ADAPTERS)
    roles.trainable(ADAPTERS)
    denoiser = Denoiser(net, roles, SCHEDULE, "eps")
    other = torch.zeros(1, 8)
    other[0, 4:6] = torch.tensor([-0.07, 1.0])  # more of x and less of the mean in x0: the student starts as another Gaussian
    roles.load_state_dict("student", {"to_q.lora_A.weight": other, "to_q.lora_B.weight": torch.ones(1, 1)})
    stage = Score(rollout=(1,), start=499, ode_weight=0.0, fake_updates=2)
    updates = [
        (objective, torch.optim.Adam(roles.params(objective.trains), lr=lr, betas=(0.9, 0.99)))
        for objective, lr in zip(objectives(stage, denoiser), (2e-3, 3e-2), strict=True)
    ]
    before = _moments(stage, denoiser)
    for step in range(800):
        shared: Shared = {}
        for objective, optimizer in updates:
            if step % objective.every == 0:
                optimizer.zero_grad()
                objective.loss(_scalar_batch(step), shared).value.backward()
                optimizer.step()
    after = _moments(stage, denoiser)
    assert abs(before[0] - MEAN) > 0.5 and abs(before[1] - SCALE) > 0.2
    assert abs(after[0] - MEAN) < 0.1 and abs(after[1] - SCALE) < 0.1


def _scalar_batch(step: int, num: int = 64) -> Batch:
    zeros = torch.zeros(num, 1, 1, 1)
    return Batch(zeros, (torch.zeros(num, 1),), (torch.zeros(num, 1),), Draws(0, step, tuple(range(num))))


@torch.no_grad()
def _moments(stage: Score, denoiser: Denoiser) -> tuple[float, float]:
    batch = _scalar_batch(10_000, 2000)
    x = denoiser(("student",), *stage.student_input(denoiser, batch), batch.cond).x0
    return float(x.mean()), float(x.std())
