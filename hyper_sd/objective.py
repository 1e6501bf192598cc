"""What a stage hands to the training loop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from hyper_sd.denoiser import Denoiser
from hyper_sd.guidance import Cond
from hyper_sd.instances import Instances
from hyper_sd.randomness import Draws, send
from hyper_sd.roles import Role, Roles


@dataclass(frozen=True)
class Batch:
    """One micro-batch: clean latents x0 (B, C, H, W), conditions with leading dimension B, and the draws of exactly these samples.

    The prompts that the conditions were made of are for rewards, which read them themselves; instances are what the images of x0 show,
    where the data have them.
    """

    x0: Tensor
    cond: Cond
    uncond: Cond
    draws: Draws
    prompts: tuple[str, ...] = ()
    instances: tuple[Instances, ...] = ()

    def rows(self, rows: Sequence[int]) -> "Batch":
        """Some of the samples, with their draws."""
        index = send(torch.tensor(rows, dtype=torch.long), self.x0)  # a list would make a GPU wait for each of the tensors
        cond, uncond = (tuple(part[index] for part in parts) for parts in (self.cond, self.uncond))
        draws = replace(self.draws, samples=tuple(self.draws.samples[row] for row in rows))
        prompts = tuple(self.prompts[row] for row in rows if self.prompts)
        instances = tuple(self.instances[row] for row in rows if self.instances)
        return Batch(self.x0[index], cond, uncond, draws, prompts, instances)


@dataclass(frozen=True)
class Loss:
    """A scalar: the mean of the per-sample losses, so that micro-batches of one size average exactly. Logs are detached scalars."""

    value: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


Shared = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """One update: minimise `loss(batch, shared)` over the adapters in `trains`, at every `every`-th step of the stage.

    `shared` carries detached tensors to later objectives of the same step and micro-batch.
    """

    trains: Role
    loss: Callable[[Batch, Shared], Loss]
    every: int = 1


@dataclass(frozen=True)
class WeightedReward:
    """`score(images, prompts)` answers (B,), higher is better, with a gradient to the images; its loss is weight relu(alpha - score).

    Where there is `embed`, `score` takes what it makes of the images instead; rewards that have the same one share its forward pass.
    """

    score: Callable[[Tensor, Sequence[str]], Tensor]
    weight: float
    alpha: float
    embed: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Feedback:
    """The rewards of a run by name, and what makes images in [0, 1] of clean latents for them, `slice` samples at a time.

    `segment(images, instances)` answers (B,), the loss of a frozen segmenter that should find these objects, with a gradient to the images.
    """

    decode: Callable[[Tensor], Tensor]
    rewards: Mapping[str, WeightedReward]
    slice: int = 8
    segment: Callable[[Tensor, Sequence[Instances]], Tensor] | None = None


@dataclass(frozen=True)
class Context:
    """What the mathematics of a stage may touch; feedback only where `uses_rewards` or `uses_instances`."""

    denoiser: Denoiser
    roles: Roles
    feedback: Feedback | None = None


class Stage(Protocol):
    """The mathematics of one stage; a frozen dataclass made from its yaml."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Every adapter the stage needs; all but the `fresh` ones start as copies of what the previous stage handed on."""
        ...

    @property
    def fresh(self) -> tuple[str, ...]:
        """Adapters that start anew, equal to the teacher."""
        ...

    @property
    def trains(self) -> tuple[str, ...]:
        """The adapters and modules that an optimizer may be given for; some may be switched off."""
        ...

    @property
    def encoder_only(self) -> tuple[str, ...]:
        """Adapters on the down and middle blocks alone, for roles that are asked for features only."""
        ...

    @property
    def exports(self) -> Role:
        """The adapters whose sum is exported and handed on; all but the last of them are frozen."""
        ...

    @property
    def segments(self) -> int:
        """The exported adapter jumps from edge to edge of so many segments."""
        ...

    @property
    def step_counts(self) -> tuple[int, ...]:
        """The numbers of steps the exported adapter is made for."""
        ...

    @property
    def start(self) -> int | None:
        """The timestep its one step starts from; None leaves that to eval.start."""
        ...

    @property
    def student_every(self) -> int:
        """The student takes one update in so many steps."""
        ...

    @property
    def solver_steps(self) -> int:
        """The points of the time grid it was trained on, which samplers must use."""
        ...

    @property
    def sample_period(self) -> int:
        """One sample in so many is given more calls of the network than the others; 1: all are alike."""
        ...

    @property
    def uses_rewards(self) -> bool:
        """Whether it asks for the run's rewards."""
        ...

    @property
    def uses_instances(self) -> bool:
        """Whether it asks for the run's segmenter, and for data with instances."""
        ...

    @property
    def uses_latents(self) -> bool:
        """Whether it looks at clean latents; else a batch's x0 is zeros, which cost no encoding and no sampling."""
        ...

    @property
    def modules(self) -> Mapping[str, Callable[[nn.Module, int], nn.Module]]:
        """What else is trained, such as a discriminator's heads: by name, a function of the network and a seed that makes it anew."""
        ...

    def check(self, num_steps: int) -> None:
        """Raise ValueError, naming the key, if the stage cannot run on a teacher with this many steps. Needs no weights."""
        ...

    def objectives(self, ctx: Context) -> tuple[Objective, ...]: ...

    def after_step(self, ctx: Context, step: int) -> None:
        """Called after the optimizer steps of the stage's step `step` (0-based)."""
        ...


def check_not_negative(key: str, owner: object, *names: str) -> None:
    """Raise ValueError, naming `key`.<name>, if one of the owner's fields is below 0."""
    for name in names:
        if getattr(owner, name) < 0:
            raise ValueError(f"{key}.{name} must not be negative: got {getattr(owner, name)}")


class StageDefaults:
    """What most stages have none of."""

    @property
    def student_every(self) -> int:
        return 1

    @property
    def sample_period(self) -> int:
        return 1

    @property
    def fresh(self) -> tuple[str, ...]:
        return ()

    @property
    def encoder_only(self) -> tuple[str, ...]:
        return ()

    @property
    def uses_rewards(self) -> bool:
        return False

    @property
    def uses_instances(self) -> bool:
        return False

    @property
    def uses_latents(self) -> bool:
        return True

    @property
    def modules(self) -> Mapping[str, Callable[[nn.Module, int], nn.Module]]:
        return {}
