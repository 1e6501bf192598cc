"""What processes check of the DeepSpeed engine's updates, some of them not finite in the first; started by test_deepspeed_engine.py."""

import sys
from dataclasses import replace

import torch
from torch import Tensor, nn

from hyper_sd.config import LrSchedulerConfig, OptimizerConfig
from hyper_sd.deepspeed_engine import DeepSpeedEngine
from hyper_sd.engine import MOMENTS, step_where
from tests.dist.gradients import CONFIG

ROLE = ("a",)
OPTIMIZER = OptimizerConfig(lr=0.1, weight_decay=0.1, max_grad_norm=None)
UPDATES = (float("nan"), 1.0, -0.3, float("inf"), float("nan"), 2.0, 0.7)  # the first is one that Adam has no moments for yet
TOLERANCE = 1e-6


def parameters() -> dict[str, nn.Parameter]:
    return {"a/w": nn.Parameter(torch.linspace(-1, 1, 150).view(50, 3)), "a/v": nn.Parameter(torch.linspace(2, 3, 7))}


def loss(params: dict[str, nn.Parameter], scale: float) -> Tensor:
    return sum((scale * (number + 1) * value.sin()).sum() for number, value in enumerate(params.values()))  # pyright: ignore[reportReturnType]


def state(engine: DeepSpeedEngine, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    moments, _ = engine.state_dict(lambda key, value: value.clone())
    return {name: value.detach().clone() for name, value in params.items()} | moments


def reference(params: dict[str, nn.Parameter], adamw: torch.optim.AdamW, scale: float) -> dict[str, Tensor]:
    """The same update as the plain engine makes it on one process."""
    adamw.zero_grad()
    loss(params, scale).backward()
    values = list(params.values())
    step_where(torch.tensor(abs(scale) < float("inf")), adamw, values)
    moments = {f"a/{moment}/{name}": adamw.state[value][moment].clone() for name, value in params.items() for moment in MOMENTS}
    return {name: value.detach().clone() for name, value in params.items()} | moments


def main() -> None:
    engine = DeepSpeedEngine(replace(CONFIG, accumulation=1))
    params, plain = parameters(), parameters()
    engine.train(ROLE, params, OPTIMIZER, LrSchedulerConfig(), len(UPDATES))
    adamw = torch.optim.AdamW(plain.values(), lr=0.1, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=0.1)
    before = {name: value.detach().clone() for name, value in params.items()}
    for number, scale in enumerate(UPDATES):
        engine.begin(ROLE)
        good = abs(scale) < float("inf")
        engine.backward(ROLE, loss(params, scale if good or engine.is_main else 1.0))
        norm, expected = engine.step(ROLE), reference(plain, adamw, scale)
        found = state(engine, params)
        assert bool(norm.isfinite()) == good, (number, norm)
        if not good:
            assert all(torch.equal(found[name], value) for name, value in before.items()), f"update {number} was not finite and left a trace"
        assert found.keys() == (expected.keys() if engine.is_main else params.keys())
        for name, value in found.items():
            error = float((value - expected[name]).norm())
            assert error <= TOLERANCE * float(expected[name].norm()), (number, name, value, expected[name])
        before = found
    kind = type(engine._trained[ROLE].optimizer).__name__
    print(f"rank {engine.rank}, {engine.engine_type}, {kind}: {len(UPDATES)} updates are the plain ones", flush=True)
    engine.close()


if __name__ == "__main__":
    sys.exit(main())
