"""What rewards add to a stage's loss (paper section 3.2):

    L_reward = mean over samples of sum_d weight_d relu(alpha_d - r_d(decode(x0), prompt))

One decoding serves all rewards. The gradient is taken here, a slice of the samples and a reward at a time, so that no more than the
decoder's activations of one slice and those of one reward are in memory; the network's own backward pass then starts from
dL/dx0. Decoder and rewards are float32, whatever the network's dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from hyper_sd.objective import Batch, Context, Feedback, Loss


def reward_loss(ctx: Context, x0: Tensor, batch: Batch) -> Loss:
    """L_reward of clean latents x0 (B, C, H, W); logs each reward's mean and the norm of its gradient at the pixels."""
    assert ctx.feedback is not None, "a stage that uses rewards needs a run that has some"
    feedback, clean = ctx.feedback, x0.detach().float()
    value, gradient, logs = clean.new_zeros(()), torch.zeros_like(clean), {}
    for start in range(0, len(clean), feedback.slice):
        rows = slice(start, start + feedback.slice)
        part, gradient[rows], seen = _slice_loss(feedback, clean[rows], batch.prompts[rows], 1 / len(clean))
        value = value + part
        for name, log in seen.items():
            logs[name] = logs.get(name, 0) + log
    logs = {name: log.sqrt() if name.startswith("grad_") else log for name, log in logs.items()}
    surrogate = (gradient * x0).sum()  # whose gradient in x0 is that of the loss
    return Loss(value + (surrogate - surrogate.detach()), logs)


@torch.enable_grad()
def _slice_loss(feedback: Feedback, clean: Tensor, prompts: Sequence[str], share: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The slice's part of the loss, its gradient in the latents, and its part of each log (of a norm: of its square)."""
    latents = clean.requires_grad_()
    images = feedback.decode(latents)
    value, at_pixels, logs = clean.new_zeros(()), torch.zeros_like(images), {}
    for name, reward in feedback.rewards.items():
        pixels = images.detach().requires_grad_()
        score = reward.score(pixels, prompts)
        loss = share * reward.weight * functional.relu(reward.alpha - score).sum()
        (at_one,) = torch.autograd.grad(loss, pixels)
        value, at_pixels = value + loss.detach(), at_pixels + at_one
        logs |= {f"reward_{name}": share * score.detach().sum(), f"grad_{name}": at_one.square().sum()}
    (at_latents,) = torch.autograd.grad(images, latents, at_pixels)
    return value, at_latents, logs
