"""What a LoRA file says about itself: safetensors metadata, strings only.

Beside the fields of sd-scripts (`ss_*`) and modelspec (`modelspec.*`) a file says under `hyper_sd.*`: base_model, stage, rank,
alpha, targets (JSON), prediction, image_size, teacher (the fingerprint, JSON) and, as `hyper_sd.sampler`, the sampler recipe
(JSON): `{"<num_steps>": {"scheduler", "config", "eta", "guidance_scale", "timesteps"}}`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from hyper_sd.roles import LoraSpec
from hyper_sd.schedule import PredictionType

SAMPLER_KEY = "hyper_sd.sampler"
DIFFUSERS_KEY = "lora_adapter_metadata"

_TARGETS_KEY = "hyper_sd.targets"
_KOHYA_BASES = {"stable-diffusion-v1": "sd_v1", "stable-diffusion-xl-v1-base": "sdxl_base_v1-0"}
_MODELSPEC_PREDICTIONS: dict[PredictionType, str] = {"eps": "epsilon", "v": "v", "x0": "sample", "flow": "flow"}


class SamplerRow(TypedDict):
    """How to sample at one number of steps: a diffusers scheduler class with its full config, and the pipeline call's arguments."""

    scheduler: str
    config: dict[str, Any]
    eta: float | None
    guidance_scale: float
    timesteps: list[int] | None


SamplerRecipe = dict[str, SamplerRow]


@dataclass(frozen=True, kw_only=True)
class LoraInfo:
    """What a LoRA file says about itself beside rank, alpha and targets; `extra` holds further metadata such as ss_steps or ss_seed."""

    base_model: str
    architecture: str
    prediction: PredictionType
    image_size: int
    fingerprint: Mapping[str, Any]
    stage: str
    recipe: SamplerRecipe
    extra: Mapping[str, str] = field(default_factory=dict)


def to_metadata(spec: LoraSpec, info: LoraInfo, title: str) -> dict[str, str]:
    """The metadata of a file with kohya keys."""
    base = info.architecture.split("/")[0]
    return {
        **info.extra,
        "format": "pt",
        "hyper_sd.base_model": info.base_model,
        "hyper_sd.stage": info.stage,
        "hyper_sd.rank": str(spec.rank),
        "hyper_sd.alpha": str(spec.alpha),
        _TARGETS_KEY: json.dumps(spec.targets),
        "hyper_sd.prediction": info.prediction,
        "hyper_sd.image_size": str(info.image_size),
        "hyper_sd.teacher": json.dumps(info.fingerprint, sort_keys=True),
        SAMPLER_KEY: json.dumps(info.recipe, sort_keys=True),
        "ss_v2": "False",
        "ss_base_model_version": _KOHYA_BASES.get(base, base),
        "ss_sd_model_name": info.base_model,
        "ss_output_name": title,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(spec.rank),
        "ss_network_alpha": str(spec.alpha),
        "ss_network_args": json.dumps({"conv_dim": str(spec.rank), "conv_alpha": str(spec.alpha)}),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": info.architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{info.image_size}x{info.image_size}",
        "modelspec.prediction_type": _MODELSPEC_PREDICTIONS[info.prediction],
        "modelspec.usage_hint": _usage_hint(info.recipe),
    }


def with_recipe(metadata: Mapping[str, str], recipe: SamplerRecipe) -> dict[str, str]:
    """The metadata of a file of ours with another sampler recipe."""
    return {**metadata, SAMPLER_KEY: json.dumps(recipe, sort_keys=True), "modelspec.usage_hint": _usage_hint(recipe)}


def diffusers_metadata(spec: LoraSpec) -> str:
    """The value of `lora_adapter_metadata`, which diffusers reads alpha from.

    Only the fields every peft version knows: diffusers hands all of them to `LoraConfig`, which refuses fields of a newer peft.
    """
    config = {"r": spec.rank, "lora_alpha": spec.alpha, "target_modules": list(spec.targets)}
    return json.dumps({f"unet.{name}": value for name, value in config.items()}, indent=2, sort_keys=True)


def to_info(metadata: Mapping[str, str]) -> LoraInfo | None:
    """The LoraInfo a file was written with; None for a file of another program. Raises ValueError for damaged metadata."""
    if SAMPLER_KEY not in metadata:
        return None
    try:
        info = LoraInfo(
            base_model=metadata["hyper_sd.base_model"],
            architecture=metadata["modelspec.architecture"],
            prediction=metadata["hyper_sd.prediction"],  # pyright: ignore[reportArgumentType]
            image_size=int(metadata["hyper_sd.image_size"]),
            fingerprint=json.loads(metadata["hyper_sd.teacher"]),
            stage=metadata["hyper_sd.stage"],
            recipe=_recipe(metadata[SAMPLER_KEY]),
        )
        written = to_metadata(LoraSpec(), info, title="").keys() | {DIFFUSERS_KEY}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its metadata is damaged: {error!r}") from None
    return replace(info, extra={name: value for name, value in metadata.items() if name not in written})


def to_targets(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """The target modules a file was trained with; None for a file of another program."""
    return tuple(json.loads(metadata[_TARGETS_KEY])) if _TARGETS_KEY in metadata else None


def _recipe(text: str) -> SamplerRecipe:
    recipe = json.loads(text)
    for steps, row in recipe.items():
        if not steps.isdigit() or row.keys() != SamplerRow.__annotations__.keys():
            raise ValueError(f"{SAMPLER_KEY} has the row {steps!r} with the keys {sorted(row)}")
    return recipe


def _usage_hint(recipe: SamplerRecipe) -> str:
    """One line a user can read in any tool that shows metadata."""
    rows = sorted(recipe.items(), key=lambda item: int(item[0]))
    return "; ".join(
        f"{steps} steps: {row['scheduler']}, guidance_scale {row['guidance_scale']:g}"
        + (f", eta {row['eta']:g}" if row["eta"] is not None else "")
        + (f", timesteps {row['timesteps']}" if row["timesteps"] else "")
        for steps, row in rows
    )
