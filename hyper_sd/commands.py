"""What the commands beside training are told. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from hyper_sd.config import DataConfig, EvalConfig, TeacherConfig
from hyper_sd.structured import Count, NonNegativeInt


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What scripts/export.py is told; the keys are explained in configs/export.yaml."""

    run: str
    stage: str | None
    format: Literal["kohya", "diffusers", "unet"]
    dtype: Literal["fp32", "fp16", "bf16"]
    out: str | None
    weights: dict[str, float] | None
    merge: Literal["svd", "concat"]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What scripts/sample.py is told; the keys are explained in configs/sample.yaml."""

    prompt: str
    lora: str | None
    steps: Count
    num_images: Count
    seed: NonNegativeInt
    out: str
    teacher: TeacherConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What scripts/evaluate.py is told; the keys are explained in configs/evaluate.yaml."""

    run: str | None
    lora: str | None
    steps: tuple[Count, ...]
    out: str | None
    eval: EvalConfig
    teacher: TeacherConfig
    data: DataConfig

    def __post_init__(self) -> None:
        if (self.run is None) == (self.lora is None):
            raise ValueError(f"run, lora: give one of them, run=DIR or lora=FILE; got run={self.run} and lora={self.lora}")
