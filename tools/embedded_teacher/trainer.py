"""A small resumable training loop shared by the parts of the embedded teacher."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how fast one part trains. The rate rises over `warmup` steps and falls to 1 % by a half cosine."""

    name: str
    steps: int
    lr: float
    warmup: int = 100
    ema_decay: float = 0.0
    weight_decay: float = 0.0
    save_seconds: float = 60.0


def fit(plan: Plan, model: nn.Module, loss_at: Callable[[int], Tensor], workdir: Path) -> nn.Module:
    """Minimise `loss_at(step)`, a pure function of the step and the weights; continue from the last saved step.

    Returns the model with its averaged weights (plain weights where `ema_decay` is 0).
    """
    params = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(params.values(), lr=plan.lr, betas=(0.9, 0.99), weight_decay=plan.weight_decay)
    average = {name: value.detach().clone() for name, value in params.items()}
    path = workdir / f"{plan.name}.safetensors"
    start = _load(path, params, average, optimizer)
    started = saved = time.monotonic()
    recent: list[Tensor] = []
    for step in range(start, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * _rate(plan, step)
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        decay = min(plan.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(params.values()), 1 - decay)
        recent.append(loss.detach())
        if (step + 1) % 100 == 0:
            pace = (time.monotonic() - started) / (step + 1 - start)
            print(f"{plan.name} {step + 1}/{plan.steps} loss {torch.stack(recent).mean():.5f} {pace:.3f} s/step", flush=True)
            recent = []
        if time.monotonic() - saved > plan.save_seconds or step + 1 == plan.steps:
            _save(path, step + 1, params, average, optimizer)
            saved = time.monotonic()
    with torch.no_grad():
        for name, value in params.items():
            value.copy_(average[name])
    return model.eval()


def _rate(plan: Plan, step: int) -> float:
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    progress = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item())


def _save(path: Path, step: int, params: dict, average: dict, optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"param/{name}": value.detach() for name, value in params.items()}
    tensors |= {f"average/{name}": value for name, value in average.items()}
    for name, value in params.items():
        for moment in ("exp_avg", "exp_avg_sq"):  # none where the loss does not reach
            tensors[f"{moment}/{name}"] = optimizer.state[value].get(moment, torch.zeros_like(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({key: value.contiguous() for key, value in tensors.items()}, partial, metadata={"progress": json.dumps({"step": step})})
    os.replace(partial, path)


def _load(path: Path, params: dict, average: dict, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        step = json.loads(handle.metadata()["progress"])["step"]
    tensors = load_file(path)
    with torch.no_grad():
        for name, value in params.items():
            value.copy_(tensors[f"param/{name}"])
            average[name].copy_(tensors[f"average/{name}"])
            optimizer.state[value] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"exp_avg/{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq/{name}"],
            }
    print(f"{path.stem}: continues at step {step}", flush=True)
    return step
