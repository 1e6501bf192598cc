"""What a teacher is, and what the Stable Diffusion families share: reading a diffusers pipeline, its VAE and its facts."""

import hashlib
import inspect
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from hyper_sd.config import TeacherConfig
from hyper_sd.guidance import Cond
from hyper_sd.paths import asset_dir
from hyper_sd.schedule import PredictionType, Schedule

_PREDICTIONS: dict[str, PredictionType] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
EMBEDDED = "embedded"  # teacher.path of the teacher that is shipped with the package
_BETA_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


@dataclass(frozen=True)
class TeacherFacts:
    """What the configuration files of a pipeline say; read without its weights.

    latent_shape is (C, h, w) and image_size a side in pixels. fingerprint tells bases apart: a LoRA fits where it is equal.
    architecture is the name that LoRA files give in `modelspec.architecture`.
    """

    name: str
    architecture: str
    image_size: int
    latent_shape: tuple[int, int, int]
    schedule: Schedule
    prediction: PredictionType
    fingerprint: dict[str, str]


class Teacher(ABC):
    """A frozen denoising network with all that stands around it: a stock pipeline's UNet, text encoders and AutoencoderKL.

    A family adds the condition and the call of the network. A condition is a tuple of tensors with leading dimension B that only
    the family looks into. All modules are on `device`, in eval, and need no gradient; the VAE is in float32, because SDXL's
    overflows in float16.
    """

    pipeline_class: ClassVar[str]
    architecture: ClassVar[str]  # `modelspec.architecture` of LoRA files
    unused_components: ClassVar[tuple[str, ...]]

    def __init__(self, pipeline: Any, facts: TeacherFacts, device: torch.device):
        self.facts, self.device = facts, device
        self.pipeline = pipeline.to(device)
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        logging.getLogger(type(pipeline).__module__).addFilter(_once)
        self.net: nn.Module = pipeline.unet
        self.dtype: torch.dtype = pipeline.unet.dtype

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's output at x_t (B, C, h, w) and t (B,) in 0..T-1, in the network's dtype."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Cond:
        """The condition that the stock pipeline makes of each prompt."""

    @abstractmethod
    def uncond(self, batch: int) -> Cond:
        """`batch` times what guidance moves away from: the stock pipeline's condition where no negative prompt is given."""

    def with_sizes(self, cond: Cond, sizes: Tensor) -> Cond:
        """The condition for images of these sizes (B, 6); a family that is not told of sizes keeps it as it is."""
        return cond

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Scaled float32 latents (B, C, h, w), the mean of the posterior, of images (B, 3, H, W) in [0, 1]."""
        vae = self.pipeline.vae
        mean = vae.encode(2 * images.to(self.device, torch.float32, non_blocking=True) - 1).latent_dist.mean
        return mean * vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Float32 images (B, 3, H, W) in [0, 1] of scaled latents; gradients flow to the latents, of saturated pixels too (see `Clamp`)."""
        vae = self.pipeline.vae
        images = vae.decode(latents.to(self.device, torch.float32) / vae.config.scaling_factor).sample
        return Clamp.apply(images / 2 + 0.5)

    @property
    def schedule(self) -> Schedule:
        return self.facts.schedule

    @property
    def prediction(self) -> PredictionType:
        return self.facts.prediction

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.facts.latent_shape

    @property
    def image_size(self) -> int:
        return self.facts.image_size

    @property
    def fingerprint(self) -> dict[str, str]:
        return self.facts.fingerprint


class _Once(logging.Filter):
    """Lets through once that CLIP reads no more of a prompt: it is true of many captions, and diffusers says so of each."""

    def __init__(self) -> None:
        super().__init__()
        self._said = False

    def filter(self, record: logging.LogRecord) -> bool:
        said, about = self._said, "was truncated" in str(record.msg)
        self._said = said or about
        return not (said and about)


_once = _Once()


class Clamp(torch.autograd.Function):
    """clamp(0, 1) whose gradient brings pixels back in.

    Torch's is zero outside, so that a reward could never mend a saturated pixel. Here it is zero only where descent would push a
    pixel further out, which would change nothing that anyone sees.
    """

    @staticmethod
    def forward(ctx: Any, pixels: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(pixels)
        return pixels.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (pixels,) = ctx.saved_tensors
        outwards = ((pixels < 0) & (gradient > 0)) | ((pixels > 1) & (gradient < 0))
        return gradient.masked_fill(outwards, 0)


def read_facts(cfg: TeacherConfig, family: type[Teacher]) -> TeacherFacts:
    """The facts of the pipeline at `teacher.path`; raises ValueError, naming the key, if it is no pipeline of this family."""
    index = _config(DiffusionPipeline, cfg)
    if index.get("_class_name") != family.pipeline_class:
        raise ValueError(
            f"teacher.path={cfg.path} holds a {index.get('_class_name')}, but teacher.family={cfg.family} needs a "
            f"{family.pipeline_class}; change teacher.path, or choose another teacher="
        )
    unet, vae = _config(UNet2DConditionModel, cfg, "unet"), _config(AutoencoderKL, cfg, "vae")
    schedule, prediction, schedule_name = _read_schedule(cfg)
    image_size, latent_shape = _sizes(cfg, unet, vae)
    fingerprint = {
        "pipeline": family.pipeline_class,
        "unet_sha256": _unet_hash(unet),
        "schedule": schedule_name,
        "prediction": prediction,
    }
    return TeacherFacts(cfg.path, family.architecture, image_size, latent_shape, schedule, prediction, fingerprint)


def read_layers(cfg: TeacherConfig) -> list[str]:
    """The paths of the linear and convolutional layers of the UNet at `teacher.path`."""
    with torch.device("meta"):
        net: Any = UNet2DConditionModel.from_config(_config(UNet2DConditionModel, cfg, "unet"))
    return [path for path, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def load_stock_pipeline(cfg: TeacherConfig, family: type[Teacher], dtypes: Mapping[str, torch.dtype]) -> DiffusionPipeline:
    """A fresh stock pipeline, safety checker off; `dtypes` by component, and "default". Reads safetensors only, never a pickle."""
    path, options = _location(cfg)
    unused: dict[str, None] = dict.fromkeys(family.unused_components)
    local = "local_files_only" in options
    try:
        with _no_progress_bars() if local else nullcontext():  # those of a download are worth seeing
            return DiffusionPipeline.from_pretrained(
                path, **options, **unused, variant=cfg.variant, dtype=dict(dtypes), use_safetensors=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"teacher.path={cfg.path}: the pipeline cannot be loaded (teacher.variant={cfg.variant}): {error}") from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    loggers = (diffusers_logging, transformers_logging)
    for logger in loggers:
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger in loggers:
            logger.enable_progress_bar()


def _location(cfg: TeacherConfig) -> tuple[str, dict[str, Any]]:
    """Where diffusers finds the pipeline: an existing directory, or a hub id."""
    if cfg.path == EMBEDDED:
        return str(asset_dir("teacher")), {"local_files_only": True}
    if Path(cfg.path).is_dir():
        return cfg.path, {"local_files_only": True}
    if Path(cfg.path).exists() or cfg.path.count("/") != 1 or cfg.path.startswith((".", "/", "~")):
        raise ValueError(
            f"teacher.path={cfg.path} is no directory; give the directory of a diffusers pipeline (the one that holds "
            "model_index.json) or a hub id such as owner/name"
        )
    return cfg.path, {"revision": cfg.revision}


def _config(cls: Any, cfg: TeacherConfig, subfolder: str | None = None) -> dict[str, Any]:
    path, options = _location(cfg)
    if subfolder is not None:
        options["subfolder"] = subfolder
    try:
        return dict(cls.load_config(path, **options))
    except (OSError, ValueError) as error:
        kind = (
            "a directory with a diffusers pipeline" if Path(path).is_dir() else "a directory, nor a pipeline that can be read from the hub"
        )
        raise ValueError(f"teacher.path={cfg.path} is not {kind}: {error}") from error


def _read_schedule(cfg: TeacherConfig) -> tuple[Schedule, PredictionType, str]:
    config = _config(DDPMScheduler, cfg, "scheduler")
    kind, prediction = config.get("_class_name"), config.get("prediction_type", "epsilon")
    if "beta_schedule" not in config or prediction not in _PREDICTIONS:
        raise ValueError(
            f"teacher.path={cfg.path}: the scheduler {kind} with prediction_type={prediction} is not supported; it must have a "
            f"beta_schedule and a prediction_type of {', '.join(_PREDICTIONS)}"
        )
    betas = {key: config[key] for key in _BETA_KEYS if config.get(key) not in (None, False)}
    schedule = Schedule.from_alphas_cumprod(DDPMScheduler(**betas).alphas_cumprod)
    return schedule, _PREDICTIONS[prediction], json.dumps(betas, sort_keys=True)


def _sizes(cfg: TeacherConfig, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, tuple[int, int, int]]:
    """The side of an image in pixels and the shape of its latent."""
    channels, scale = vae["latent_channels"], 2 ** (len(vae["block_out_channels"]) - 1)
    if unet["in_channels"] != channels:
        raise ValueError(
            f"teacher.path={cfg.path}: the UNet takes {unet['in_channels']} channels and the VAE makes {channels}; "
            "inpainting and other image-conditioned pipelines cannot be teachers"
        )
    side = unet.get("sample_size")
    image_size = cfg.image_size or (side * scale if isinstance(side, int) else None)
    if image_size is None or image_size % scale:
        raise ValueError(
            f"teacher.image_size must be a multiple of {scale} pixels: got {cfg.image_size} and a UNet with sample_size={side}; set it"
        )
    return image_size, (channels, image_size // scale, image_size // scale)


def _unet_hash(config: Mapping[str, Any]) -> str:
    """A hash of what the configuration changes from the defaults, so that a file rewritten by another version keeps its hash."""
    defaults = {name: p.default for name, p in inspect.signature(UNet2DConditionModel.__init__).parameters.items()}
    as_json = {name: json.loads(json.dumps(value)) for name, value in defaults.items() if name not in ("self", "sample_size")}
    changed = {name: value for name, value in config.items() if name in as_json and value != as_json[name]}
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
