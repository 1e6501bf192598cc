"""The processes of a command as the launcher started them, and what they tell each other."""

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from torch import Tensor
from transformers.integrations import unset_hf_deepspeed_config

from hyper_sd.launcher import CONFIGS, Launch

_GRACE_S = 60.0  # the watchdog (watchdog.py) can say more than a collective that times out, so it comes first


class Processes:
    """This process among all. Raises ValueError if processes, engine or backend are not what the launcher was told.

    `cpu_threads` are torch's threads where there is no GPU; None: the cores that this process may run on, shared between those on its
    machine. Who waits for another process longer than `timeout_s` fails.
    """

    def __init__(self, cpu_threads: int | None = None, timeout_s: float = 1800.0):
        self.started = time.monotonic()
        launch = Launch.read(os.environ)
        on_cpu = not torch.cuda.is_available()
        timeout = timedelta(seconds=timeout_s + _GRACE_S)
        self.accelerator = _accelerator(launch, on_cpu, timeout)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.verify(launch)
        if on_cpu:
            torch.set_num_threads(cpu_threads or max(1, _cores() // _neighbours(self.world_size)))
        self.device = self.accelerator.device
        self._votes = None
        if self.world_size > 1 and dist.get_backend() != "gloo":
            self._votes = dist.new_group(backend="gloo", timeout=timeout)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def engine_type(self) -> str:
        """plain, zero1, zero2 or zero3, as accelerate set it up."""
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            return "plain"
        plugin: Any = self.accelerator.state.deepspeed_plugin
        return f"zero{plugin.zero_stage}"

    @property
    def facts(self) -> dict[str, Any]:
        """Engine type, world size and backend as found at run time."""
        return {"type": self.engine_type, "world_size": self.world_size, "backend": _backend(), "device": self.device.type}

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
        """The mean of a scalar over processes, on their device."""
        value = value.detach().to(self.device, torch.float32, copy=True)
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process, so that all decide alike. Hosts ask each other; no device is waited for."""
        return self.any_each(flag)[0]

    def any_each(self, *flags: bool) -> list[bool]:
        """`any` of several flags, at the cost of one."""
        if self.world_size == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.float32)
        dist.all_reduce(votes, group=self._votes)
        return (votes > 0).tolist()

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all processes hold the same tensors, by the norm of each; alike in every process."""
        if self.world_size == 1:
            return True
        lowest = torch.stack(torch._foreach_norm([tensor.detach() for tensor in tensors]))
        highest = lowest.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return torch.equal(lowest, highest)

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()

    def verify(self, launch: Launch) -> None:
        """Raise ValueError if this is not what the launcher was told: accelerate falls back to less without a word."""
        if self.world_size != launch.num_processes:
            raise ValueError(f"the launcher started {launch.num_processes} processes but {self.world_size} joined; use one of {CONFIGS}")
        if self.engine_type != launch.engine:
            raise ValueError(
                f"the launcher asks for the engine {launch.engine} but accelerate set up {self.engine_type}; use one of {CONFIGS}"
            )
        if _backend() not in (None, expected := "nccl" if torch.cuda.is_available() else "gloo"):
            raise ValueError(f"the processes talk over {_backend()}, expected {expected}; use one of {CONFIGS}")


def _accelerator(launch: Launch, on_cpu: bool, timeout: timedelta) -> Accelerator:
    _join_again("gloo" if on_cpu else "nccl", timeout)
    if not launch.zero_stage:
        return Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)])
    if on_cpu:  # Accelerator(cpu=True) would leave DeepSpeed out
        os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu")
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=timeout)])
    unset_hf_deepspeed_config()  # else transformers would divide every text encoder it loads from now on, and nothing would join it
    return accelerator


def _join_again(backend: str, timeout: timedelta) -> None:
    """Join the others where a launcher has restarted all: it keeps its store, with the addresses of those that have died in it."""
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if life == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=dist.PrefixStore(f"life/{life}", store), rank=rank, world_size=world_size, timeout=timeout)


def _cores() -> int:
    """Those that this process may run on: fewer than the machine's under Slurm or taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _neighbours(world_size: int) -> int:
    """Processes on this machine, of all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def _backend() -> str | None:
    return dist.get_backend() if dist.is_initialized() else None
