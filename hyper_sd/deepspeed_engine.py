"""DeepSpeed ZeRO through accelerate: one DeepSpeed engine for each trained role, on a holder of nothing but its parameters.

ZeRO-1 shards Adam's moments, ZeRO-2 the gradients too. ZeRO-3 also shards the frozen network, through an engine of its own without
an optimizer; adapters stay whole in every process, so that an EMA, an export or a checkpoint of them needs no collective.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from hyper_sd.config import EngineConfig
from hyper_sd.engine import Engine, Trained
from hyper_sd.roles import Role

BUCKET = 2**24  # numbers in a reduce; DeepSpeed's own 5e8 would allocate 2 GB for each role


class DeepSpeedEngine(Engine):
    """Optimizers, gradients and, in stage 3, the frozen network in parts, one in each process."""

    def __init__(self, config: EngineConfig):
        super().__init__(config)
        plugin: Any = self.accelerator.state.deepspeed_plugin
        self._stage: int = plugin.zero_stage
        self._launched = copy.deepcopy(plugin.deepspeed_config)
        self._engines: dict[Role, Any] = {}
        self.collective_forward = self._stage == 3

    @contextmanager
    def sharding(self, net: nn.Module) -> Iterator[None]:
        if self._stage < 3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        self._prepare(net, stage=3, bf16={"enabled": next(net.parameters()).dtype == torch.bfloat16})
        with GatheredParameters(list(net.parameters())):  # adapters take their sizes from the weights
            yield

    def drop_optimizers(self) -> None:
        for engine in self._engines.values():
            engine.destroy()  # its hooks would go on taking gradients
        self._engines.clear()
        super().drop_optimizers()

    def _start(self, role: Role, params: list[nn.Parameter], adamw: AdamW, max_grad_norm: float | None) -> Optimizer:
        for param in params:
            param.requires_grad_(True)  # DeepSpeed hooks on to those alone
        communication = {"communication_data_type": "bf16"} if self.config.reduce_dtype == "bf16" else {}
        stage = min(self._stage, 2)
        engine = self._prepare(nn.ParameterList(params), adamw, stage=stage, gradient_clipping=max_grad_norm or 0.0, **communication)
        self._engines[role] = engine
        return engine.optimizer.optimizer

    def _backward(self, role: Role, loss: Tensor, *, last: bool) -> None:
        engine = self._engines[role]
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss, scale_wrt_gas=False)

    def _step(self, role: Role) -> Tensor:
        engine, trained = self._engines[role], self._trained[role]
        engine.step()
        if not engine.optimizer.overflow:
            return torch.as_tensor(engine.get_global_grad_norm()).to(self.device)
        (part,) = trained.optimizer.param_groups[0]["params"]  # DeepSpeed has skipped the update, and Adam's count with it
        if part in trained.optimizer.state:
            trained.optimizer.state[part]["step"] += 1
        else:
            self._make_state(trained, trained.updates + 1)
        return torch.full((), float("nan"), device=self.device)

    def _moment(self, role: Role, param: nn.Parameter, moment: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        value = safe_get_full_optimizer_state(param, moment)
        assert value is not None, "the parameter belongs to an engine"
        return value

    def _load_moments(self, role: Role, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        trained = self._trained[role]
        (part,) = trained.optimizer.param_groups[0]["params"]
        self._make_state(trained, trained.updates)
        for name, param in trained.params.items():
            for moment, tensors in moments.items():
                safe_set_full_optimizer_state(param, tensors[name].to(part.device), moment)

    def _make_state(self, trained: Trained, updates: int) -> None:
        """Adam makes its state at its first step: one that moves nothing, after which its count is set right."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        optimizer = trained.optimizer
        (group,) = optimizer.param_groups
        (part,) = group["params"]
        gradient, part.grad = part.grad, torch.zeros_like(part)
        rate, group["lr"] = group["lr"], 0.0
        optimizer.step()
        group["lr"], part.grad = rate, gradient
        steps = optimizer.state[part]["step"]
        optimizer.state[part]["step"] = torch.full_like(steps, updates) if isinstance(steps, Tensor) else updates
        lazy_init_hp_params_optimizer_state(list(trained.params.values()), part, optimizer.state)  # else a save would find no moments

    def _prepare(self, module: nn.Module, adamw: AdamW | None = None, *, stage: int, **changes: Any) -> Any:
        """A DeepSpeed engine with what the launcher was told, but for its stage and the changes."""
        import deepspeed

        accelerator = Accelerator()  # one for each engine, as accelerate asks for; all share this process's state
        plugin: Any = accelerator.state.deepspeed_plugin
        config = plugin.deepspeed_config
        config.clear()
        config.update(copy.deepcopy(self._launched))
        config.update({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "train_batch_size": self.world_size})
        config.update({"bf16": {"enabled": False}, "fp16": {"enabled": False}, **changes})
        zero = config.setdefault("zero_optimization", {})
        zero["stage"] = stage
        zero.setdefault("reduce_bucket_size", BUCKET)
        zero.setdefault("allgather_bucket_size", BUCKET)
        prepared = accelerator.prepare(module) if adamw is None else accelerator.prepare(module, adamw)[0]
        if not isinstance(prepared, deepspeed.DeepSpeedEngine) or prepared.zero_optimization_stage() != stage:
            raise RuntimeError(f"accelerate made a {type(prepared).__name__} where ZeRO-{stage} was asked for")
        return prepared
