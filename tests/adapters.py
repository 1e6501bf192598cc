"""LoRA files of random adapters, for tests that need a file and not a training."""

from pathlib import Path

import torch

from hyper_sd.config import TeacherConfig, TeacherGuidanceConfig
from hyper_sd.denoiser import Denoiser
from hyper_sd.export import lora_info
from hyper_sd.lora_file import save_lora
from hyper_sd.roles import LoraSpec, Roles
from hyper_sd.sample import Recipe, recipe_to_json
from hyper_sd.teachers import Teacher, load_teacher

ADAPTER = "student"


def teacher_config(path: Path, family: str = "sd15") -> TeacherConfig:
    return TeacherConfig(family=family, path=str(path), dtype="fp32", guidance=TeacherGuidanceConfig(min=2.0, max=4.0))  # pyright: ignore[reportArgumentType]


def random_denoiser(teacher: Teacher, *, seed: int = 0, strength: float = 0.1) -> Denoiser:
    """The teacher's network with one adapter whose two factors are random."""
    roles = Roles(teacher.net, LoraSpec(rank=4, alpha=8.0), (ADAPTER,))
    generator = torch.Generator().manual_seed(seed)
    for param in roles.params((ADAPTER,)):
        param.data = strength * torch.randn(param.shape, generator=generator)
    return Denoiser(teacher.forward, roles, teacher.schedule, teacher.prediction)


def write_adapter(file: Path, teacher: TeacherConfig, recipe: Recipe, *, stage: str = "tscd_1", seed: int = 0) -> Denoiser:
    """Save the adapter of `random_denoiser`; returns that denoiser."""
    loaded = load_teacher(teacher, torch.device("cpu"), torch.float32)
    denoiser = random_denoiser(loaded, seed=seed)
    info = lora_info(loaded.facts, stage=stage, recipe=recipe_to_json(recipe))
    file.parent.mkdir(parents=True, exist_ok=True)
    save_lora(file, denoiser.roles.state_dict(ADAPTER), denoiser.roles.spec, info)
    return denoiser
