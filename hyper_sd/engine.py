"""What trains adapters on any number of processes: backward, gradient reduction, clipping, one optimizer a role.

`Engine` is what the loop sees; plain_engine.py and deepspeed_engine.py are the two ways to do it. The network is never wrapped.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hyper_sd.config import EngineConfig, LrSchedulerConfig, OptimizerConfig
from hyper_sd.processes import Processes
from hyper_sd.roles import Role

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Trained:
    """One role's named parameters and how they are updated; `optimizer` is the one whose groups hold the learning rate."""

    params: dict[str, nn.Parameter]
    max_grad_norm: float | None
    optimizer: Optimizer
    scheduler: LambdaLR
    updates: int = 0
    pending: int = 0  # micro-batches since the last update


class Engine(Processes, ABC):
    """The processes of a run, with what trains adapters in them."""

    collective_forward = False  # whether a call of the network is answered only where every process makes it

    def __init__(self, config: EngineConfig):
        super().__init__(config.cpu_threads, config.timeout_seconds)
        self.config = config
        self._trained: dict[Role, Trained] = {}

    def micro_batches(self, batch_size: int, start: int, key: str = "data") -> list[range]:
        """This process's micro-batches of the global batch at positions start .. start + batch_size - 1.

        Raises ValueError, naming <key>.batch_size, unless processes times accumulation divide the global batch.
        """
        parts = self.world_size * self.config.accumulation
        if batch_size % parts:
            raise ValueError(
                f"{key}.batch_size={batch_size} counts all {self.world_size} processes and engine.accumulation={self.config.accumulation} "
                f"micro-batches, and must be a multiple of {parts}; try {-(-batch_size // parts) * parts}"
            )
        size = batch_size // parts
        offsets = range(self.rank * size, batch_size, self.world_size * size)
        return [range(start + offset, start + offset + size) for offset in offsets]

    @contextmanager
    def sharding(self, net: nn.Module) -> Iterator[None]:
        """Inside, adapters are put on the frozen network; afterwards each process may hold a part of it."""
        yield

    def train(
        self, role: Role, params: Mapping[str, nn.Parameter], optimizer: OptimizerConfig, schedule: LrSchedulerConfig, num_updates: int
    ) -> None:
        """Start a fresh AdamW and learning rate schedule for a role from what its parameters are now.

        The optimizers of an earlier stage must have been dropped.
        """
        adamw = AdamW(params.values(), lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay)
        inner = self._start(role, list(params.values()), adamw, optimizer.max_grad_norm)
        scheduler = get_scheduler(schedule.name, inner, num_warmup_steps=schedule.warmup_steps, num_training_steps=num_updates)
        self._trained[role] = Trained(dict(params), optimizer.max_grad_norm, inner, scheduler)

    def drop_optimizers(self) -> None:
        self._trained.clear()

    def begin(self, role: Role) -> None:
        """The next losses are this role's: of all that is trained, nothing else gets a gradient."""
        for other, trained in self._trained.items():
            for param in trained.params.values():
                param.requires_grad_(other == role)

    def backward(self, role: Role, loss: Tensor) -> None:
        """Add the gradient of `loss`, weighted as one micro-batch, to this role's adapters and to nothing else."""
        trained = self._trained[role]
        trained.pending += 1
        self._backward(role, loss / self.config.accumulation, last=trained.pending == self.config.accumulation)

    def step(self, role: Role) -> Tensor:
        """Mean of the gradients over processes, clipping, one optimizer step. Returns the gradient norm before clipping.

        Where the norm is not finite, in all processes alike then, the update is skipped; the learning rate schedule goes on.
        """
        trained = self._trained[role]
        norm = self._step(role)
        trained.scheduler.step()
        trained.updates += 1
        trained.pending = 0
        return norm

    def learning_rate(self, role: Role) -> float:
        return float(self._trained[role].scheduler.get_last_lr()[0])

    def state_dict(self, copy: Callable[[str, Tensor], Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """`copy(key, value)` of Adam's moments by the keys `<role>/<moment>/<parameter>`, and the number of updates by role.

        Called in every process; the moments, gathered one by one, are copied in the main process alone.
        """
        tensors: dict[str, Tensor] = {}
        for role, trained in self._trained.items():
            for name, param in trained.params.items() if trained.updates else ():
                for moment in MOMENTS:
                    value, key = self._moment(role, param, moment), f"{'+'.join(role)}/{moment}/{name}"
                    if self.is_main:
                        tensors[key] = copy(key, value)
        return tensors, {"+".join(role): trained.updates for role, trained in self._trained.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor], updates: Mapping[str, int]) -> None:
        """Continue where `state_dict` was taken, by whatever engine and in however many processes.

        The learning rate follows from the number of updates.
        """
        for role, trained in self._trained.items():
            key = "+".join(role)
            trained.updates = updates[key]
            if trained.updates:
                self._load_moments(role, {m: {name: tensors[f"{key}/{m}/{name}"] for name in trained.params} for m in MOMENTS})
            trained.scheduler.last_epoch = trained.updates
            rates = [
                base * factor(trained.updates)
                for base, factor in zip(trained.scheduler.base_lrs, trained.scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(trained.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            trained.scheduler._last_lr = rates

    @abstractmethod
    def _start(self, role: Role, params: list[nn.Parameter], adamw: AdamW, max_grad_norm: float | None) -> Optimizer:
        """Take a role's parameters and optimizer; returns the optimizer whose groups hold the learning rate."""

    @abstractmethod
    def _backward(self, role: Role, loss: Tensor, *, last: bool) -> None:
        """Add one micro-batch's gradient; `last` before the update."""

    @abstractmethod
    def _step(self, role: Role) -> Tensor: ...

    @abstractmethod
    def _moment(self, role: Role, param: nn.Parameter, moment: str) -> Tensor: ...

    @abstractmethod
    def _load_moments(self, role: Role, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set the Adam moments, by moment and parameter, and Adam's own count of updates."""


def step_where(good: Tensor, optimizer: Optimizer, params: Sequence[nn.Parameter]) -> None:
    """One optimizer step where `good`; elsewhere parameters and moments keep their values and only the count of steps moves on.

    Decided on the device of `good`, so that the host does not wait for an accelerator, and for all parameters at once, which would else
    take thousands of small kernels.
    """
    if good.device.type == "cpu" and good:
        optimizer.step()
        return
    # a clone, because one tensor alone is flattened to itself
    before = {name: _flatten_dense_tensors(values).clone() for name, values in _state(optimizer, params).items()}
    optimizer.step()
    for name, values in _state(optimizer, params).items():
        now = _flatten_dense_tensors(values)
        torch.where(good, now, before.get(name, now.new_zeros(())), out=now)
        torch._foreach_copy_(values, _unflatten_dense_tensors(now, values))


def _state(optimizer: Optimizer, params: Sequence[nn.Parameter]) -> dict[str, list[Tensor]]:
    """What a step changes: the parameters, and Adam's moments, of which there are none before the first step."""
    moments = {name: [optimizer.state[param][name] for param in params] for name in MOMENTS if name in optimizer.state[params[0]]}
    return {"params": [param.detach() for param in params], **moments}
