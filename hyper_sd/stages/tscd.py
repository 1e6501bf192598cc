"""Trajectory segmented consistency distillation (paper section 3.1, Algorithm 1).

[tau_0, T] is cut into k segments. Within a segment, jumps to one point s from two neighbouring points of one teacher
trajectory must agree:

    L = d( Psi(x_t, f_student(x_t, t, c), s),  Psi(x_u, f_target(x_u, u, c), s) )      (Eq. 12)
    x_u = Psi(x_t, f_teacher(x_t, t, c, w), u)                                        (Eq. 1: one step to the neighbour u)

with t on the solver grid, edge <= s <= u < t, and Psi the DDIM jump. There is no c_skip or c_out, and the network is never
told s. With k = N every segment is one solver step and the student learns the teacher's own steps; with k = 1 this is
consistency trajectory training. An adversarial term may be added (hyper_sd/stages/adversarial.py).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from hyper_sd.denoiser import Denoiser, Prediction
from hyper_sd.objective import Batch, Context, Loss, Objective, Shared, check_not_negative
from hyper_sd.randomness import Draws, Purpose, send
from hyper_sd.roles import Role
from hyper_sd.schedule import SolverGrid, per_sample
from hyper_sd.stages.adversarial import HEADS, Adversarial, TakesAdversarial
from hyper_sd.stages.rollout import STUDENT

TARGET, PREVIOUS = "target", "previous"
HUBER_C = 1e-3
STEP_COUNTS = (1, 2, 4, 8)  # what an adapter of one segment is used with


@dataclass(frozen=True, kw_only=True)
class GuidanceRange:
    """The solver's guidance scale w is uniform on [min, max], per sample, in the convention where 1 is off."""

    min: float
    max: float


@dataclass(frozen=True, kw_only=True)
class TSCD(TakesAdversarial):
    """One TSCD stage; the keys and their defaults are explained in configs/stage/tscd.yaml."""

    segments: int
    solver_steps: int = 40
    guidance: GuidanceRange | None = None
    target: Literal["ema", "online"] = "ema"
    ema_decay: float = 0.95
    export_weights: Literal["ema", "student"] = "ema"
    jump: Literal["random", "edge"] = "random"
    compare: Literal["x_s", "x0"] = "x_s"
    loss: Literal["mse", "huber"] = "mse"
    teacher: Literal["base", "previous_stage"] = "base"
    offset_noise: float = 0.0
    empty_prompt_ratio: float = 0.0
    distance_weight: float = 1.0
    adversarial: Adversarial | None = None

    start = None

    def check(self, num_steps: int) -> None:
        SolverGrid(num_steps, self.solver_steps, self.segments)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"stage.ema_decay must be at least 0 and below 1: got {self.ema_decay}")
        if not 0 <= self.empty_prompt_ratio <= 1:
            raise ValueError(f"stage.empty_prompt_ratio must be between 0 and 1: got {self.empty_prompt_ratio}")
        check_not_negative("stage", self, "offset_noise", "distance_weight")
        if self.guidance is not None and self.guidance.min > self.guidance.max:
            raise ValueError(f"stage.guidance.min must not exceed stage.guidance.max: got {self.guidance.min} > {self.guidance.max}")
        if self.teacher == "previous_stage" and self.guidance is not None:
            raise ValueError(
                "stage.teacher=previous_stage already carries its guidance, so it must not be guided again: "
                f"got guidance={self.guidance.min}..{self.guidance.max}; set stage.guidance=null"
            )

        if self.adversarial is not None:
            self.adversarial.check()
            if self.compare == "x0" and self.adversarial.real == "target":
                raise ValueError(
                    "stage.adversarial.real=target shows the target's jump as real, and stage.compare=x0 makes none; change one"
                )

    @property
    def adapters(self) -> tuple[str, ...]:
        needs_ema = self.target == "ema" or self.export_weights == "ema"
        previous = [PREVIOUS] if self.teacher == "previous_stage" else []
        return (STUDENT, *([TARGET] if needs_ema else []), *previous, *self.encoder_only)

    @property
    def fresh(self) -> tuple[str, ...]:
        return self.encoder_only

    @property
    def trains(self) -> tuple[str, ...]:
        return (STUDENT, HEADS)

    @property
    def exports(self) -> Role:
        return (TARGET,) if self.export_weights == "ema" else self.student_role

    @property
    def step_counts(self) -> tuple[int, ...]:
        return (self.segments,) if self.segments > 1 else STEP_COUNTS

    @property
    def student_role(self) -> Role:
        return (STUDENT,)

    @property
    def teacher_role(self) -> Role:
        return (PREVIOUS,) if self.teacher == "previous_stage" else ()

    @property
    def target_role(self) -> Role:
        return (TARGET,) if self.target == "ema" else self.student_role

    def objectives(self, ctx: Context) -> tuple[Objective, ...]:
        student = Objective(trains=(STUDENT,), loss=partial(self.student_loss, ctx.denoiser))
        if self.adversarial is None:
            return (student,)
        return (student, Objective(trains=self.adversarial.trains, loss=partial(self.discriminator_loss, ctx.denoiser)))

    def after_step(self, ctx: Context, step: int) -> None:
        if TARGET in self.adapters:
            ctx.roles.ema(STUDENT, TARGET, self.ema_decay)

    def student_loss(self, denoiser: Denoiser, batch: Batch, shared: Shared) -> Loss:
        """Eq. 12 for one micro-batch: the mean over samples of the distance d, and the adversarial term."""
        t, u, s = (send(point, batch.x0) for point in self.draw_points(batch.draws, denoiser.schedule.num_steps))
        batch = self._drop_captions(batch)
        noise = self._draw_noise(batch)
        x_t = denoiser.noise(batch.x0, noise, t)
        with torch.no_grad():
            goal = self.goal(denoiser, batch, x_t, t, u, s)
        student = denoiser(self.student_role, x_t, t, batch.cond)
        reached = denoiser.jump(student, s)
        distance = self.distance(student.x0 if self.compare == "x0" else reached, goal).mean()
        if self.adversarial is None:
            return Loss(self.distance_weight * distance)
        real = goal if self.adversarial.real == "target" else denoiser.noise(batch.x0, noise, s)
        length = denoiser.schedule.num_steps // self.segments
        top = t // length * length + length - 1
        adversarial = self.adversarial.generator_loss(denoiser, batch, shared, reached, real, s, top)
        value = self.distance_weight * distance + self.adversarial.weight * adversarial.value
        return Loss(value, {"distance": distance.detach(), "adversarial": adversarial.value.detach()})

    def discriminator_loss(self, denoiser: Denoiser, batch: Batch, shared: Shared) -> Loss:
        """The discriminator's turn, under the captions that the student's had."""
        assert self.adversarial is not None
        return self.adversarial.discriminator_loss(denoiser, self._drop_captions(batch), shared)

    def draw_points(self, draws: Draws, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Network times (t, u, s), each (B,): a grid point, its lower neighbour, and the jump's target; -1 is the clean end."""
        grid = SolverGrid(num_steps, self.solver_steps, self.segments)
        index = draws.integers(Purpose.TIMESTEP, 1, self.solver_steps)
        tau, tau_u, edge = grid.tau(index), grid.tau(index - 1), grid.tau(grid.edge_index(index))
        tau_s = edge if self.jump == "edge" else draws.integers(Purpose.JUMP, edge, tau_u)
        return tau - 1, tau_u - 1, tau_s - 1

    def goal(self, denoiser: Denoiser, batch: Batch, x_t: Tensor, t: Tensor, u: Tensor, s: Tensor) -> Tensor:
        """What the student must reach: the target network's jump from (x_u, u) to s, or its estimate of x0 there.

        Where s = u there is nothing left to jump, and the teacher's own point, or its own x0, is the goal.
        """
        teacher = self.teacher_prediction(denoiser, batch, x_t, t)
        x_u = denoiser.jump(teacher, u)
        target = denoiser(self.target_role, x_u, u.clamp(min=0), batch.cond)
        arrived = per_sample(s == u, x_u)
        if self.compare == "x0":
            return torch.where(arrived, teacher.x0, target.x0)
        return torch.where(arrived, x_u, denoiser.jump(target, s))

    def teacher_prediction(self, denoiser: Denoiser, batch: Batch, x_t: Tensor, t: Tensor) -> Prediction:
        """The guided teacher at x_t; its jump to u is the solver's one step (Eq. 1)."""
        if self.guidance is None:
            return denoiser(self.teacher_role, x_t, t, batch.cond)
        low, high = self.guidance.min, self.guidance.max
        w = send(low + (high - low) * batch.draws.uniform(Purpose.GUIDANCE), x_t)
        return denoiser(self.teacher_role, x_t, t, batch.cond, w=w, uncond=batch.uncond)

    def distance(self, student: Tensor, target: Tensor) -> Tensor:
        """d per sample (B,): the mean square, or pseudo-Huber sqrt(r^2 + c^2) - c."""
        error = (student - target).flatten(1)
        if self.loss == "mse":
            return error.square().mean(1)
        return ((error.square() + HUBER_C**2).sqrt() - HUBER_C).mean(1)

    def _draw_noise(self, batch: Batch) -> Tensor:
        noise = batch.draws.normal(Purpose.NOISE, batch.x0.shape[1:])
        if self.offset_noise > 0:
            noise = noise + self.offset_noise * batch.draws.normal(Purpose.OFFSET_NOISE, (batch.x0.shape[1], 1, 1))
        return send(noise, batch.x0)

    def _drop_captions(self, batch: Batch) -> Batch:
        if self.empty_prompt_ratio == 0:
            return batch
        drop = send(batch.draws.uniform(Purpose.DROP_CAPTION) < self.empty_prompt_ratio, batch.x0)
        cond = tuple(torch.where(per_sample(drop, c), u, c) for c, u in zip(batch.cond, batch.uncond, strict=True))
        return replace(batch, cond=cond)
