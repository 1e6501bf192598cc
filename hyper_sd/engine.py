"""What trains adapters on any number of processes: backward, gradient reduction, clipping, one optimizer a role.

The network is never wrapped. Data parallelism is one mean over processes of the trained adapters' gradients, in `step`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hyper_sd.config import EngineConfig, LrSchedulerConfig, OptimizerConfig
from hyper_sd.processes import Processes
from hyper_sd.roles import Role


@dataclass
class _Trained:
    """One role's named parameters, optimizer and learning rate schedule."""

    params: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    scheduler: LambdaLR
    max_grad_norm: float | None
    updates: int = 0


class Engine(Processes):
    """The processes of a run, with what trains adapters in them."""

    def __init__(self, config: EngineConfig):
        super().__init__(config.cpu_threads, config.timeout_seconds)
        self.config = config
        self._trained: dict[Role, _Trained] = {}

    def micro_batches(self, batch_size: int, start: int) -> list[range]:
        """This process's micro-batches of the global batch at positions start .. start + batch_size - 1.

        Raises ValueError unless processes times accumulation divide the global batch.
        """
        parts = self.world_size * self.config.accumulation
        if batch_size % parts:
            raise ValueError(
                f"data.batch_size={batch_size} counts all {self.world_size} processes and engine.accumulation={self.config.accumulation} "
                f"micro-batches, and must be a multiple of {parts}; try {-(-batch_size // parts) * parts}"
            )
        size = batch_size // parts
        offsets = range(self.rank * size, batch_size, self.world_size * size)
        return [range(start + offset, start + offset + size) for offset in offsets]

    def train(
        self, role: Role, params: Mapping[str, nn.Parameter], optimizer: OptimizerConfig, schedule: LrSchedulerConfig, num_updates: int
    ) -> None:
        """Start a fresh AdamW and learning rate schedule for a role; the optimizers of an earlier stage must have been dropped."""
        adamw = torch.optim.AdamW(
            params.values(), lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
        )
        scheduler = get_scheduler(schedule.name, adamw, num_warmup_steps=schedule.warmup_steps, num_training_steps=num_updates)
        self._trained[role] = _Trained(dict(params), adamw, scheduler, optimizer.max_grad_norm)

    def drop_optimizers(self) -> None:
        self._trained.clear()

    def backward(self, role: Role, loss: Tensor) -> None:
        """Add the gradient of `loss`, weighted as one micro-batch, to this role's adapters and to nothing else."""
        (loss / self.config.accumulation).backward(inputs=list(self._trained[role].params.values()))

    def step(self, role: Role) -> Tensor:
        """Mean of the gradients over processes, clipping, one optimizer step. Returns the gradient norm before clipping.

        Where the norm is not finite, in all processes alike then, the update is skipped; the learning rate schedule goes on.
        """
        trained = self._trained[role]
        params = list(trained.params.values())
        self._reduce_gradients(params)
        limit = trained.max_grad_norm if trained.max_grad_norm is not None else float("inf")
        norm = nn.utils.clip_grad_norm_(params, limit)
        step_where(norm.isfinite(), trained.optimizer, params)
        trained.scheduler.step()
        trained.optimizer.zero_grad(set_to_none=True)
        trained.updates += 1
        return norm

    def learning_rate(self, role: Role) -> float:
        return float(self._trained[role].scheduler.get_last_lr()[0])

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Adam moments as `<role>/<moment>/<parameter>` and the number of updates by role."""
        tensors = {
            f"{'+'.join(role)}/{moment}/{name}": trained.optimizer.state[param][moment].cpu()
            for role, trained in self._trained.items()
            if trained.updates
            for name, param in trained.params.items()
            for moment in ("exp_avg", "exp_avg_sq")
        }
        return tensors, {"+".join(role): trained.updates for role, trained in self._trained.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor], updates: Mapping[str, int]) -> None:
        """Continue where `state_dict` was taken; the learning rate follows from the number of updates."""
        for role, trained in self._trained.items():
            key = "+".join(role)
            trained.updates = updates[key]
            for name, param in trained.params.items() if trained.updates else ():
                trained.optimizer.state[param] = {
                    "step": torch.tensor(float(trained.updates)),
                    **{m: tensors[f"{key}/{m}/{name}"].to(param.device) for m in ("exp_avg", "exp_avg_sq")},
                }
            trained.scheduler.last_epoch = trained.updates
            rates = [
                base * factor(trained.updates)
                for base, factor in zip(trained.scheduler.base_lrs, trained.scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(trained.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            trained.scheduler._last_lr = rates

    def _reduce_gradients(self, params: list[nn.Parameter]) -> None:
        if self.world_size == 1:
            return
        gradients = [param.grad for param in params if param.grad is not None]
        assert len(gradients) == len(params), "a trained adapter received no gradient: the objective's loss does not depend on all of it"
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world_size
        for param, piece in zip(params, flat.split([p.numel() for p in params]), strict=True):
            param.grad = piece.view_as(param)


def step_where(good: Tensor, optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    """One optimizer step where `good`; elsewhere parameters and moments keep their values and only the count of steps moves on.

    Decided on the device of `good`, so that the host does not wait for an accelerator.
    """
    if good.device.type == "cpu" and good:
        optimizer.step()
        return
    before = [
        (param, param.detach().clone(), {m: optimizer.state[param][m].clone() for m in _moments(optimizer, param)}) for param in params
    ]
    optimizer.step()
    for param, value, moments in before:
        torch.where(good, param.detach(), value, out=param.data)
        for name in _moments(optimizer, param):
            now = optimizer.state[param][name]
            torch.where(good, now, moments.get(name, torch.zeros_like(now)), out=now)


def _moments(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> list[str]:
    """Those an optimizer has for a parameter: none before its first step."""
    return [name for name in ("exp_avg", "exp_avg_sq") if name in optimizer.state[param]]
