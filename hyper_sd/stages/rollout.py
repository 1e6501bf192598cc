"""A few-step student's own sampling, as far as the step that is trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyper_sd.denoiser import Denoiser, Prediction
from hyper_sd.objective import Batch, StageDefaults
from hyper_sd.randomness import Draws, Purpose, send
from hyper_sd.roles import Role

STUDENT = "student"


@dataclass(frozen=True, kw_only=True)
class RollsOut(StageDefaults):
    """A stage whose student meets the inputs of its own sampling, and is judged by what that draws: TCD with `eta`, or one step of LCM."""

    rollout: tuple[int, ...] = (1, 2, 4, 8)
    start: int = 999
    eta: float = 1.0
    solver_steps: int = 40

    segments = 1

    def check_rollout(self, num_steps: int) -> None:
        if not self.rollout or any(count < 1 or self.solver_steps % count for count in self.rollout):
            raise ValueError(f"stage.rollout must be step counts that divide stage.solver_steps={self.solver_steps}: got {self.rollout}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"stage.eta must be between 0 and 1: got {self.eta}")
        if not 0 < self.start < num_steps:
            raise ValueError(f"stage.start must be a timestep from 1 to {num_steps - 1}: got {self.start}")
        stride = num_steps // self.solver_steps
        below = (self.start + 1) // stride * stride - 1
        if self.step_counts != (1,) and below != self.start:
            raise ValueError(
                f"stage.start must be on the grid of samplers unless stage.rollout=[1]: got {self.start}, with "
                f"stage.solver_steps={self.solver_steps} the nearest are {below} and {below + stride}"
            )

    @property
    def student_role(self) -> Role:
        return (STUDENT,)

    @property
    def step_counts(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.rollout))

    @torch.no_grad()
    def student_input(self, denoiser: Denoiser, batch: Batch) -> tuple[Tensor, Tensor]:
        """(z, t) at the drawn step of a drawn rollout."""
        steps, position = self.draw_rollout(batch.draws)
        times = self.times(steps, denoiser.schedule.num_steps)
        z = send(batch.draws.normal(Purpose.ROLLOUT_NOISE, batch.x0.shape[1:]), batch.x0).to(batch.x0)
        return self.roll(denoiser, z, times[: position + 1], batch)

    def roll(self, denoiser: Denoiser, z: Tensor, times: Sequence[int], batch: Batch) -> tuple[Tensor, Tensor]:
        """(z, t) at the last of the times, from z at the first: steps jump to s = floor((1 - eta) t_next), then fresh noise to t_next."""
        t = z.new_full((len(z),), times[0], dtype=torch.long)
        for number, following in enumerate(times[1:], start=1):
            prediction = denoiser(self.student_role, z, t, batch.cond)
            s, t = torch.full_like(t, int((1 - self.eta) * following)), torch.full_like(t, following)
            fresh = batch.draws.normal(Purpose.ROLLOUT_NOISE, batch.x0.shape[1:], number)
            z = denoiser.renoise(denoiser.jump(prediction, s), s, send(fresh, z), t)
        return z, t

    def drawn(self, denoiser: Denoiser, prediction: Prediction) -> Tensor:
        """The latents that a sampler ends with: TCD at the clean end, alpha(0) x0 + sigma(0) eps; LCM, for one step alone, at x0."""
        if self.step_counts == (1,):
            return prediction.x0
        return denoiser.jump(prediction, torch.full((len(prediction.x0),), -1, device=prediction.x0.device))

    def times(self, steps: int, num_steps: int) -> list[int]:
        """The timesteps of a rollout of so many steps, on the edges of the solver grid; one step begins at `start`."""
        if steps == 1:
            return [self.start]
        return [num_steps - number * num_steps // steps - 1 for number in range(steps)]

    def draw_rollout(self, draws: Draws) -> tuple[int, int]:
        """How many steps, and which of them is trained: one draw for the whole batch, so every process does the same work."""
        steps = self.rollout[draws.choice(Purpose.ROLLOUT, len(self.rollout))]
        return steps, draws.choice(Purpose.ROLLOUT_POSITION, steps)
