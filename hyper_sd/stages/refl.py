"""Human feedback on a few-step student (reward feedback learning; paper section 3.2).

The student's own rollout runs without a gradient to one of its steps; that step's clean estimate is decoded and scored:

    x0 = f_student(z, t, c)
    L = reward sum_d weight_d relu(alpha_d - r_d(decode(x0), prompt)) + reference |x0 - x0_frozen|^2 + tscd L_tscd

x0_frozen is what the student answered there before the stage. What is learnt is an adapter of its own on top of the frozen student,
("student", "feedback"), whose role without it is the reference, or the student itself, and then the reference is a copy.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch

from hyper_sd.objective import Batch, Context, Loss, Objective, Shared, check_not_negative
from hyper_sd.randomness import Draws
from hyper_sd.roles import Role
from hyper_sd.stages.feedback import reward_loss
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
    tscd_weight: float = 0.0
    guidance: GuidanceRange | None = None

    def check(self, num_steps: int) -> None:
        self._tscd.check(num_steps)
        self.check_rollout(num_steps)
        check_not_negative("stage", self, "reward_weight", "reference_weight", "tscd_weight")
        if not self.reward_weight + self.reference_weight + self.tscd_weight:
            raise ValueError("stage.reward_weight, stage.reference_weight and stage.tscd_weight are all 0: nothing is left to learn")

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
    def uses_latents(self) -> bool:
        return self.tscd_weight > 0

    @cached_property
    def _tscd(self) -> TSCD:
        return _Consistency(student_role=self.student_role, solver_steps=self.solver_steps, guidance=self.guidance)

    def objectives(self, ctx: Context) -> tuple[Objective, ...]:
        return (Objective(trains=self.trains, loss=partial(self.student_loss, ctx)),)

    def after_step(self, ctx: Context, step: int) -> None:
        pass

    def student_loss(self, ctx: Context, batch: Batch, shared: Shared) -> Loss:
        """The hinge of every reward at the trained step, and what keeps the student near itself."""
        denoiser = ctx.denoiser
        z, t = self.student_input(denoiser, batch)
        x = denoiser(self.student_role, z, t, batch.cond).x0
        value, logs = x.new_zeros(()), {}
        if self.reward_weight > 0:
            reward = reward_loss(ctx, x, batch)
            value, logs = value + self.reward_weight * reward.value, {**reward.logs, "reward": reward.value.detach()}
        if self.reference_weight > 0:
            with torch.no_grad():
                before = denoiser(self.reference_role, z, t, batch.cond).x0
            reference = (x - before).square().flatten(1).mean(1).mean()
            value, logs["reference"] = value + self.reference_weight * reference, reference.detach()
        if self.tscd_weight > 0:
            tscd = self._tscd.student_loss(denoiser, batch, shared).value
            value, logs["tscd"] = value + self.tscd_weight * tscd, tscd.detach()
        return Loss(value, logs)

    def draw_rollout(self, draws: Draws) -> tuple[int, int]:
        steps, position = super().draw_rollout(draws)
        return steps, steps - 1 if self.trained_step == "last" else position
