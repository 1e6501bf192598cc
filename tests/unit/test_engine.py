"""Updates that are skipped, and what the engine keeps then."""

import pytest
import torch
from torch import nn

from hyper_sd.engine import step_where


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
    """The way of an accelerator, where the host never learns which it was, bit for bit."""
    first, plain = optimizer_of(torch.tensor([1.0, -2.0, 3.0]))
    second, masked = optimizer_of(torch.tensor([1.0, -2.0, 3.0]))
    for step in range(4):
        first.grad, second.grad = (torch.tensor([0.1, -1.0, 5.0]) * (step + 1) for _ in range(2))
        plain.step()
        step_where(Elsewhere(torch.tensor(True)), masked, [second])
        assert torch.equal(first, second)
    assert torch.equal(plain.state[first]["exp_avg_sq"], masked.state[second]["exp_avg_sq"])


class Elsewhere(torch.Tensor):
    """A flag that the host must not look at."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.device("meta")

    def __bool__(self) -> bool:
        raise AssertionError("the host waits for the device")
