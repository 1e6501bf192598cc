"""The configuration of a run as frozen dataclasses. Imports no torch.

A wrong type, an unknown key or a missing value is a ValueError that names the full key, what was given and what is allowed.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from omegaconf import DictConfig

from hyper_sd.structured import (
    Beta,
    Count,
    NonNegative,
    NonNegativeInt,
    Positive,
    Range,
    checked_target,
    describe,
    refuse_unknown,
    resolved,
    structured,
    suggestion,
)


@dataclass(frozen=True, kw_only=True)
class RunDirConfig:
    """`dir` is relative to the current directory; `accept_changed` names keys that may differ from what the run began with."""

    dir: str
    accept_changed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TeacherGuidanceConfig:
    """The range of guidance scales w that suits the teacher, in the convention where 1 is off."""

    min: float
    max: float


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The pipeline that is distilled; the keys are explained in configs/teacher/."""

    family: Literal["sd15", "sdxl"]
    path: str
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    image_size: Count | None = None
    guidance: TeacherGuidanceConfig


@dataclass(frozen=True, kw_only=True)
class DataPart:
    """One of the sources of data=mix; `weight` is its share relative to the others'."""

    kind: Literal["scenes", "folder", "webdataset", "prompts", "cache"]
    path: str | None = None
    weight: Positive = 1.0
    caption_column: str = "text"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training samples; the keys are explained in configs/data/. `batch_size` counts all processes and micro-batches."""

    kind: Literal["scenes", "folder", "coco", "webdataset", "hf", "prompts", "cache", "mix"]
    batch_size: Count
    path: str | None = None
    num_workers: NonNegativeInt = 0
    prefetch: Count = 2
    max_bad_fraction: Annotated[float, Range(low=0, high=1)] = 0.01
    min_side: NonNegativeInt = 0
    annotations: str | None = None
    captions: str | None = None
    caption_column: str = "text"
    image_column: str = "image"
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    streaming: bool = True
    teacher_steps: Count = 25
    sources: tuple[DataPart, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: Count
    alpha: Positive
    targets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW."""

    lr: Positive
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    eps: Positive = 1e-8
    max_grad_norm: Positive | None = 1.0


@dataclass(frozen=True, kw_only=True)
class LrSchedulerConfig:
    """A learning rate schedule by its name in diffusers."""

    name: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = "constant"
    warmup_steps: NonNegativeInt = 0


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is computed, when it is saved and what faults do; the keys are explained in configs/engine/default.yaml."""

    gradient_checkpointing: bool
    accumulation: Count
    checkpoint_every_steps: Count
    checkpoint_every_seconds: Positive | None
    keep_last: Count
    cpu_threads: Count | None
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    keep_every: Count | None = None
    on_save_error: Literal["stop", "continue"] = "stop"
    max_bad_steps: Count = 10
    max_seconds: Positive | None = None
    timeout_seconds: Positive = 1800.0


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is sampled and measured; the keys are explained in configs/eval/default.yaml."""

    prompts: NonNegativeInt
    every_steps: Count | None
    steps: tuple[Count, ...]
    teacher_steps: Count
    judge: Literal["embedded"] | None
    seed: NonNegativeInt
    batch_size: Count | None = None
    draws: Count = 1
    sweep_prompts: NonNegativeInt = 0
    reference: Count = 8192
    end_points: Count | None = None
    guidance: Annotated[float, Range(low=1)] | None = None
    eta: Annotated[float, Range(low=0, high=1)] = 1.0
    start: NonNegativeInt | None = None
    student_guidance: Annotated[float, Range(low=1)] = 1.0
    negatives: NonNegativeInt = 0

    def images_at_once(self, image_size: int) -> int:
        """`batch_size`, or as many images of `image_size` pixels a side as have two million pixels, at most 64."""
        return self.batch_size or max(1, min(64, (1 << 21) // image_size**2))


@dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Files of a released model: a local directory, or a hub id with a commit; its weights' name and their SHA-256 (None: not known)."""

    path: str | None = None
    revision: str | None = None
    file: str | None = None
    sha256: str | None = None

    @property
    def files(self) -> "FilesConfig":
        """These four fields alone, whatever else the configuration says: equal for two that read the same files."""
        return FilesConfig(path=self.path, revision=self.revision, file=self.file, sha256=self.sha256)


@dataclass(frozen=True, kw_only=True)
class RewardConfig(FilesConfig):
    """A reward model; the keys are explained in configs/reward/. Training minimises weight * ReLU(alpha - reward)."""

    kind: Literal["clip_score", "pickscore", "hps_v2", "aesthetic", "image_reward", "embedded", "embedded_heldout"]
    base: FilesConfig | None = None
    weight: NonNegative = 1.0
    alpha: float


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig(FilesConfig):
    """An instance segmenter that stages with `perceptual_weight` are trained on; the keys are explained in configs/segmenter/."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(FilesConfig):
    """What images are compared by; the keys are explained in configs/features/."""

    kind: Literal["judge", "clip", "inception"]


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How latents become images for rewards: `slice` samples at a time; bf16 is autocast, the weights stay float32.

    `tiny` is a small decoder in the place of the teacher's.
    """

    dtype: Literal["fp32", "bf16"] = "fp32"
    slice: Count = 1
    tiny: FilesConfig | None = None


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When the held-out reward is looked at, and after how many falls in a row a stage ends; explained in configs/stage/refl.yaml."""

    every_steps: Count
    prompts: Annotated[int, Range(low=2)]
    steps: tuple[Count, ...]
    patience: Count | None
    keep: Literal["best", "last"] = "best"


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    kind: Literal["none", "tensorboard", "wandb"]
    project: str = "hyper_sd"


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage of a run. `method` holds `_target_` and the fields of that dataclass, for `build_target`; the rest is how it is trained.

    `optimizers` are those of single adapters, for a stage that trains several; `optimizer` is that of all others. `guard` watches it by
    the run's held-out reward.
    """

    name: str
    method: dict[str, Any]
    max_steps: Count
    batch_size: Count
    optimizer: OptimizerConfig
    lr_scheduler: LrSchedulerConfig
    optimizers: dict[str, OptimizerConfig] = field(default_factory=dict)
    guard: GuardConfig | None = None

    @property
    def key(self) -> str:
        return f"stages.{self.name}"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a training run is told. `stages` is in the order of training; nothing is ever trained on `heldout`."""

    name: str
    seed: NonNegativeInt
    run: RunDirConfig
    resume: Literal["never", "auto"] = "never"
    only: tuple[str, ...] | None = None
    init: str | None = None
    teacher: TeacherConfig
    data: DataConfig
    lora: LoraConfig
    engine: EngineConfig
    eval: EvalConfig
    tracker: TrackerConfig
    rewards: dict[str, RewardConfig] = field(default_factory=dict)
    heldout: RewardConfig | None = None
    segmenter: SegmenterConfig | None = None
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    stages: dict[str, StagePlan]
    seeds: Count | None = None
    plans: dict[str, dict[str, StagePlan]] = field(default_factory=dict)

    @property
    def judges(self) -> dict[str, RewardConfig]:
        """The rewards, trained on and held out."""
        return self.rewards | ({} if self.heldout is None else {HELDOUT: self.heldout})

    @property
    def selected(self) -> dict[str, StagePlan]:
        """The stages this run trains: all of them, or those named by `only`, in the order of the plan."""
        return {name: stage for name, stage in self.stages.items() if self.only is None or name in self.only}


HELDOUT = "heldout"  # the name of what nothing is trained on, beside the rewards'
RESERVED_REWARDS = {HELDOUT, "step", "trained"}  # what else a row of a guard's history holds
_SHARED_STAGE_KEYS = ("optimizer", "lr_scheduler")  # top-level nodes that only stages refer to
_PLAN_FIELDS = tuple(f.name for f in dataclasses.fields(StagePlan) if f.name not in ("name", "method"))


def run_config(cfg: DictConfig | Mapping[str, Any]) -> RunConfig:
    """The checked configuration of a training run. Raises ValueError naming the key."""
    plain = resolved(cfg)
    known = [f.name for f in dataclasses.fields(RunConfig)] + list(_SHARED_STAGE_KEYS)
    refuse_unknown(plain, known, key="")
    for key in _SHARED_STAGE_KEYS:
        plain.pop(key, None)
    plain["stages"] = _nest_methods(plain.get("stages"), "stages")
    plain["plans"] = {name: _nest_methods(stages, f"plans.{name}") for name, stages in (plain.get("plans") or {}).items()}
    config = structured(RunConfig, plain)
    if not config.stages:
        raise ValueError("stages: there is none; add one with +stage@stages.<name>=tscd or choose a recipe")
    for name in config.only or ():
        if name not in config.stages:
            raise ValueError(f"only: there is no stage {name!r}{suggestion(name, config.stages)}")
    if not config.selected:
        raise ValueError(f"only: no stage is left; the plan has {', '.join(config.stages)}")
    for name in RESERVED_REWARDS & config.rewards.keys():
        raise ValueError(f"rewards.{name}: a guard's history has a {name} of its own; give the reward another name")
    return config


def _nest_methods(nodes: Any, key: str) -> dict[str, Any]:
    for name in nodes or {}:
        if not re.fullmatch(r"\w[\w.=-]*", str(name)):
            raise ValueError(f"{key}: {name!r} names a directory of the run, so only letters, digits and _ . = - are allowed in it")
    return {name: _nest_method(node, f"{key}.{name}") for name, node in (nodes or {}).items()}


def _nest_method(node: Any, key: str) -> dict[str, Any]:
    """The flat yaml node of a stage, with the fields of its method set apart."""
    if not isinstance(node, Mapping):
        raise ValueError(f"{key}: {describe(node)}, expected the keys of a stage; remove a stage with ~{key}")
    method = {name: value for name, value in node.items() if name not in _PLAN_FIELDS}
    checked_target(method, key)
    return {"name": key.rpartition(".")[2], "method": method, **{name: node[name] for name in _PLAN_FIELDS if name in node}}
