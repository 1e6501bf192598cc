"""Human feedback on a few-step student (reward feedback learning; paper section 3.2).

The student's own rollout runs without a gradient to one of its steps; that step's clean estimate is decoded and scored:

    x0 = f_student(z, t, c)
    L = reward sum_d weight_d relu(alpha_d - r_d(decode(x0), prompt)) + reference |x0 - x0_frozen|^2 + tscd L_tscd
        + perceptual L_instance(segmenter(decode(x0')), the image's objects)

x0_frozen is what the student answered there before the stage; x0' is the student's estimate further down the rollout that began not
with noise but with a noised image, whose objects are known. What is learnt is an adapter of its own on top of the frozen student,
("student", "feedback"), whose role without it is the reference, or the student itself, and then the reference is a copy.
"""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from hyper_sd.denoiser import Denoiser
from hyper_sd.objective import Batch, Context, Loss, Objective, Shared, check_not_negative
from hyper_sd.randomness import Draws, Purpose, send
from hyper_sd.roles import Role
from hyper_sd.stages.feedback import perceptual_loss, reward_loss
from hyper_sd.stages.rollout import STUDENT, RollsOut
from hyper_sd.stages.tscd import TSCD, GuidanceRange

FEEDBACK, REFERENCE = "feedback", "reference"


@dataclass(frozen=True, kw_only=True)
class _Consistency(TSCD):
    """The k = 1 consistency loss of any role, against itself."""

    student_role: Role = (STUDENT,)  # pyright: ignore[reportIncompatibleMethodOverride]
    segments: int = 1
    target: Literal["ema", "online"] = "online"
    export_weights: Literal["ema", "student"] = "student"


@dataclass(frozen=True, kw_only=True)
class ReFL(RollsOut):
    """One feedback stage; the keys and their defaults are explained in configs/stage/refl.yaml."""

    rollout: tuple[int, ...] = (1, 2, 4)
    trained_step: Literal["random", "last"] = "random"
    adapter: Literal["feedback", "student"] = "feedback"
    reward_weight: float = 1.0
    reference_weight: float = 1.0
    reference_scale: float | None = None
    tscd_weight: float = 0.0
    perceptual_weight: float = 0.0
    perceptual_rollout: tuple[int, ...] = (2, 4)
    perceptual_start: int = 500
    guidance: GuidanceRange | None = None

    def check(self, num_steps: int) -> None:
        self._tscd.check(num_steps)
        self.check_rollout(num_steps)
        weights = ("reward_weight", "reference_weight", "tscd_weight", "perceptual_weight")
        check_not_negative("stage", self, *weights)
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"{', '.join(f'stage.{name}' for name in weights)} are all 0: nothing is left to learn")
        if self.reference_scale is not None and self.reference_scale <= 0:
            raise ValueError(f"stage.reference_scale must be positive, or null for a distance without a bound: got {self.reference_scale}")
        if self.perceptual_weight > 0:
            self._check_perceptual(num_steps)

    def _check_perceptual(self, num_steps: int) -> None:
        counts = self.perceptual_rollout
        if not counts or any(count < 1 or self.solver_steps % count for count in counts):
            raise ValueError(
                f"stage.perceptual_rollout must be step counts that divide stage.solver_steps={self.solver_steps}: got {counts}"
            )
        lowest = max(self.times(count, num_steps)[-1] for count in counts)
        if not lowest <= self.perceptual_start < num_steps:
            raise ValueError(
                f"stage.perceptual_start must be a timestep from {lowest}, the last of a rollout in stage.perceptual_rollout={counts}, to "
                f"{num_steps - 1}: got {self.perceptual_start}"
            )

    @property
    def adapters(self) -> tuple[str, ...]:
        copies = (REFERENCE,) if self.adapter == "student" and self.reference_weight > 0 else ()
        return (*self.student_role, *copies)

    @property
    def fresh(self) -> tuple[str, ...]:
        return (FEEDBACK,) if self.adapter == "feedback" else ()

    @property
    def trains(self) -> tuple[str, ...]:
        return self.student_role[-1:]

    @property
    def exports(self) -> Role:
        return self.student_role

    @property
    def student_role(self) -> Role:
        return (STUDENT, FEEDBACK) if self.adapter == "feedback" else (STUDENT,)

    @property
    def reference_role(self) -> Role:
        """The student as it was before the stage."""
        return (STUDENT,) if self.adapter == "feedback" else (REFERENCE,)

    @property
    def uses_rewards(self) -> bool:
        return self.reward_weight > 0

    @property
    def uses_instances(self) -> bool:
        return self.perceptual_weight > 0

    @property
    def uses_latents(self) -> bool:
        return self.tscd_weight > 0 or self.perceptual_weight > 0

    @cached_property
    def _tscd(self) -> TSCD:
        return _Consistency(student_role=self.student_role, solver_steps=self.solver_steps, guidance=self.guidance)

    def objectives(self, ctx: Context) -> tuple[Objective, ...]:
        return (Objective(trains=self.trains, loss=partial(self.student_loss, ctx)),)

    def after_step(self, ctx: Context, step: int) -> None:
        pass

    def student_loss(self, ctx: Context, batch: Batch, shared: Shared) -> Loss:
        """The hinge of every reward at the trained step, what keeps the student near itself, and what a segmenter finds in its images."""
        value, logs = batch.x0.new_zeros(()), {}
        if self.reward_weight > 0 or self.reference_weight > 0:
            judged = self._judged_loss(ctx, batch)
            value, logs = value + judged.value, dict(judged.logs)
        if self.tscd_weight > 0:
            tscd = self._tscd.student_loss(ctx.denoiser, batch, shared).value
            value, logs["tscd"] = value + self.tscd_weight * tscd, tscd.detach()
        if self.perceptual_weight > 0:
            x = self.drawn(ctx.denoiser, ctx.denoiser(self.student_role, *self.perceptual_input(ctx.denoiser, batch), batch.cond))
            perceptual = perceptual_loss(ctx, x, batch)
            value, logs = value + self.perceptual_weight * perceptual.value, {**logs, **perceptual.logs}
        return Loss(value, logs)

    def _judged_loss(self, ctx: Context, batch: Batch) -> Loss:
        """The rewards and the distance to the student before the stage, of one estimate."""
        denoiser = ctx.denoiser
        z, t = self.student_input(denoiser, batch)
        x = self.drawn(denoiser, denoiser(self.student_role, z, t, batch.cond))
        value, logs = x.new_zeros(()), {}
        if self.reward_weight > 0:
            reward = reward_loss(ctx, x, batch)
            value, logs = value + self.reward_weight * reward.value, {**reward.logs, "reward": reward.value.detach()}
        if self.reference_weight > 0:
            with torch.no_grad():
                before = self.drawn(denoiser, denoiser(self.reference_role, z, t, batch.cond))
            reference = self.reference_distance(x, before).mean()
            value, logs["reference"] = value + self.reference_weight * reference, reference.detach()
        return Loss(value, logs)

    def reference_distance(self, x: Tensor, before: Tensor) -> Tensor:
        """d = |x - before|^2 a sample (B,), or c log(1 + d / c) with c = `reference_scale`: one that has left is let go."""
        distance, scale = (x - before).square().flatten(1).mean(1), self.reference_scale
        return distance if scale is None else scale * torch.log1p(distance / scale)

    @torch.no_grad()
    def perceptual_input(self, denoiser: Denoiser, batch: Batch) -> tuple[Tensor, Tensor]:
        """(z, t) at a drawn step of a rollout that images enter, noised, at its first time that is at most `perceptual_start`."""
        draws = batch.draws.branch(Purpose.PERCEPTUAL_TERM)
        steps = self.perceptual_rollout[draws.choice(Purpose.ROLLOUT, len(self.perceptual_rollout))]
        times = [t for t in self.times(steps, denoiser.schedule.num_steps) if t <= self.perceptual_start]
        last = len(times) - 1 if self.trained_step == "last" else draws.choice(Purpose.ROLLOUT_POSITION, len(times))
        eps = send(draws.normal(Purpose.ROLLOUT_NOISE, batch.x0.shape[1:]), batch.x0)
        z = denoiser.noise(batch.x0, eps, torch.full((len(eps),), times[0], device=eps.device))
        return self.roll(denoiser, z, times[: last + 1], replace(batch, draws=draws))

    def draw_rollout(self, draws: Draws) -> tuple[int, int]:
        steps, position = super().draw_rollout(draws)
        return steps, steps - 1 if self.trained_step == "last" else position
