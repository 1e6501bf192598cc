"""The processes of a command as the launcher started them, and what they tell each other."""

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

_GRACE_S = 60.0  # the watchdog (watchdog.py) can say more than a collective that times out, so it comes first


class Processes:
    """This process among all. Raises RuntimeError if fewer joined than the launcher started.

    `cpu_threads` are torch's threads where there is no GPU; None: the machine's cores, shared between its processes. Who waits for
    another process longer than `timeout_s` fails.
    """

    def __init__(self, cpu_threads: int | None = None, timeout_s: float = 1800.0):
        self.started = time.monotonic()
        on_cpu = not torch.cuda.is_available()
        limit = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s + _GRACE_S))
        self.accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[limit])
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world_size != expected:
            raise RuntimeError(
                f"the launcher started {expected} processes but {self.world_size} joined; use one of configs/accelerate/*.yaml "
                "with `accelerate launch --config_file`"
            )
        if on_cpu:
            torch.set_num_threads(cpu_threads or max(1, (os.cpu_count() or 1) // self.world_size))
        self.device = self.accelerator.device
        self._votes = dist.new_group(backend="gloo") if self.world_size > 1 and dist.get_backend() != "gloo" else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def facts(self) -> dict[str, Any]:
        """Engine type, world size and backend as found at run time."""
        backend = dist.get_backend() if dist.is_initialized() else None
        return {"type": "plain", "world_size": self.world_size, "backend": backend, "device": self.device.type}

    def share(self, total: int) -> slice:
        """This process's part of `total` items; the parts follow each other in the order of ranks."""
        return slice(self.rank * total // self.world_size, (self.rank + 1) * total // self.world_size)

    def join(self, part: Tensor, total: int) -> Tensor:
        """All processes' parts (len(share(total)), ...) in one tensor (total, ...), on the CPU and the same everywhere."""
        if self.world_size == 1:
            return part.cpu()
        whole = torch.zeros((total, *part.shape[1:]), dtype=part.dtype, device=self.device)
        whole[self.share(total)] = part.to(self.device)
        dist.all_reduce(whole)
        return whole.cpu()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over processes."""
        value = value.detach().float().clone()
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process, so that all decide alike. Hosts ask each other; no device is waited for."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor(float(flag))
        dist.all_reduce(votes, group=self._votes)
        return votes.item() > 0

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()
