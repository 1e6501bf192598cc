"""Copies of tensors in the host's memory, so that a checkpoint can be written while training changes the originals."""

import torch
from torch import Tensor


class HostCopies:
    """Float32 copies by key, in pinned memory where `device` is a GPU; a copy lasts until the next one of its key.

    The memory stays allocated: pages that are new to a process cost more than what is copied to them.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._memory: dict[str, Tensor] = {}

    def take(self, key: str, value: Tensor) -> Tensor:
        """The copy; complete after `wait`."""
        if key not in self._memory:
            self._memory[key] = torch.empty(value.shape, dtype=torch.float32, pin_memory=self._device.type == "cuda")
        return self._memory[key].copy_(value.detach(), non_blocking=True)

    def wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
