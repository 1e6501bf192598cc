"""What the commands beside training are told. Imports no torch."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from hyper_sd.config import DataConfig, EvalConfig, FeaturesConfig, RewardConfig, TeacherConfig
from hyper_sd.structured import Count, NonNegative, NonNegativeInt, Range, suggestion

DISTANCES = ("fid", "kid", "cmmd")
DIVERSITY = "diversity"
_TRAININGS_OWN = ("every_steps", "eta", "start", "student_guidance")


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
    steps: Count | None
    num_images: Count
    seed: NonNegativeInt
    out: str
    teacher: TeacherConfig


@dataclass(frozen=True, kw_only=True)
class DiversityConfig:
    """How many prompts are drawn with how many seeds each."""

    prompts: Count = 64
    seeds: Annotated[int, Range(low=2)] = 4


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is measured beside the judge's figures: `names` are keys of `rewards`, fid, kid, cmmd and diversity."""

    names: tuple[str, ...] = ()
    rewards: dict[str, RewardConfig] = field(default_factory=dict)
    features: FeaturesConfig | None = None
    diversity: DiversityConfig = DiversityConfig()

    def __post_init__(self) -> None:
        allowed = (*self.rewards, *DISTANCES, DIVERSITY)
        for name in self.names:
            if name not in allowed:
                raise ValueError(f"metrics: there is no {name!r}{suggestion(name, allowed)}")
            if name not in self.rewards and self.features is None:
                raise ValueError(f"metrics={name} is measured on features: choose features=clip, features=inception or features=judge")

    @property
    def chosen_rewards(self) -> dict[str, RewardConfig]:
        return {name: self.rewards[name] for name in self.names if name in self.rewards}

    @property
    def extractor(self) -> FeaturesConfig | None:
        """The features, if something is measured on them."""
        return self.features if any(name not in self.rewards for name in self.names) else None


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
    metrics: tuple[str, ...] = ()
    rewards: dict[str, RewardConfig] = field(default_factory=dict)
    features: FeaturesConfig | None = None
    diversity: DiversityConfig = DiversityConfig()

    @property
    def measured(self) -> MetricsConfig:
        """The part of it that says what is measured."""
        return MetricsConfig(names=self.metrics, rewards=self.rewards, features=self.features, diversity=self.diversity)

    def __post_init__(self) -> None:
        _ = self.measured  # refuses metrics that do not exist
        if (self.run is None) == (self.lora is None):
            raise ValueError(f"run, lora: give one of them, run=DIR or lora=FILE; got run={self.run} and lora={self.lora}")
        if self.run is not None and self.out is not None:
            raise ValueError(f"out={self.out}: is for lora=FILE; the report of a run is written into its own directory, run={self.run}")
        for name in _TRAININGS_OWN:
            if (given := getattr(self.eval, name)) != getattr(EvalConfig, name, None):
                raise ValueError(
                    f"eval.{name}={given}: is for training; here an adapter is sampled as its file says, or with what "
                    "eval.sweep_prompts chooses"
                )


@dataclass(frozen=True, kw_only=True)
class BucketsConfig:
    """Sizes of about the teacher's area: sides are multiples of `step` pixels, their ratio at most `max_ratio`."""

    step: Count
    max_ratio: Annotated[float, Range(low=1)]


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What is left out on purpose; the keys are explained in configs/prepare.yaml."""

    min_side: NonNegativeInt
    max_ratio: Annotated[float, Range(low=1)] | None
    min_sharpness: NonNegative
    min_aesthetic: float | None
    unique_captions: bool


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What scripts/prepare.py is told; the keys are explained in configs/prepare.yaml."""

    out: str
    data: DataConfig
    teacher: TeacherConfig
    buckets: BucketsConfig | None
    filters: FilterConfig
    scorer: RewardConfig | None = None
    embeddings: bool
    dtype: Literal["fp32", "fp16", "bf16"]
    encode_batch: Count
    shard_size: Count
    sheet: NonNegativeInt
    seed: NonNegativeInt
    cpu_threads: Count | None
