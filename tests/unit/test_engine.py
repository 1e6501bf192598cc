"""Updates that are skipped, and what the engine keeps then; batches that it cannot share."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hyper_sd.cli import compose
from hyper_sd.config import run_config
from hyper_sd.engine import step_where
from hyper_sd.plain_engine import PlainEngine
from hyper_sd.plan_checks import check_work
from hyper_sd.structured import build_target


def optimizer_of(values: torch.Tensor) -> tuple[nn.Parameter, torch.optim.AdamW]:
    param = nn.Parameter(values.clone())
    return param, torch.optim.AdamW([param], lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize("before", [0, 3])
def test_a_skipped_step_changes_nothing_but_the_count(before: int) -> None:
    param, optimizer = optimizer_of(torch.tensor([1.0, -2.0, 3.0]))
    for step in range(before):
        param.grad = torch.full((3,), 1.0 + step)
        step_where(torch.tensor(True), optimizer, [param])
    values = param.detach().clone()
    moments = {name: optimizer.state[param][name].clone() for name in ("exp_avg", "exp_avg_sq") if before}
    param.grad = torch.tensor([1.0, float("nan"), 1.0])
    step_where(torch.tensor(False), optimizer, [param])
    assert torch.equal(param, values)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[param][name], moments.get(name, torch.zeros(3)))
    assert optimizer.state[param]["step"] == before + 1


def test_a_step_decided_on_a_device_is_the_plain_step() -> None:
    """The way of an accelerator, where the host never learns which it was, bit for bit; bad steps among good ones, the first too."""
    shapes, gradient = ((3,), (2, 5), (1,)), torch.Generator().manual_seed(0)
    first, second = ([nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)) for shape in shapes] for _ in range(2))
    plain, masked = (torch.optim.AdamW(params, lr=0.1, weight_decay=0.1) for params in (first, second))
    for good in (False, True, True, False, True):
        for one, other in zip(first, second, strict=True):
            one.grad = torch.randn(one.shape, generator=gradient) if good else torch.full(one.shape, float("nan"))
            other.grad = one.grad.clone()
        step_where(torch.tensor(good), plain, first)
        step_where(Elsewhere(torch.tensor(good)), masked, second)
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other) and one.isfinite().all()
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(plain.state[one][name], masked.state[other][name])


def kernels(num_params: int) -> int:
    """How many operations that move numbers a step of so many parameters takes, decided on a device."""
    params = [nn.Parameter(torch.ones(2, 3)) for _ in range(num_params)]
    optimizer = torch.optim.AdamW(params, foreach=True)
    counting, flag = Counting(), Elsewhere(torch.tensor(True))
    for _ in range(2):
        counting.number = 0
        for param in params:
            param.grad = torch.ones_like(param)
        with counting:
            step_where(flag, optimizer, params)
    return counting.number


def test_a_step_decided_on_a_device_takes_as_many_kernels_for_many_parameters_as_for_few() -> None:
    assert kernels(200) == kernels(3)


class Counting(TorchDispatchMode):
    """Counts operations; views move nothing, and a scalar that is read is Adam's count of steps, which the host has."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view and func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Elsewhere(torch.Tensor):
    """A flag that the host must not look at."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.device("meta")

    def __bool__(self) -> bool:
        raise AssertionError("the host waits for the device")


def test_a_batch_that_cannot_be_shared_is_refused_by_its_stages_key() -> None:
    config = run_config(compose("train", ["stages.tscd_8.batch_size=6", "engine.accumulation=4", "engine.cpu_threads=1"]))
    plan = config.stages["tscd_8"]
    engine = PlainEngine(config.engine)
    with pytest.raises(ValueError, match=r"^stages\.tscd_8\.batch_size=6 counts all 1 processes and engine\.accumulation=4 .* try 8$"):
        check_work(engine, plan, build_target(plan.method, plan.key))
