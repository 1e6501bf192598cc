"""Several adapters as one."""

import pytest
import torch
from torch import Tensor

from hyper_sd.merge import concatenated, merge_role, truncated
from hyper_sd.roles import LoraSpec, Roles
from tests.networks import TINY_SPEC, tiny_batch, tiny_denoiser, tiny_unet, unet_batch, unet_denoiser

PARTS = ("student", "feedback")


def products(tensors: dict[str, Tensor], spec: LoraSpec) -> dict[str, Tensor]:
    """(alpha / rank) B A by layer."""
    layers = [name for name in tensors if ".lora_A." in name]
    return {n: spec.scale * tensors[n.replace("lora_A", "lora_B")].flatten(1) @ tensors[n].flatten(1) for n in layers}


def test_a_concatenation_is_the_weighted_sum() -> None:
    roles = unet_denoiser(PARTS).roles
    parts = [roles.state_dict(name) for name in PARTS]
    merged, spec = concatenated(parts, [1.0, 0.5], roles.spec)
    assert spec.rank == 2 * roles.spec.rank
    sums = [products(part, roles.spec) for part in parts]
    for name, value in products(merged, spec).items():
        torch.testing.assert_close(value, sums[0][name] + 0.5 * sums[1][name])


def test_a_role_of_two_is_the_merged_adapter_at_twice_the_rank() -> None:
    denoiser, batch = unet_denoiser(PARTS), unet_batch()
    t = torch.full((4,), 499)
    expected = denoiser(PARTS, batch.x0, t, batch.cond).x0
    merged, spec = concatenated([denoiser.roles.state_dict(name) for name in PARTS], [1.0, 1.0], denoiser.roles.spec)
    net = tiny_unet()
    roles = Roles(net, spec, ("merged",))
    roles.load_state_dict("merged", merged)
    with roles.use(("merged",)):
        eps = net(batch.x0, t, batch.cond[0]).sample
    alpha, sigma = (value[0].float() for value in denoiser.schedule(t[:1]))
    torch.testing.assert_close((batch.x0 - sigma * eps) / alpha, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_truncation_is_the_nearest_of_its_rank(rank: int) -> None:
    roles = unet_denoiser(PARTS).roles
    merged, spec = concatenated([roles.state_dict(name) for name in PARTS], [1.0, 1.0], roles.spec)
    cut, error = truncated(merged, rank)
    assert {name: value.shape[0 if ".lora_A." in name else 1] for name, value in cut.items()} == dict.fromkeys(merged, rank)
    whole, rest = products(merged, spec), products(cut, spec)
    lost = sum((whole[name] - rest[name]).square().sum() for name in whole)
    least = sum(torch.linalg.svdvals(value.double())[rank:].square().sum() for value in whole.values())
    torch.testing.assert_close(lost.double(), least, rtol=1e-3, atol=1e-8)
    assert error == pytest.approx(float((lost / sum(value.square().sum() for value in whole.values())) ** 0.5), rel=1e-3, abs=1e-5)


def test_a_role_is_merged_into_its_first_adapter() -> None:
    denoiser, batch = tiny_denoiser(PARTS), tiny_batch()
    denoiser.roles.load_state_dict("feedback", {n: 1e-3 * v for n, v in denoiser.roles.state_dict("feedback").items()})
    t = torch.full((8,), 499)
    before = denoiser(PARTS, batch.x0, t, batch.cond).x0
    error = merge_role(denoiser.roles, PARTS)
    torch.testing.assert_close(denoiser(PARTS, batch.x0, t, batch.cond).x0, denoiser(("student",), batch.x0, t, batch.cond).x0)
    torch.testing.assert_close(denoiser(("student",), batch.x0, t, batch.cond).x0, before, rtol=0, atol=1e-3)
    assert 0 < error < 1e-3 and TINY_SPEC.rank == denoiser.roles.spec.rank
