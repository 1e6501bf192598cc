"""The TSCD stage against its equations written out by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hyper_sd.denoiser import Denoiser, Prediction
from hyper_sd.guidance import Cond
from hyper_sd.objective import Batch, Context, Objective
from hyper_sd.randomness import Draws, Purpose, normal
from hyper_sd.roles import Role
from hyper_sd.schedule import PredictionType
from hyper_sd.stages.tscd import TSCD, GuidanceRange
from tests.networks import COND_SIZE, SHAPE, constant_x0_denoiser, tiny_batch, tiny_denoiser, unet_batch, unet_denoiser

T = 1000
STUDENT, TARGET, PREVIOUS = ("student",), ("target",), ("previous",)
GUIDANCE = GuidanceRange(min=2.0, max=6.0)
CLOSE: dict[str, float] = {"rtol": 1e-9, "atol": 1e-12}


def objective(stage: TSCD, denoiser: Denoiser) -> Objective:
    (only,) = stage.objectives(Context(denoiser, denoiser.roles))
    return only


def loss(stage: TSCD, denoiser: Denoiser, batch: Batch) -> Tensor:
    return objective(stage, denoiser).loss(batch, {}).value


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


class ByHand:
    """The quantities of Eq. 12 for one batch, from the network's raw eps output and the alphas."""

    def __init__(self, stage: TSCD, denoiser: Denoiser, batch: Batch):
        self.denoiser, self.batch = denoiser, batch
        self.t, self.u, self.s = stage.draw_points(batch.draws, T)
        self.x_t = self.at(batch.x0, batch.draws.normal(Purpose.NOISE, SHAPE).double(), self.t)

    def at(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha_bar = column(self.denoiser.schedule.alphas.square()[t.clamp(min=0)])
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps

    def predict(self, role: Role, x_t: Tensor, t: Tensor, w: Tensor | None = None) -> Prediction:
        with self.denoiser.roles.use(role):
            eps = self.denoiser.forward(x_t, t, self.batch.cond)
            if w is not None:
                uncond = self.denoiser.forward(x_t, t, self.batch.uncond)
                eps = uncond + column(w) * (eps - uncond)
        alpha_bar = column(self.denoiser.schedule.alphas.square()[t])
        return Prediction((x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt(), eps)

    def jump(self, prediction: Prediction, s: Tensor) -> Tensor:
        return self.at(*prediction, s)


def test_points_of_a_whole_grid_lie_where_the_equations_say() -> None:
    for segments, solver_steps in ((1, 40), (2, 40), (4, 40), (8, 40), (40, 40), (8, 8), (5, 50), (1, 1)):
        stage = TSCD(segments=segments, solver_steps=solver_steps)
        t, u, s = stage.draw_points(Draws(0, 0, tuple(range(4000))), T)
        step, length = T // solver_steps, T // segments
        assert set(t.tolist()) == {step * i - 1 for i in range(1, solver_steps + 1)}, "every solver point, top included, is a start"
        assert torch.equal(u, t - step)
        edge = t // length * length - 1
        assert bool(((edge <= s) & (s <= u)).all())
        assert bool((s == u).any()) and bool((s == edge).any()), "both ends are drawn"
        assert segments == solver_steps or bool(((edge < s) & (s < u)).any())
        if segments == solver_steps:
            assert torch.equal(s, u)
        _, _, s_edge = TSCD(segments=segments, solver_steps=solver_steps, jump="edge").draw_points(Draws(0, 0, tuple(range(4000))), T)
        assert torch.equal(s_edge, edge)


def test_jump_targets_are_integers_with_both_ends() -> None:
    t, u, s = TSCD(segments=1, solver_steps=200).draw_points(Draws(0, 0, tuple(range(20_000))), T)
    second = t == 9  # u = 4, the edge is the clean end
    assert set(u[second].tolist()) == {4} and set(s[second].tolist()) == {-1, 0, 1, 2, 3, 4}


def test_jump_targets_are_uniform_between_edge_and_neighbour() -> None:
    t, u, s = TSCD(segments=1).draw_points(Draws(0, 0, tuple(range(40_000))), T)
    top = t == T - 1
    share = (s[top] + 1).double() / (u[top] + 1)
    assert int(top.sum()) > 800
    counts = torch.histc(share, bins=10, min=0, max=1)
    assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 9 + 4 * 18**0.5


@pytest.mark.parametrize("compare", ["x_s", "x0"])
@pytest.mark.parametrize("distance", ["mse", "huber"])
@pytest.mark.parametrize("segments", [1, 8, 40])
@pytest.mark.parametrize(("prediction", "zero_snr"), [("eps", False), ("v", False), ("v", True), ("x0", True)])
def test_a_constant_x0_network_has_no_loss(segments: int, distance: Any, compare: Any, prediction: PredictionType, zero_snr: bool) -> None:
    x0 = normal((5,), [0], SHAPE)[0].double()
    denoiser = constant_x0_denoiser(x0, prediction, zero_snr=zero_snr)
    batch = tiny_batch(range(64))
    for guidance in (None, GUIDANCE):
        stage = TSCD(segments=segments, loss=distance, compare=compare, guidance=guidance, offset_noise=0.1)
        at_x0 = Batch(x0.expand_as(batch.x0), batch.cond, batch.uncond, batch.draws)
        assert float(loss(stage, denoiser, at_x0)) < 1e-16


@pytest.mark.parametrize("compare", ["x_s", "x0"])
@torch.no_grad()
def test_a_segment_a_step_is_matching_the_teachers_steps(compare: Any) -> None:
    denoiser, batch = tiny_denoiser(), tiny_batch(range(16))
    stage = TSCD(segments=40, guidance=GUIDANCE, compare=compare)
    hand = ByHand(stage, denoiser, batch)
    assert torch.equal(hand.s, hand.u)
    w = 2.0 + 4.0 * batch.draws.uniform(Purpose.GUIDANCE)
    teacher, student = hand.predict((), hand.x_t, hand.t, w), hand.predict(STUDENT, hand.x_t, hand.t)
    error = student.x0 - teacher.x0 if compare == "x0" else hand.jump(student, hand.u) - hand.jump(teacher, hand.u)
    torch.testing.assert_close(loss(stage, denoiser, batch), error.square().mean(), **CLOSE)


@pytest.mark.parametrize("compare", ["x_s", "x0"])
@pytest.mark.parametrize("distance", ["mse", "huber"])
@pytest.mark.parametrize("jump", ["random", "edge"])
@pytest.mark.parametrize("target", ["ema", "online"])
@pytest.mark.parametrize("segments", [1, 4])
@torch.no_grad()
def test_the_loss_is_equation_12(segments: int, target: Any, jump: Any, distance: Any, compare: Any) -> None:
    denoiser, batch = tiny_denoiser(), tiny_batch(range(32))
    stage = TSCD(segments=segments, target=target, jump=jump, loss=distance, compare=compare, guidance=GUIDANCE)
    hand = ByHand(stage, denoiser, batch)
    w = 2.0 + 4.0 * batch.draws.uniform(Purpose.GUIDANCE)
    teacher, student = hand.predict((), hand.x_t, hand.t, w), hand.predict(STUDENT, hand.x_t, hand.t)
    x_u = hand.jump(teacher, hand.u)
    found = hand.predict(TARGET if target == "ema" else STUDENT, x_u, hand.u.clamp(min=0))
    arrived = column(hand.s == hand.u)
    assert bool(arrived.any()) and not bool(arrived.all()) and bool((hand.u < 0).any())
    if compare == "x0":
        error = student.x0 - torch.where(arrived, teacher.x0, found.x0)
    else:
        error = hand.jump(student, hand.s) - torch.where(arrived, x_u, hand.jump(found, hand.s))
    by_hand = error.square() if distance == "mse" else (error.square() + 1e-6).sqrt() - 1e-3
    torch.testing.assert_close(loss(stage, denoiser, batch), by_hand.mean(), **CLOSE)


@pytest.mark.parametrize("compare", ["x_s", "x0"])
@torch.no_grad()
def test_where_s_is_u_the_goal_is_the_teachers_own_and_elsewhere_the_target_networks(compare: Any) -> None:
    denoiser, batch = tiny_denoiser(), tiny_batch(range(64))
    stage = TSCD(segments=8, compare=compare)
    hand = ByHand(stage, denoiser, batch)
    goals = {}
    for seed in (0, 1):  # two target networks
        state = {name: value + seed for name, value in denoiser.roles.state_dict("target").items()}
        denoiser.roles.load_state_dict("target", state)
        goals[seed] = stage.goal(denoiser, batch, hand.x_t, hand.t, hand.u, hand.s)
    teacher = hand.predict((), hand.x_t, hand.t)
    own = teacher.x0 if compare == "x0" else hand.jump(teacher, hand.u)
    arrived = hand.s == hand.u
    assert 0 < int(arrived.sum()) < 64
    torch.testing.assert_close(goals[0][arrived], own[arrived], **CLOSE)
    assert torch.equal(goals[0][arrived], goals[1][arrived])
    assert bool((goals[0][~arrived] != goals[1][~arrived]).flatten(1).any(1).all())


@torch.no_grad()
def test_guidance_of_1_is_no_guidance_and_needs_half_the_rows() -> None:
    rows: list[int] = []
    denoiser = tiny_denoiser()

    def forward(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        rows.append(len(x_t))
        return denoiser.forward(x_t, t, cond)

    counting = Denoiser(forward, denoiser.roles, denoiser.schedule, "eps")
    batch = tiny_batch(range(8))
    off = loss(TSCD(segments=4), counting, batch)
    one = loss(TSCD(segments=4, guidance=GuidanceRange(min=1.0, max=1.0)), counting, batch)
    torch.testing.assert_close(off, one, **CLOSE)
    assert rows == [8, 8, 8, 16, 8, 8], "teacher, target and student, one call each"
    assert not torch.allclose(off, loss(TSCD(segments=4, guidance=GuidanceRange(min=3.0, max=3.0)), counting, batch))


@torch.no_grad()
def test_the_teacher_can_be_the_previous_stage() -> None:
    denoiser, batch = tiny_denoiser((*STUDENT, *TARGET, *PREVIOUS)), tiny_batch(range(16))
    stage = TSCD(segments=40, teacher="previous_stage")
    hand = ByHand(stage, denoiser, batch)
    previous, student = hand.predict(PREVIOUS, hand.x_t, hand.t), hand.predict(STUDENT, hand.x_t, hand.t)
    error = hand.jump(student, hand.u) - hand.jump(previous, hand.u)
    torch.testing.assert_close(loss(stage, denoiser, batch), error.square().mean(), **CLOSE)


@torch.no_grad()
def test_empty_prompts_take_the_place_of_their_share_of_the_captions() -> None:
    denoiser, batch = tiny_denoiser(), tiny_batch(range(16))
    empty = Batch(batch.x0, batch.uncond, batch.uncond, batch.draws)
    at = {ratio: TSCD(segments=4, guidance=GUIDANCE, empty_prompt_ratio=ratio) for ratio in (0.0, 0.5, 1.0)}
    assert torch.equal(loss(at[1.0], denoiser, batch), loss(at[0.0], denoiser, empty))
    dropped = []
    for row in range(16):
        alone = tiny_batch([row])
        value = loss(at[0.5], denoiser, alone)
        without = loss(at[0.0], denoiser, Batch(alone.x0, alone.uncond, alone.uncond, alone.draws))
        kept = loss(at[0.0], denoiser, alone)
        dropped.append(torch.equal(value, without))
        assert dropped[-1] or torch.equal(value, kept)
    assert 3 <= sum(dropped) <= 13


@torch.no_grad()
def test_offset_noise_shifts_the_noise_of_whole_channels() -> None:
    inputs: list[Tensor] = []
    denoiser = tiny_denoiser()

    def forward(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        inputs.append(x_t)
        return denoiser.forward(x_t, t, cond)

    seeing = Denoiser(forward, denoiser.roles, denoiser.schedule, "eps")
    batch = tiny_batch(range(256))
    for offset_noise in (0.0, 0.1):
        loss(TSCD(segments=4, offset_noise=offset_noise), seeing, batch)
    t, _, _ = TSCD(segments=4).draw_points(batch.draws, T)
    shift = (inputs[3] - inputs[0]) / column(denoiser.schedule(t)[1])
    torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), rtol=1e-4, atol=1e-6)
    assert abs(float(shift[:, :, 0, 0].std()) - 0.1) < 0.01
    assert float(torch.corrcoef(shift[:, :, 0, 0].T).fill_diagonal_(0).abs().max()) < 0.2, "a draw for every channel"


@torch.no_grad()
def test_a_samples_loss_does_not_depend_on_the_batch_around_it() -> None:
    denoiser = tiny_denoiser()
    stage = TSCD(segments=4, guidance=GUIDANCE, offset_noise=0.1, empty_prompt_ratio=0.3)
    alone = torch.stack([loss(stage, denoiser, tiny_batch([row])) for row in range(12)])
    torch.testing.assert_close(loss(stage, denoiser, tiny_batch(range(12))), alone.mean(), **CLOSE)


@pytest.mark.parametrize(
    ("changed", "adapters", "exports"),
    [
        ({}, ("student", "target"), "target"),
        ({"export_weights": "student"}, ("student", "target"), "student"),
        ({"target": "online"}, ("student", "target"), "target"),
        ({"target": "online", "export_weights": "student"}, ("student",), "student"),
        ({"teacher": "previous_stage"}, ("student", "target", "previous"), "target"),
        ({"teacher": "previous_stage", "target": "online", "export_weights": "student"}, ("student", "previous"), "student"),
    ],
)
def test_a_stage_asks_for_the_adapters_it_uses(changed: dict[str, Any], adapters: tuple[str, ...], exports: str) -> None:
    stage = TSCD(segments=4, **changed)
    assert stage.adapters == adapters and stage.exports == (exports,)
    denoiser = tiny_denoiser(adapters)
    assert objective(stage, denoiser).trains == STUDENT and objective(stage, denoiser).every == 1
    loss(stage, denoiser, tiny_batch(range(2)))
    stage.after_step(Context(denoiser, denoiser.roles), 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"segments": 7}, "stage.segments must divide stage.solver_steps: got segments=7, solver_steps=40"),
        ({"solver_steps": 48}, "stage.solver_steps must divide the teacher's 1000 steps: got solver_steps=48; try solver_steps=40"),
        ({"ema_decay": 1.0}, "stage.ema_decay must be at least 0 and below 1: got 1.0"),
        ({"ema_decay": -0.1}, "stage.ema_decay"),
        ({"empty_prompt_ratio": 1.5}, "stage.empty_prompt_ratio must be between 0 and 1: got 1.5"),
        ({"offset_noise": -0.1}, "stage.offset_noise must not be negative: got -0.1"),
        ({"guidance": GuidanceRange(min=8, max=4)}, "stage.guidance.min must not exceed stage.guidance.max: got 8 > 4"),
        ({"guidance": GUIDANCE, "teacher": "previous_stage"}, "stage.teacher=previous_stage .*set stage.guidance=null"),
    ],
)
def test_check_names_the_key_and_what_would_do(changed: dict[str, Any], message: str) -> None:
    TSCD(segments=8).check(T)
    with pytest.raises(ValueError, match=message):
        TSCD(**{"segments": 8, **changed}).check(T)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("target", ["ema", "online"])
@pytest.mark.parametrize("teacher", ["base", "previous_stage"])
def test_a_gradient_exists_just_where_the_objective_trains(teacher: Any, target: Any, checkpointing: bool) -> None:
    denoiser = unet_denoiser((*STUDENT, *TARGET, *PREVIOUS), checkpointing=checkpointing)
    roles = denoiser.roles
    stage = TSCD(segments=4, teacher=teacher, target=target, guidance=GUIDANCE if teacher == "base" else None)
    only = objective(stage, denoiser)
    roles.trainable(only.trains)
    only.loss(unet_batch(), {}).value.backward()
    trained = {id(param) for param in roles.params(only.trains)}
    for name, param in roles.net.named_parameters():
        assert (param.grad is not None) == (id(param) in trained), name
        assert param.grad is None or bool(param.grad.any()), name


def test_checkpointing_changes_no_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        denoiser = unet_denoiser(checkpointing=checkpointing)
        denoiser.roles.trainable(STUDENT)
        loss(TSCD(segments=4, guidance=GUIDANCE), denoiser, unet_batch()).backward()
        found.append([param.grad for param in denoiser.roles.params(STUDENT)])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*found, strict=True))


def test_the_gradient_of_an_online_target_is_stopped() -> None:
    """With target=online the student must be pulled to its own fixed goal: the gradient of d with the goal held constant."""
    denoiser, batch = tiny_denoiser(("student",)), tiny_batch(range(16))
    stage = TSCD(segments=1, target="online", export_weights="student", guidance=GUIDANCE)
    denoiser.roles.trainable(STUDENT)
    found = torch.autograd.grad(loss(stage, denoiser, batch), denoiser.roles.params(STUDENT))
    hand = ByHand(stage, denoiser, batch)
    goal = stage.goal(denoiser, batch, hand.x_t, hand.t, hand.u, hand.s).detach()
    fixed = (hand.jump(hand.predict(STUDENT, hand.x_t, hand.t), hand.s) - goal).square().mean()
    for gradient, by_hand in zip(found, torch.autograd.grad(fixed, denoiser.roles.params(STUDENT)), strict=True):
        torch.testing.assert_close(gradient, by_hand, rtol=1e-5, atol=1e-6)


def test_idle_adapters_and_the_network_do_not_move_and_the_target_is_the_ema() -> None:
    denoiser = unet_denoiser((*STUDENT, *TARGET, *PREVIOUS))
    roles = denoiser.roles
    stage = TSCD(segments=4, guidance=None, teacher="previous_stage", ema_decay=0.9)
    context = Context(denoiser, roles)
    only = objective(stage, denoiser)
    roles.trainable(only.trains)
    optimizer = torch.optim.AdamW(roles.params(only.trains), lr=1e-2, weight_decay=0.1)
    ema = roles.state_dict("target")
    frozen = {
        name: param.detach().clone() for name, param in roles.net.named_parameters() if "student" not in name and "target" not in name
    }
    for step in range(3):
        student = roles.state_dict("student")
        optimizer.zero_grad()
        only.loss(unet_batch(step=step), {}).value.backward()
        optimizer.step()
        stage.after_step(context, step)
        assert all(not torch.equal(value, student[name]) for name, value in roles.tensors("student").items())
        ema = {name: 0.9 * value + 0.1 * roles.tensors("student")[name].detach() for name, value in ema.items()}
    for name, value in roles.tensors("target").items():
        torch.testing.assert_close(value.detach(), ema[name], rtol=1e-5, atol=1e-6)
    params = dict(roles.net.named_parameters())
    assert any("previous" in name for name in frozen) and all(torch.equal(params[name], value) for name, value in frozen.items())


def test_training_brings_the_student_to_the_teachers_steps() -> None:
    denoiser = tiny_denoiser(("student",))
    stage = TSCD(segments=40, target="online", export_weights="student")
    denoiser.roles.trainable(STUDENT)
    optimizer = torch.optim.Adam(denoiser.roles.params(STUDENT), lr=2e-2)
    values = []
    for step in range(300):
        optimizer.zero_grad()
        value = loss(stage, denoiser, tiny_batch(range(16), step=step))
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert sum(values[-20:]) < 0.01 * sum(values[:20])


def test_conditions_of_several_tensors_are_dropped_together() -> None:
    denoiser = tiny_denoiser()
    seen: list[Cond] = []

    def forward(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        seen.append(cond)
        return denoiser.forward(x_t, t, cond[:1])

    samples = range(32)
    batch = tiny_batch(samples)
    pooled = normal((3,), samples, (2, COND_SIZE)).double()
    both = Batch(batch.x0, (*batch.cond, pooled), (*batch.uncond, torch.zeros_like(pooled)), batch.draws)
    seeing = Denoiser(forward, denoiser.roles, denoiser.schedule, "eps")
    loss(TSCD(segments=4, empty_prompt_ratio=0.5), seeing, both)
    for embedding, second in seen:
        first_dropped = (embedding == 0.5).all(1)
        assert torch.equal(first_dropped, (second == 0).flatten(1).all(1))
        assert 0 < int(first_dropped.sum()) < len(samples)
