"""A tiny teacher with an adapter that looks trained, and a stock pipeline of it to compare exports with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from hyper_sd.config import TeacherConfig, TeacherGuidanceConfig
from hyper_sd.denoiser import Forward
from hyper_sd.export import export_lora, lora_info, verify_lora
from hyper_sd.guidance import Cond
from hyper_sd.lora_file import LoraDtype, LoraFormat
from hyper_sd.lora_metadata import LoraInfo, SamplerRecipe
from hyper_sd.roles import LoraSpec, Roles
from hyper_sd.teachers import Teacher, load_pipeline, load_teacher

SPEC = LoraSpec(rank=4, alpha=3.0)
RECIPE: SamplerRecipe = {
    "1": {
        "scheduler": "LCMScheduler",
        "config": {"num_train_timesteps": 1000, "trained_betas": None},
        "eta": None,
        "guidance_scale": 1.0,
        "timesteps": [899],
    },
    "4": {
        "scheduler": "TCDScheduler",
        "config": {"num_train_timesteps": 1000, "original_inference_steps": 40},
        "eta": 0.3,
        "guidance_scale": 1.0,
        "timesteps": None,
    },
}


@dataclass
class Trained:
    """A tiny teacher with a trained-looking adapter, and a stock pipeline of it."""

    cfg: TeacherConfig
    teacher: Teacher
    roles: Roles
    pipeline: Any

    @property
    def info(self) -> LoraInfo:
        return lora_info(self.teacher.facts, stage="tscd_4", recipe=RECIPE, extra={"ss_steps": "150", "ss_seed": "7"})

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.roles.state_dict("student")

    @property
    def modules(self) -> list[str]:
        return [path for path, _ in self.pipeline.unet.named_modules()]

    def export(self, path: Path, format: LoraFormat = "kohya", dtype: LoraDtype = "fp32") -> float:
        return export_lora(
            path,
            self.tensors,
            self.roles.spec,
            self.info,
            pipeline=self.pipeline,
            trained=self.student,
            untrained=self.untrained,
            format=format,
            dtype=dtype,
        )

    def verify(self, path: Path) -> float:
        return verify_lora(path, self.pipeline, self.student, self.untrained)

    def student(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with self.roles.use(("student",)):
            return self.teacher.forward(x_t, t, cond)

    @property
    def untrained(self) -> Forward | None:
        """The network without an adapter, where it computes in half precision."""
        return None if self.teacher.dtype == torch.float32 else self.teacher.forward


def train(family: str, path: Path, spec: LoraSpec = SPEC, size: float = 0.3, dtype: torch.dtype = torch.float32) -> Trained:
    guidance = TeacherGuidanceConfig(min=4, max=8)
    cfg = TeacherConfig(family=cast("Any", family), path=str(path), guidance=guidance)
    teacher = load_teacher(cfg, torch.device("cpu"), dtype)
    roles = Roles(teacher.net, spec, ("student",))
    randomise(roles, size)
    return Trained(cfg, teacher, roles, load_pipeline(cfg))


@torch.no_grad()
def randomise(roles: Roles, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, value in roles.tensors("student").items():
        if ".lora_B." in name:
            value.copy_(torch.randn(value.shape, generator=generator) * size)
