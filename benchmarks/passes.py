"""The network passes of a stage's steps: recorded from the real calls, counted, and repeated with nothing between them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hyper_sd.denoiser import Denoiser
from hyper_sd.features import encoder_features
from hyper_sd.guidance import Cond
from hyper_sd.instances import Instances
from hyper_sd.objective import Batch, Context, Objective, Shared, Stage, WeightedReward
from hyper_sd.roles import Role


@dataclass
class Pass:
    """One call of the network; `encoder_only` if it ended behind the middle block."""

    role: Role
    samples: int
    gradient: bool
    encoder_only: bool = False


def cycle(objectives: Sequence[Objective]) -> int:
    """Steps after which the turns of the objectives repeat."""
    return max(objective.every for objective in objectives)


def record(stage: Stage, ctx: Context, batch: Batch) -> list[Pass]:
    """The network's calls in one cycle of the stage."""
    passes: list[Pass] = []
    forward = ctx.denoiser.forward

    def noted(x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        call = Pass(ctx.roles.active, len(x_t), torch.is_grad_enabled(), encoder_only=True)
        passes.append(call)
        output = forward(x_t, t, cond)
        call.encoder_only = False
        return output

    noting = replace(ctx, denoiser=replace(ctx.denoiser, forward=noted))
    objectives = stage.objectives(noting)
    for step in range(cycle(objectives)):
        shared: Shared = {}
        for objective in objectives:
            if step % objective.every == 0:
                objective.loss(batch, shared)
    return passes


def judged(stage: Stage, ctx: Context, batch: Batch) -> dict[str, float]:
    """Decodings, scores of rewards, and images that a segmenter judged, a sample in one cycle of the stage."""
    counts, feedback = {"decoded": 0, "scored": 0, "segmented": 0}, ctx.feedback
    if feedback is None:
        return dict.fromkeys(counts, 0.0)

    def decode(x0: torch.Tensor) -> torch.Tensor:
        counts["decoded"] += len(x0)
        return feedback.decode(x0)

    def scoring(reward: WeightedReward) -> WeightedReward:
        def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            counts["scored"] += len(images)
            return reward.score(images, prompts)

        return replace(reward, score=score)

    def segment(images: torch.Tensor, instances: Sequence[Instances]) -> torch.Tensor:
        assert feedback.segment is not None
        counts["segmented"] += len(images)
        return feedback.segment(images, instances)

    rewards = {name: scoring(reward) for name, reward in feedback.rewards.items()}
    record(stage, replace(ctx, feedback=replace(feedback, decode=decode, rewards=rewards, segment=segment)), batch)
    return {name: count / len(batch.x0) for name, count in counts.items()}


def forward_equivalents(passes: Sequence[Pass], batch_size: int) -> float:
    """Forward passes a sample; a backward pass through the frozen network is one more, and half a network counts as a whole."""
    return sum(call.samples * (1 + call.gradient) for call in passes) / batch_size


def repeat(passes: Sequence[Pass], denoiser: Denoiser, batch: Batch) -> None:
    """The same passes with nothing between them. A gradient goes to the role's adapters, or to the input where they are not trained."""
    for call in passes:
        times = call.samples // len(batch.x0)
        x = torch.cat([batch.x0] * times)
        t = torch.full((len(x),), 499, device=x.device)
        cond = tuple(torch.cat([part] * times) for part in batch.cond)
        with torch.set_grad_enabled(call.gradient), denoiser.roles.use(call.role):
            x.requires_grad_(call.gradient and not any(p.requires_grad for p in denoiser.roles.params(call.role)))
            if call.encoder_only:
                output = encoder_features(denoiser.roles.net, lambda x=x, t=t, cond=cond: denoiser.forward(x, t, cond))[-1]
            else:
                output = denoiser.forward(x, t, cond)
            if call.gradient:
                output.sum().backward()
