"""What all roles on one base take, counted on the meta device; nothing is allocated.

    python benchmarks/memory.py teacher=sdxl_random backbone=lora

Counts the score stage with a discriminator: base in bf16; student, its EMA, fake score (and the discriminator's adapter, or its
heads alone) and their Adam moments in float32. Apart from these, because they depend on the batch and on when they are freed:
the largest role's gradients, and the activations one sample of 1024 (SDXL) or 512 pixels keeps for the student's backward, with
and without gradient checkpointing (an upper bound: the meta device has no fused attention, so attention scores count).
1 GB = 1e9 bytes. Prints a table and, last, one line of JSON.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.networks import Network, build_network, network_config, sd_schedule
from benchmarks.step_cost import parse_as
from hyper_sd.denoiser import Denoiser
from hyper_sd.objective import Context
from hyper_sd.roles import LoraSpec, Roles
from hyper_sd.stages.adversarial import Adversarial
from hyper_sd.stages.score import Score
from hyper_sd.stages.tscd import STUDENT
from hyper_sd.structured import Count


@dataclass(frozen=True, kw_only=True)
class Options:
    teacher: Literal["embedded", "sd15_random", "sdxl_random"] = "sdxl_random"
    backbone: Literal["frozen", "lora"] = "frozen"
    rank: Count = 64


def main(argv: list[str]) -> None:
    result = count(parse_as(Options, argv))
    for name, size in result.items():
        print(f"{name:40}{size / 1e9:8.2f} GB")
    print(json.dumps(result))


def count(options: Options) -> dict[str, int]:
    """Bytes by what holds them; "resident" is the sum of what is there all the time."""
    stage = Score(rollout=(1,), adversarial=Adversarial(weight=1.0, real="data", backbone=options.backbone))
    meta = torch.device("meta")
    network = build_network(*network_config(options.teacher), meta, torch.bfloat16)
    base = _bytes(network.net.parameters())
    roles = Roles(network.net, LoraSpec(rank=options.rank), stage.adapters, encoder_only=stage.encoder_only)
    with meta:
        roles.attach({name: build(network.net, 0) for name, build in stage.modules.items()})
    denoiser = Denoiser(network.forward, roles, sd_schedule(), "eps")
    trained = [objective.trains for objective in stage.objectives(Context(denoiser, roles))]
    resident = {
        "base": base,
        **{f"adapter {name}": _bytes(roles.params((name,))) for name in stage.adapters},
        **{name: _bytes(roles.params((name,))) for name in roles.attached},
        **{f"Adam {'+'.join(role)}": 2 * _bytes(roles.params(role)) for role in trained},
    }
    apart = {"gradients": max(_bytes(roles.params(role)) for role in trained), "activations": _activations(denoiser, network)}
    roles.enable_gradient_checkpointing()
    apart["activations, gradient checkpointing"] = _activations(denoiser, network)
    return {**resident, "resident": sum(resident.values()), **apart}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _activations(denoiser: Denoiser, network: Network) -> int:
    """Bytes that one sample's forward pass keeps for the backward pass, weights apart."""
    denoiser.roles.trainable((STUDENT,))
    network.net.train()
    weights = {id(p) for p in network.net.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in weights:
            kept[id(tensor)] = tensor
        return tensor

    x0, t = network.latents(1), torch.zeros(1, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = denoiser((STUDENT,), x0, t, network.cond(1))
    size = _bytes(kept.values())
    del prediction
    return size


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"memory: {error}")
