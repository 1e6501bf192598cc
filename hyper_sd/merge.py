"""Several LoRA adapters as one: their weighted sum by concatenation, exact at the sum of their ranks, or cut back to fewer by SVD."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hyper_sd.roles import LoraSpec, Role, Roles

Tensors = Mapping[str, Tensor]


def concatenated(parts: Sequence[Tensors], weights: Sequence[float], spec: LoraSpec) -> tuple[dict[str, Tensor], LoraSpec]:
    """sum_i weights_i B_i A_i with A = [A_1; A_2; ...] and B = [w_1 B_1, w_2 B_2, ...], and its spec, whose alpha / rank is the parts'."""
    merged: dict[str, Tensor] = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if ".lora_A." in name:
            merged[name] = torch.cat(tensors, dim=0)
        else:
            merged[name] = torch.cat([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)], dim=1)
    return merged, replace(spec, rank=len(parts) * spec.rank, alpha=len(parts) * spec.alpha)


def truncated(tensors: Tensors, rank: int) -> tuple[dict[str, Tensor], float]:
    """The nearest adapter of this rank in every layer, and the relative error ||B A - B' A'|| / ||B A|| over all layers.

    B A = Q_b (R_b R_a^T) Q_a^T with QR decompositions of B and A^T, so that only a matrix of the old rank is decomposed.
    """
    cut: dict[str, Tensor] = {}
    lost = whole = 0.0
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        b = tensors[other]
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b.flatten(1).double()), torch.linalg.qr(a.flatten(1).double().T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        root = s[:rank].sqrt()
        new_a, new_b = (q_a @ v[:rank].T * root).T, q_b @ u[:, :rank] * root
        cut[name] = _padded(new_a, rank, 0).to(a.dtype).reshape(rank, *a.shape[1:])
        cut[other] = _padded(new_b, rank, 1).to(b.dtype).reshape(b.shape[0], rank, *b.shape[2:])
        lost, whole = lost + float(s[rank:].square().sum()), whole + float(s.square().sum())
    return {name: cut[name].contiguous() for name in tensors}, (lost / whole) ** 0.5 if whole else 0.0


def merge_role(roles: Roles, role: Role) -> float:
    """Make the role's first adapter the sum of all, cut back to its rank, and the others nothing; returns the relative error."""
    merged, _ = concatenated([roles.state_dict(adapter) for adapter in role], [1.0] * len(role), roles.spec)
    cut, error = truncated(merged, roles.spec.rank)
    roles.load_state_dict(role[0], cut)
    for adapter in role[1:]:
        roles.reset(adapter)
    return error


def _padded(matrix: Tensor, rank: int, dim: int) -> Tensor:
    """Zeros up to `rank`, where a layer is narrower."""
    missing = list(matrix.shape)
    missing[dim] = rank - matrix.shape[dim]
    return torch.cat([matrix, matrix.new_zeros(missing)], dim=dim)
