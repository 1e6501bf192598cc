"""What models of images add to a stage's loss (paper section 3.2):

    L_reward     = mean over samples of sum_d weight_d relu(alpha_d - r_d(decode(x0), prompt))
    L_perceptual = mean over samples of L_instance(segmenter(decode(x0)), the objects of the image)

One decoding serves all rewards, and one forward pass of a tower those that stand on it. The gradient is taken here, a slice of the
samples and a model at a time, so that no more than the decoder's activations of one slice and those of one model are in memory; the
network's own backward pass then starts from dL/dx0. Decoder and models are float32, whatever the network's dtype.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hyper_sd.objective import Batch, Context, Feedback, Loss, WeightedReward

# images of a slice of the samples, or what was embedded of them, to what is minimised and what is logged, (b,) each
Judge = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Model:
    """What runs once for a slice: the judges by name, and the tower that they stand on, if they stand on one."""

    judges: Mapping[str, Judge]
    embed: Callable[[Tensor], Tensor] | None = None


def reward_loss(ctx: Context, x0: Tensor, batch: Batch) -> Loss:
    """L_reward of clean latents x0 (B, C, H, W); logs each reward's mean and the norm of its gradient at the pixels."""
    assert ctx.feedback is not None, "a stage that uses rewards needs a run that has some"
    rewards = ctx.feedback.rewards

    def hinge(reward: WeightedReward) -> Judge:
        def judge(seen: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            score = reward.score(seen, batch.prompts[rows])
            return reward.weight * functional.relu(reward.alpha - score), score

        return judge

    towers = dict.fromkeys(reward.embed for reward in rewards.values() if reward.embed is not None)
    models = [_Model({name: hinge(reward) for name, reward in rewards.items() if reward.embed == tower}, tower) for tower in towers]
    models += [_Model({name: hinge(reward)}) for name, reward in rewards.items() if reward.embed is None]
    return _judged(ctx.feedback, x0, models, prefix="reward_")


def perceptual_loss(ctx: Context, x0: Tensor, batch: Batch) -> Loss:
    """L_perceptual of clean latents x0 (B, C, H, W); logs it and the norm of its gradient at the pixels."""
    assert ctx.feedback is not None and ctx.feedback.segment is not None, "a stage that uses instances needs a run with a segmenter"
    segment = ctx.feedback.segment

    def judge(images: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        loss = segment(images, batch.instances[rows])
        return loss, loss

    return _judged(ctx.feedback, x0, [_Model({"perceptual": judge})])


def _judged(feedback: Feedback, x0: Tensor, models: Sequence[_Model], prefix: str = "") -> Loss:
    """The sum of what judges minimise of images of x0, a mean over samples, with its gradient in x0; logs <prefix><name>, grad_<name>."""
    clean = x0.detach().float()
    value, gradient, logs = clean.new_zeros(()), torch.zeros_like(clean), {}
    for start in range(0, len(clean), feedback.slice):
        rows = slice(start, start + feedback.slice)
        part, gradient[rows], seen = _slice_loss(feedback, clean, rows, models, prefix)
        value = value + part
        for name, log in seen.items():
            logs[name] = logs.get(name, 0) + log
    logs = {name: log.sqrt() if name.startswith("grad_") else log for name, log in logs.items()}
    surrogate = (gradient * x0).sum()  # whose gradient in x0 is that of the loss
    return Loss(value + (surrogate - surrogate.detach()), logs)


@torch.enable_grad()
def _slice_loss(
    feedback: Feedback, clean: Tensor, rows: slice, models: Sequence[_Model], prefix: str
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The slice's part of the loss, its gradient in the latents, and its part of each log (of a norm: of its square)."""
    share, latents = 1 / len(clean), clean[rows].requires_grad_()
    images = feedback.decode(latents)
    value, at_pixels, logs = clean.new_zeros(()), torch.zeros_like(images), {}
    for model in models:
        pixels = images.detach().requires_grad_()
        seen = pixels if model.embed is None else model.embed(pixels)
        for left, (name, judge) in zip(reversed(range(len(model.judges))), model.judges.items(), strict=True):
            minimised, logged = judge(seen, rows)
            loss = share * minimised.sum()
            (at_one,) = torch.autograd.grad(loss, pixels, retain_graph=left > 0)
            value, at_pixels = value + loss.detach(), at_pixels + at_one
            logs |= {f"{prefix}{name}": share * logged.detach().sum(), f"grad_{name}": at_one.square().sum()}
    (at_latents,) = torch.autograd.grad(images, latents, at_pixels)
    return value, at_latents, logs
