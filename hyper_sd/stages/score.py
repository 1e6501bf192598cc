"""Score distillation of a few-step student (distribution matching; paper section 3.3, Eq. 8).

The student draws x = f_student(z) from noise z, as it is sampled; x is noised again, and two score networks judge where it should move:

    grad = (x0_fake - x0_real) / mean|x - x0_real|,    the gradient of KL(student || teacher) in x, per sample       (Eq. 8)
    L_student = 1/2 |x - stopgrad(x - grad)|^2 + ode |x - x_ode|^2 + tscd L_tscd + adversarial L_G + reward L_reward
    L_fake    = |eps_fake(noise(x, eps, t), t, c) - eps|^2

The real score is the guided teacher, the fake score an adapter on the same base that follows the student's own images. With
several step counts in `rollout` the student's inputs come from its own sampling, so that one adapter serves all of them.
"""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from hyper_sd.denoiser import Denoiser, Prediction
from hyper_sd.objective import Batch, Context, Loss, Objective, Shared, check_not_negative
from hyper_sd.randomness import Draws, Purpose, send
from hyper_sd.roles import Role
from hyper_sd.stages.adversarial import HEADS, Adversarial, TakesAdversarial
from hyper_sd.stages.feedback import reward_loss
from hyper_sd.stages.rollout import STUDENT, RollsOut
from hyper_sd.stages.tscd import TARGET, TSCD, GuidanceRange

FAKE, CONSISTENCY = "fake", "consistency"
_SAMPLE = "sample"  # what the student's objective leaves for the fake score's


@dataclass(frozen=True, kw_only=True)
class Score(RollsOut, TakesAdversarial):
    """One score distillation stage; the keys and their defaults are explained in configs/stage/score.yaml."""

    fake_updates: int = 2
    real_score: Literal["teacher", "consistency"] = "teacher"
    guidance: GuidanceRange | None = None
    t_min: float = 0.02
    t_max: float = 0.98
    ode_weight: float = 0.25
    ode_steps: int = 8
    ode_one_in: int = 4
    tscd_weight: float = 0.0
    reward_weight: float = 0.0
    adversarial: Adversarial | None = None
    ema_decay: float = 0.95

    def check(self, num_steps: int) -> None:
        self._tscd.check(num_steps)
        self.check_rollout(num_steps)
        if self.fake_updates < 1:
            raise ValueError(f"stage.fake_updates must be at least 1: got {self.fake_updates}")
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(f"stage.t_min and stage.t_max must be 0 <= t_min < t_max <= 1: got {self.t_min}, {self.t_max}")
        check_not_negative("stage", self, "ode_weight", "tscd_weight", "reward_weight")
        for name in ("ode_steps", "ode_one_in"):
            if getattr(self, name) < 1:
                raise ValueError(f"stage.{name} must be at least 1: got {getattr(self, name)}")
        if self.adversarial is not None:
            self.adversarial.check()
            if self.adversarial.real == "target":
                raise ValueError("stage.adversarial.real must be data in a score stage, which has no target points: got target")

    @property
    def adapters(self) -> tuple[str, ...]:
        return (STUDENT, TARGET, FAKE, *([CONSISTENCY] if self.real_score == "consistency" else []), *self.encoder_only)

    @property
    def fresh(self) -> tuple[str, ...]:
        return (FAKE, *self.encoder_only)

    @property
    def trains(self) -> tuple[str, ...]:
        return (STUDENT, FAKE, HEADS)

    @property
    def exports(self) -> Role:
        return (TARGET,)

    @property
    def uses_rewards(self) -> bool:
        return self.reward_weight > 0

    @property
    def uses_latents(self) -> bool:
        return self.tscd_weight > 0 or self.adversarial is not None

    @property
    def student_every(self) -> int:
        return self.fake_updates

    @property
    def sample_period(self) -> int:
        return self.ode_one_in if self.ode_weight > 0 else 1

    @cached_property
    def _tscd(self) -> TSCD:
        return TSCD(segments=1, solver_steps=self.solver_steps, guidance=self.guidance, ema_decay=self.ema_decay)

    def objectives(self, ctx: Context) -> tuple[Objective, ...]:
        student = Objective(trains=(STUDENT,), loss=partial(self.student_loss, ctx), every=self.student_every)
        fake = Objective(trains=(FAKE,), loss=partial(self.fake_loss, ctx.denoiser))
        if self.adversarial is None:
            return (student, fake)
        return (student, fake, Objective(trains=self.adversarial.trains, loss=partial(self.discriminator_loss, ctx.denoiser)))

    def after_step(self, ctx: Context, step: int) -> None:
        if step % self.fake_updates == 0:
            ctx.roles.ema(STUDENT, TARGET, self.ema_decay)

    def student_loss(self, ctx: Context, batch: Batch, shared: Shared) -> Loss:
        """Distribution matching on the student's own sample, plus what keeps it in place."""
        denoiser = ctx.denoiser
        z, t = self.student_input(denoiser, batch)
        x = self.drawn(denoiser, denoiser((STUDENT,), z, t, batch.cond))
        shared[_SAMPLE] = x.detach()
        grad, logs = self.matching_gradient(denoiser, batch, x.detach())
        value = 0.5 * (x - (x - grad).detach()).square().flatten(1).mean(1).mean()
        if self.ode_weight > 0 and self._starts_from_noise(batch.draws):
            ode = self.ode_distance(denoiser, batch, z, x)
            value, logs["ode"] = value + self.ode_weight * ode, ode.detach()
        if self.tscd_weight > 0:
            tscd = self._tscd.student_loss(denoiser, replace(batch, draws=batch.draws.branch(Purpose.TSCD_TERM)), shared).value
            value, logs["tscd"] = value + self.tscd_weight * tscd, tscd.detach()
        if self.reward_weight > 0:
            reward = reward_loss(ctx, x, batch)
            value, logs = value + self.reward_weight * reward.value, {**logs, **reward.logs, "reward": reward.value.detach()}
        if self.adversarial is not None:
            real, clean, top = self._real_points(denoiser, batch)
            adversarial = self.adversarial.generator_loss(denoiser, batch, shared, x, real, clean, top).value
            value, logs["adversarial"] = value + self.adversarial.weight * adversarial, adversarial.detach()
        return Loss(value, logs)

    def fake_loss(self, denoiser: Denoiser, batch: Batch, shared: Shared) -> Loss:
        """Denoising of the student's samples: what makes the fake score the score of the student's distribution."""
        x = shared.get(_SAMPLE)
        if x is None:
            with torch.no_grad():
                x = self.drawn(denoiser, denoiser((STUDENT,), *self.student_input(denoiser, batch), batch.cond))
            shared[_SAMPLE] = x
        t = self._times(batch.draws, Purpose.FAKE_TIMESTEP, denoiser.schedule.num_steps, x)
        eps = send(batch.draws.normal(Purpose.FAKE_NOISE, x.shape[1:]), x)
        prediction = denoiser((FAKE,), denoiser.noise(x, eps, t), t, batch.cond)
        return Loss((prediction.eps - eps).square().flatten(1).mean(1).mean())

    def discriminator_loss(self, denoiser: Denoiser, batch: Batch, shared: Shared) -> Loss:
        """The discriminator's turn, in every step: where the student has had none, on the sample that the fake score's turn made."""
        assert self.adversarial is not None
        if not self.adversarial.shown(shared):
            self.adversarial.show(denoiser, batch, shared, shared[_SAMPLE], *self._real_points(denoiser, batch))
        return self.adversarial.discriminator_loss(denoiser, batch, shared)

    def _real_points(self, denoiser: Denoiser, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """What is real to the discriminator, its time (B,), the clean end, and the last time it is noised on to.

        The student's samples end as a sampler's do (`drawn`): at x0 where it is made for one step alone, else with the noise of the clean
        end. So do the data: whether any noise is there would tell them apart.
        """
        clean = torch.full((len(batch.x0),), -1, device=batch.x0.device)
        last = denoiser.schedule.num_steps - 1
        if self.step_counts == (1,):
            return batch.x0, clean, last
        noise = send(batch.draws.normal(Purpose.ADVERSARIAL_REAL, batch.x0.shape[1:]), batch.x0)
        return denoiser.noise(batch.x0, noise, clean), clean, last

    @torch.no_grad()
    def matching_gradient(self, denoiser: Denoiser, batch: Batch, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(x0_fake - x0_real) / mean|x - x0_real| at a noised x, shaped like x, and what is logged of it."""
        t = self._times(batch.draws, Purpose.TIMESTEP, denoiser.schedule.num_steps, x)
        x_t = denoiser.noise(x, send(batch.draws.normal(Purpose.NOISE, x.shape[1:]), x), t)
        real, fake = self.real_prediction(denoiser, batch, x_t, t).x0, denoiser((FAKE,), x_t, t, batch.cond).x0
        scale = (x - real).abs().flatten(1).mean(1).clamp(min=1e-6)
        grad = (fake - real) / scale.reshape(-1, *[1] * (x.ndim - 1))
        logs = {"matching_grad": grad.square().mean().sqrt(), "std_sample": x.std(), "std_real": real.std(), "std_fake": fake.std()}
        if len(x) > 1:
            logs["variety"] = x.std(0).mean()
        return grad, logs

    def real_prediction(self, denoiser: Denoiser, batch: Batch, x_t: Tensor, t: Tensor) -> Prediction:
        """The guided teacher, or the one-jump estimate of the consistency model this stage started from (paper Figure 3)."""
        if self.real_score == "consistency":
            return denoiser((CONSISTENCY,), x_t, t, batch.cond)
        return self._tscd.teacher_prediction(denoiser, batch, x_t, t)

    @torch.no_grad()
    def ode_end(self, denoiser: Denoiser, batch: Batch, z: Tensor) -> Tensor:
        """The end of the guided teacher's own trajectory from pure noise z, in `ode_steps` DDIM steps.

        It begins at the last timestep whatever `start` is: at any lower one, pure noise is no point of the teacher's.
        """
        num_steps = denoiser.schedule.num_steps
        t = torch.full((len(z),), num_steps - 1, device=z.device)
        for number in range(self.ode_steps, 0, -1):
            u = torch.full_like(t, num_steps * (number - 1) // self.ode_steps - 1)
            z = denoiser.jump(self._tscd.teacher_prediction(denoiser, batch, z, t), u)
            t = u
        return z

    def ode_distance(self, denoiser: Denoiser, batch: Batch, z: Tensor, x: Tensor) -> Tensor:
        """Mean of |x - x_ode|^2, estimated on one sample in `ode_one_in`; which ones is drawn for the whole batch."""
        first = batch.draws.choice(Purpose.ODE_ROWS, self.ode_one_in)
        rows = [row for row, sample in enumerate(batch.draws.samples) if sample % self.ode_one_in == first]
        if not rows:
            return x.sum() * 0
        index = send(torch.tensor(rows), x)
        end = self.ode_end(denoiser, batch.rows(rows), z[index])
        return (x[index] - end).square().flatten(1).mean(1).sum() * self.ode_one_in / len(x)

    def _starts_from_noise(self, draws: Draws) -> bool:
        return self.draw_rollout(draws)[1] == 0

    def _times(self, draws: Draws, purpose: Purpose, num_steps: int, like: Tensor) -> Tensor:
        return send(draws.integers(purpose, round(self.t_min * num_steps), round(self.t_max * num_steps) - 1), like)
