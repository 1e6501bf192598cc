"""Roles: tuples of LoRA adapter names on one frozen network. The empty tuple is the teacher.

Switching a role never touches `requires_grad`: peft's `set_adapter` does, and between a forward and its backward that loses
every gradient without an error.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hyper_sd.randomness import Purpose, generator

Role = tuple[str, ...]

LCM_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Rank, alpha and target modules of every adapter; an adapter adds (alpha / rank) B A to the layers it targets."""

    rank: int = 64
    alpha: float = 8.0
    targets: tuple[str, ...] = LCM_TARGETS

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def _ends_with(path: str, targets: Sequence[str]) -> bool:
    return any(f".{path}".endswith(f".{target}") for target in targets)


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight.to(input.dtype))


class _Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight.to(input.dtype), None)


_RUNS_IN_INPUT_DTYPE: dict[type, Any] = {nn.Linear: _Linear, nn.Conv2d: _Conv2d}


class Roles:
    """The adapters of one frozen network, by name; all have one LoraSpec, and all start equal.

    Those in `encoder_only` leave the up blocks alone.

    Adapter weights are float32 whatever the network's dtype, and compute in the network's: float32 products on a bf16 network
    would be many times slower and keep float32 copies of its activations.
    """

    def __init__(self, net: nn.Module, spec: LoraSpec, adapters: Sequence[str], *, encoder_only: Sequence[str] = (), seed: int = 0):
        self.net, self.spec, self.adapters = net, spec, tuple(adapters)
        if any(isinstance(module, LoraLayer) for module in net.modules()):
            raise ValueError("the network already has adapters; name all of them in one Roles")
        net.requires_grad_(False)
        everywhere = list(spec.targets)
        encoder = [p for p, _ in net.named_modules() if p.startswith(("down_blocks.", "mid_block.")) and _ends_with(p, spec.targets)]
        with warnings.catch_warnings(), next(net.parameters()).device:
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
            for name in self.adapters:
                targets = encoder if name in encoder_only else everywhere
                config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=targets)  # pyright: ignore[reportArgumentType]
                inject_adapter_in_model(config, net, adapter_name=name)
        layers: dict[str, Any] = {path: m for path, m in net.named_modules() if isinstance(m, LoraLayer)}
        self._role: Role = ()
        self._active: list[str] = []  # one list for every layer, so that a switch costs nothing; peft reads it at each forward
        for layer in layers.values():
            layer._active_adapter = self._active
            layer.cast_input_dtype_enabled = False
            for module in (*layer.lora_A.values(), *layer.lora_B.values()):
                module.__class__ = _RUNS_IN_INPUT_DTYPE[type(module)]
        self._seed = seed
        self._modules: dict[str, nn.Module] = {}
        self._tensors: dict[str, dict[str, nn.Parameter]] = {
            name: {
                f"{path}.{side}.weight": getattr(layer, side)[name].weight
                for path, layer in layers.items()
                for side in ("lora_A", "lora_B")
                if name in getattr(layer, side)
            }
            for name in self.adapters
        }
        for name in self.adapters:
            self.reset(name)
        net.requires_grad_(False)

    def attach(self, modules: Mapping[str, nn.Module]) -> None:
        """Modules that are trained beside the adapters, by names that are then like an adapter's; those attached before are dropped.

        `use` knows adapters only: who needs a module's output calls `module(name)`.
        """
        if clash := sorted(modules.keys() & set(self.adapters)):
            raise ValueError(f"{clash} are names of adapters")
        device = next(self.net.parameters()).device
        self._modules = {name: module.to(device).requires_grad_(False) for name, module in modules.items()}

    def module(self, name: str) -> nn.Module:
        return self._modules[name]

    @property
    def attached(self) -> tuple[str, ...]:
        """The names of the attached modules."""
        return tuple(self._modules)

    @contextmanager
    def use(self, role: Role) -> Iterator[None]:
        """Run the network with the sum of the role's adapters; the previous role is active again on exit."""
        previous = self._role
        self._activate(role)
        try:
            yield
        finally:
            self._activate(previous)

    @property
    def active(self) -> Role:
        """The role the network runs with now."""
        return self._role

    def params(self, role: Role) -> list[nn.Parameter]:
        """The parameters of the role's adapters and modules, in a fixed order."""
        return [p for name in role for p in self.tensors(name).values()]

    def trainable(self, role: Role) -> None:
        """Let exactly the role's adapters and modules require gradients."""
        for module in (self.net, *self._modules.values()):
            module.requires_grad_(False)
        for param in self.params(role):
            param.requires_grad_(True)

    def tensors(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """`<module path>.lora_A.weight` and `.lora_B.weight` of one adapter, or the parameters of an attached module, not copied.

        Raises KeyError for an unknown name.
        """
        if adapter in self._modules:
            return dict(self._modules[adapter].named_parameters())
        if adapter not in self._tensors:
            raise KeyError(f"no adapter {adapter!r}; there are {list(self.adapters)}")
        return self._tensors[adapter]

    def state_dict(self, adapter: str) -> dict[str, Tensor]:
        """A float32 CPU copy of one adapter, keyed as in `tensors`."""
        return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in self.tensors(adapter).items()}

    @torch.no_grad()
    def load_state_dict(self, adapter: str, state: Mapping[str, Tensor]) -> None:
        """Copy tensors into an adapter. Raises ValueError, before anything is copied, unless names and shapes match exactly."""
        own = self.tensors(adapter)
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise ValueError(
                f"the LoRA does not fit this network: {len(missing)} of its {len(own)} tensors are missing (first: {missing[:1]}) and "
                f"{len(unknown)} are unknown (first: {unknown[:1]}); check teacher.path and lora.targets"
            )
        for name, param in own.items():
            if param.shape != state[name].shape:
                raise ValueError(
                    f"the LoRA does not fit: {name} has shape {tuple(state[name].shape)}, expected {tuple(param.shape)}; "
                    "check lora.rank and teacher.path"
                )
        for name, param in own.items():
            param.copy_(state[name])

    @torch.no_grad()
    def copy(self, src: str, dst: str) -> None:
        torch._foreach_copy_(self._values(dst), self._values(src))

    @torch.no_grad()
    def ema(self, src: str, dst: str, decay: float) -> None:
        """dst <- decay dst + (1 - decay) src."""
        torch._foreach_lerp_(self._values(dst), self._values(src), 1 - decay)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass with the role that was active in the forward pass."""
        self.net.enable_gradient_checkpointing(gradient_checkpointing_func=self._checkpoint)  # pyright: ignore[reportCallIssue]

    def _checkpoint(self, module: Callable[..., Any], *args: Any) -> Any:
        run = partial(self._run_as, self._role, module)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)  # nothing in the network is random

    def _run_as(self, role: Role, module: Callable[..., Any], *args: Any) -> Any:
        with self.use(role):
            return module(*args)

    def _values(self, adapter: str) -> list[Tensor]:
        return list(self.tensors(adapter).values())

    def _activate(self, role: Role) -> None:
        if unknown := set(role) - set(self.adapters):
            raise KeyError(f"no adapter {sorted(unknown)}; there are {list(self.adapters)}")
        self._active[:] = role
        self._role = role

    @torch.no_grad()
    def reset(self, adapter: str) -> None:
        """A is uniform in +-1/sqrt(fan in), peft's default, from (seed, tensor index); B is zero, so a fresh adapter is the teacher."""
        for index, (name, param) in enumerate(self.tensors(adapter).items()):
            param.data = torch.zeros(param.shape, device=param.device, dtype=torch.float32)
            if ".lora_A." in name and not param.is_meta:
                bound = param[0].numel() ** -0.5
                draw = torch.rand(param.shape, generator=generator(self._seed, Purpose.INIT, index))
                param.copy_((2 * draw - 1) * bound)
