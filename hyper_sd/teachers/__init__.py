"""Teachers by family. A new family is a new file and one line in `_family`."""

from typing import Any

import torch
from diffusers import DiffusionPipeline

from hyper_sd.config import TeacherConfig
from hyper_sd.teachers.base import Teacher, TeacherFacts, load_stock_pipeline, read_facts, read_layers

__all__ = ["Teacher", "TeacherFacts", "base_dtype", "inspect_teacher", "layer_names", "load_pipeline", "load_sampler", "load_teacher"]


def inspect_teacher(cfg: TeacherConfig) -> TeacherFacts:
    """What the configuration files at `teacher.path` say, without loading a weight; ValueError naming the key if they do not fit."""
    return read_facts(cfg, _family(cfg))


def layer_names(cfg: TeacherConfig) -> list[str]:
    """The paths of the network's linear and convolutional layers, which adapters can be on; without loading a weight."""
    return read_layers(cfg)


def load_teacher(cfg: TeacherConfig, device: torch.device, dtype: torch.dtype) -> Teacher:
    """The teacher on `device`, network and text encoders in `dtype`. Everything that can be refused is refused before its weights load."""
    family = _family(cfg)
    facts = read_facts(cfg, family)
    return family(load_stock_pipeline(cfg, family, {"default": dtype, "vae": torch.float32}), facts, device)


def load_pipeline(cfg: TeacherConfig) -> DiffusionPipeline:
    """A fresh stock diffusers pipeline of the teacher in float32 on the CPU, safety checker off."""
    family = _family(cfg)
    read_facts(cfg, family)
    return load_stock_pipeline(cfg, family, {"default": torch.float32})


def load_sampler(cfg: TeacherConfig, device: torch.device) -> Any:
    """The stock pipeline on `device`, to draw with: float32, or on a GPU that trains in half precision float16, as LoRAs are mostly used.

    bfloat16's 8 bits show in one step from the last timestep, where the network's answer is multiplied most. The VAE is in float32
    (SDXL's overflows in half precision).
    """
    dtype = torch.float32 if device.type != "cuda" or base_dtype(cfg, device) == torch.float32 else torch.float16
    family = _family(cfg)
    read_facts(cfg, family)
    return load_stock_pipeline(cfg, family, {"default": dtype, "vae": torch.float32}).to(device)


def base_dtype(cfg: TeacherConfig, device: torch.device) -> torch.dtype:
    """teacher.dtype; auto is bf16 where the device computes in it, else fp32."""
    if cfg.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.dtype]


def _family(cfg: TeacherConfig) -> type[Teacher]:
    match cfg.family:
        case "sd15":
            from hyper_sd.teachers.sd15 import Sd15Teacher

            return Sd15Teacher
        case "sdxl":
            from hyper_sd.teachers.sdxl import SdxlTeacher

            return SdxlTeacher
    raise ValueError(f"teacher.family must be sd15 or sdxl: got {cfg.family}")
