"""The adversarial term that tscd and score add to their own loss.

A discriminator D reads the encoder half of the base network, which knows text and time, through small convolutional heads. It is
shown the student's point x_s and a real one, both noised on to one t' >= s of the same segment:

    hinge            L_D = relu(1 - D(real)) + relu(1 + D(fake)),             L_G = -D(fake)
    non_saturating   L_D = softplus(-D(real)) + softplus(D(fake)),            L_G = softplus(-D(fake))
    L_D += r1_weight |D(real) - D(real + r1_noise n)|^2                       n standard normal; approximate R1

Each is a mean over heads and positions. The student's turn comes first and leaves its sample, and on a frozen backbone the
sample's features too, for the discriminator's: one batch serves both.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from hyper_sd.denoiser import Denoiser
from hyper_sd.features import encoder_channels
from hyper_sd.objective import Batch, Loss, Shared, StageDefaults, check_not_negative
from hyper_sd.randomness import Draws, Purpose, generator, send
from hyper_sd.roles import Role

HEADS, DISC = "heads", "disc"
_FAKE, _REAL, _TIME, _FEATURE = "adversarial_fake", "adversarial_real", "adversarial_t", "adversarial_feature_{}"


class Heads(nn.Module):
    """One head for each feature map: 3x3 convolution, group norm, SiLU, 1x1 convolution to one logit a position; float32."""

    def __init__(self, channels: Sequence[int], hidden: int, seed: int):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, hidden, 3, padding=1), nn.GroupNorm(8, hidden), nn.SiLU(), nn.Conv2d(hidden, 1, 1)) for c in channels
        )
        convolutions = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        for index, module in enumerate(convolutions if not next(self.parameters()).is_meta else ()):
            assert module.bias is not None
            draw = torch.randn(module.weight.shape, generator=generator(seed, Purpose.HEADS, index))
            module.weight.data.copy_(draw * module.weight[0].numel() ** -0.5)
            module.bias.data.zero_()

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Logits (B, 1, h_i, w_i) of features (B, C_i, h_i, w_i)."""
        return [head(feature.float()) for head, feature in zip(self.heads, features, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """The term's keys; explained in configs/stage/tscd.yaml."""

    weight: float
    loss: Literal["hinge", "non_saturating"] = "hinge"
    real: Literal["target", "data"] = "target"
    backbone: Literal["frozen", "lora"] = "frozen"
    t_max: float = 1.0
    r1_weight: float = 0.0
    r1_noise: float = 0.1
    hidden: int = 64

    def check(self, key: str = "stage.adversarial") -> None:
        check_not_negative(key, self, "weight", "r1_weight", "r1_noise")
        if not 0 < self.t_max <= 1:
            raise ValueError(f"{key}.t_max must be above 0 and at most 1: got {self.t_max}")
        if self.hidden < 8 or self.hidden % 8:
            raise ValueError(f"{key}.hidden must be a multiple of 8: got {self.hidden}")

    @property
    def role(self) -> Role:
        """What the features come from: the teacher itself, or an adapter on it that learns with the heads."""
        return (DISC,) if self.backbone == "lora" else ()

    def heads(self, net: nn.Module, seed: int) -> Heads:
        return Heads(encoder_channels(net), self.hidden, seed)

    @property
    def trains(self) -> Role:
        """What the discriminator's turn updates; it comes after the student's."""
        return (*self.role, HEADS)

    def generator_loss(
        self, denoiser: Denoiser, batch: Batch, shared: Shared, fake: Tensor, real: Tensor, s: Tensor, top: int | Tensor
    ) -> Loss:
        """L_G of the student's points `fake` at times s (B,), noised on to times from s to `top`."""
        fake_t = self.show(denoiser, batch, shared, fake, real, s, top)
        features = denoiser.features(self.role, fake_t, shared[_TIME], batch.cond)
        logits = self._logits(denoiser, features)
        if self.backbone == "frozen":
            shared |= {_FEATURE.format(index): feature.detach() for index, feature in enumerate(features)}
        return Loss(_mean(-logit if self.loss == "hinge" else functional.softplus(-logit) for logit in logits))

    def show(self, denoiser: Denoiser, batch: Batch, shared: Shared, fake: Tensor, real: Tensor, s: Tensor, top: int | Tensor) -> Tensor:
        """`fake` and `real` at s, noised on alike to one t'; leaves both for the discriminator and returns the noised `fake`."""
        t = self.times(batch.draws, s, top, denoiser.schedule.num_steps)
        eps = send(batch.draws.normal(Purpose.ADVERSARIAL_NOISE, fake.shape[1:]), fake)
        fake_t = denoiser.renoise(fake, s, eps, t)
        shared |= {_FAKE: fake_t.detach(), _REAL: denoiser.renoise(real, s, eps, t).detach(), _TIME: t}
        return fake_t

    def shown(self, shared: Shared) -> bool:
        """Whether `shared` holds this step's points already."""
        return _FAKE in shared

    def discriminator_loss(self, denoiser: Denoiser, batch: Batch, shared: Shared) -> Loss:
        """L_D on what the student's turn left in `shared`."""
        t, real_t = shared[_TIME], shared[_REAL]
        fake = self._logits(denoiser, self._fake_features(denoiser, batch, shared))
        real = self._logits(denoiser, self._features(denoiser, real_t, t, batch))
        if self.loss == "hinge":
            value = _mean(functional.relu(1 - logit) for logit in real) + _mean(functional.relu(1 + logit) for logit in fake)
        else:
            value = _mean(functional.softplus(-logit) for logit in real) + _mean(functional.softplus(logit) for logit in fake)
        logs = {"logit_real": _mean(real).detach(), "logit_fake": _mean(fake).detach()}
        if self.r1_weight > 0:
            noise = send(batch.draws.normal(Purpose.R1_NOISE, real_t.shape[1:]), real_t)
            near = self._logits(denoiser, self._features(denoiser, real_t + self.r1_noise * noise, t, batch))
            r1 = _mean((a - b).square() for a, b in zip(real, near, strict=True))
            value, logs["r1"] = value + self.r1_weight * r1, r1.detach()
        return Loss(value, logs)

    def times(self, draws: Draws, s: Tensor, top: int | Tensor, num_steps: int) -> Tensor:
        """t' (B,), uniform on the timesteps from s (0 for the clean end) to `top`, or to `t_max` of the schedule if s is lower."""
        low = s.clamp(min=0)
        top = top if isinstance(top, Tensor) else low.new_full((), top)
        top = torch.maximum(top.clamp(max=round(self.t_max * num_steps) - 1), low)
        share = send(draws.uniform(Purpose.ADVERSARIAL_TIMESTEP), s)
        return low + (share * (top - low + 1)).long()

    def _fake_features(self, denoiser: Denoiser, batch: Batch, shared: Shared) -> Sequence[Tensor]:
        if self.backbone == "lora" or _FEATURE.format(0) not in shared:
            return self._features(denoiser, shared[_FAKE], shared[_TIME], batch)
        return [shared[_FEATURE.format(index)] for index in range(len(encoder_channels(denoiser.roles.net)))]

    def _features(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(self.backbone == "lora"):
            return denoiser.features(self.role, x_t, t, batch.cond)

    def _logits(self, denoiser: Denoiser, features: Sequence[Tensor]) -> list[Tensor]:
        return denoiser.roles.module(HEADS)(features)


class TakesAdversarial(StageDefaults):
    """What a stage with the field `adversarial` needs for it."""

    adversarial: Adversarial | None

    @property
    def encoder_only(self) -> tuple[str, ...]:
        return () if self.adversarial is None else self.adversarial.role

    @property
    def modules(self) -> Mapping[str, Callable[[nn.Module, int], nn.Module]]:
        return {} if self.adversarial is None else {HEADS: self.adversarial.heads}


def _mean(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack([part.mean() for part in parts]).mean()
