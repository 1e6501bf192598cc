"""Text to images through a stock diffusers pipeline, with a few-step LoRA and the sampler it was made for.

A `Sampler` is everything a user needs to sample at one step count; an adapter's file carries one row per step count. All draws
come from integers, so an image depends on (seed, index, prompt, row) and never on the batch it was drawn in.
"""

import inspect
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from hyper_sd.commands import SampleConfig
from hyper_sd.config import TeacherConfig
from hyper_sd.lora_file import inspect_lora
from hyper_sd.lora_metadata import SAMPLER_KEY, SamplerRecipe, SamplerRow
from hyper_sd.randomness import Purpose, generator, normal
from hyper_sd.teachers import Teacher, inspect_teacher, load_sampler

SCHEDULERS = ("TCDScheduler", "DDIMScheduler", "LCMScheduler")
_USUAL_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How to sample with `num_steps` network evaluations (twice as many with guidance on).

    `config` is the full config of the diffusers scheduler. `eta` is None for a scheduler that has none. `guidance_scale` 1 is off.
    `timesteps`, if given, replaces the scheduler's own grid, e.g. (899,) for one step that starts below the top.
    """

    num_steps: int
    scheduler: str
    config: Mapping[str, Any]
    eta: float | None = None
    guidance_scale: float = 1.0
    timesteps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"sampler.scheduler must be one of {', '.join(SCHEDULERS)}: got {self.scheduler!r}")
        if unknown := self.config.keys() - _parameters(self.scheduler):
            raise ValueError(f"sampler.config of {self.scheduler} has unknown keys: {sorted(unknown)}")
        if self.timesteps is not None and len(self.timesteps) != self.num_steps:
            raise ValueError(f"sampler.timesteps must have one entry a step: got {list(self.timesteps)} for {self.num_steps} steps")

    def build(self) -> Any:
        """The diffusers scheduler itself."""
        return getattr(diffusers, self.scheduler)(**self.config)

    def to_json(self) -> SamplerRow:
        """What an adapter's file and the report hold; the step count is the key it is stored under."""
        return SamplerRow(
            scheduler=self.scheduler,
            config=dict(self.config),
            eta=self.eta,
            guidance_scale=self.guidance_scale,
            timesteps=None if self.timesteps is None else list(self.timesteps),
        )

    @classmethod
    def from_json(cls, num_steps: int | str, row: Mapping[str, Any]) -> "Sampler":
        """Raises ValueError for a row that is not one of ours, naming what is wrong."""
        if different := SamplerRow.__annotations__.keys() ^ row.keys():
            raise ValueError(f"the sampler recipe for {num_steps} steps has missing or unknown keys: {sorted(different)}")
        timesteps = None if row["timesteps"] is None else tuple(int(t) for t in row["timesteps"])
        return cls(**{**row, "num_steps": int(num_steps), "timesteps": timesteps})


Recipe = dict[int, Sampler]


def recipe_to_json(recipe: Recipe) -> SamplerRecipe:
    return {str(num_steps): row.to_json() for num_steps, row in recipe.items()}


def recipe_from_json(rows: Mapping[str, Mapping[str, Any]]) -> Recipe:
    return {int(num_steps): Sampler.from_json(num_steps, row) for num_steps, row in rows.items()}


def teacher_row(base: Mapping[str, Any], num_steps: int, guidance_scale: float) -> Sampler:
    """DDIM with trailing spacing, from the top timestep to alpha(0): the un-distilled teacher's sampler."""
    config = _config("DDIMScheduler", base, timestep_spacing="trailing")
    return Sampler(num_steps=num_steps, scheduler="DDIMScheduler", config=config, eta=0.0, guidance_scale=guidance_scale)


def tcd_row(base: Mapping[str, Any], num_steps: int, *, solver_steps: int, eta: float, start: int | None = None) -> Sampler:
    """TCD on the solver's grid, so that every step ends on a segment's edge; with eta 0 it is DDIM on that grid.

    `start` moves the first timestep, and the further ones in proportion, each to the nearest point of the grid.
    """
    config = _config("TCDScheduler", base, original_inference_steps=solver_steps)
    timesteps = None if start is None else _from(start, num_steps, config)
    return Sampler(num_steps=num_steps, scheduler="TCDScheduler", config=config, eta=eta, timesteps=timesteps)


def lcm_row(base: Mapping[str, Any], num_steps: int, *, solver_steps: int, start: int | None = None) -> Sampler:
    """LCM's multistep sampling on the solver's grid: what a single-stage consistency adapter is used with; `start` as in `tcd_row`."""
    config = _config("LCMScheduler", base, original_inference_steps=solver_steps)
    timesteps = None if start is None else _from(start, num_steps, config)
    return Sampler(num_steps=num_steps, scheduler="LCMScheduler", config=config, timesteps=timesteps)


def _from(start: int, num_steps: int, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Evenly spaced timesteps from `start` down, on the solver's grid."""
    stride = config["num_train_timesteps"] // config["original_inference_steps"]
    top = (start + 1) / stride
    return tuple(round(top * (1 - i / num_steps)) * stride - 1 for i in range(num_steps))


def stage_recipe(
    base: Mapping[str, Any],
    step_counts: Sequence[int],
    *,
    solver_steps: int,
    eta: float = 1.0,
    start: int | None = None,
    guidance: float = 1.0,
) -> Recipe:
    """The recipe of an adapter made for these step counts.

    One step begins at `start`, the others have `eta`: 0 for an adapter of k > 1 segments at k steps. For one step alone: LCM's, whose
    single timestep is `start` itself, on the solver's grid or not. `guidance` is 1, off, unless the adapter was trained without
    guidance in it.
    """
    tcd = partial(tcd_row, base, solver_steps=solver_steps)
    if tuple(step_counts) == (1,):
        top = base["num_train_timesteps"] - 1 if start is None else start
        rows = {1: replace(lcm_row(base, 1, solver_steps=solver_steps), timesteps=(top,))}
    else:
        counts = [n for n in step_counts if n <= solver_steps]
        rows = {n: tcd(1, eta=0.0, start=start) if n == 1 else tcd(n, eta=eta) for n in counts}
    return {n: replace(row, guidance_scale=guidance) for n, row in rows.items()}


def _config(scheduler: str, base: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """The pipeline's own betas and prediction type; nothing is clipped, and the clean end is alpha(0), as in training."""
    ends = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": False}
    built = getattr(diffusers, scheduler).from_config(dict(base), **ends, **overrides)
    config = {name: built.config[name] for name in sorted(_parameters(scheduler))}
    betas = config.get("trained_betas")
    return config | {"trained_betas": None if betas is None else [float(beta) for beta in betas]}


def _parameters(scheduler: str) -> set[str]:
    return set(inspect.signature(getattr(diffusers, scheduler).__init__).parameters) - {"self"}


@torch.no_grad()  # not inference_mode: weights that ZeRO-3 gathers under it are lost for training
def sample(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    row: Sampler,
    *,
    seed: int,
    index: Sequence[int] | None = None,
    negatives: Sequence[str] | None = None,
    image_size: int | None = None,
    batch_size: int = 64,
    advance: Callable[[int], Any] | None = None,
) -> Tensor:
    """Clean latents (len(prompts), C, H, W), float32 on the CPU, by the pipeline's own `__call__`; `decode` makes images of them.

    Sample i starts from the noise of (seed, index[i]), by default index[i] = i.
    `negatives` are negative prompts, for guidance above 1. `advance(n)` is told after every batch of n.
    """
    index = range(len(prompts)) if index is None else index
    shape, latents = latent_shape(pipe, image_size), []
    with _scheduler(pipe, row):
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            texts = list(prompts[rows]), None if negatives is None else list(negatives[rows])
            latents.append(_sample_batch(pipe, texts, row, seed, list(index[rows]), shape, image_size))
            if advance is not None:
                advance(len(latents[-1]))
    return torch.cat(latents) if latents else torch.zeros(0, *shape)


def _sample_batch(
    pipe: Any,
    texts: tuple[list[str], list[str] | None],
    row: Sampler,
    seed: int,
    index: list[int],
    shape: tuple[int, ...],
    image_size: int | None,
) -> Tensor:
    noise = normal((seed, Purpose.SAMPLE), index, shape)
    grid = {"num_inference_steps": row.num_steps} if row.timesteps is None else {"timesteps": list(row.timesteps)}
    prompts, negatives = texts
    output = pipe(
        prompts,
        negative_prompt=negatives,
        height=image_size,
        width=image_size,
        latents=noise.to(pipe.device, pipe.unet.dtype),
        generator=[generator(seed, Purpose.SAMPLE, i, 1) for i in index],  # the sampler's own noise, where eta > 0
        guidance_scale=row.guidance_scale,
        eta=row.eta or 0.0,
        output_type="latent",
        **grid,
    )
    return output.images.float().cpu()


def own_samples(teacher: Teacher, cfg: TeacherConfig, prompts: Sequence[str], index: Sequence[int], num_steps: int, seed: int) -> Tensor:
    """The teacher's own latents (len(prompts), C, H, W) in the middle of its range of guidance: x0 where there are no images."""
    row = teacher_row(teacher.pipeline.scheduler.config, num_steps, (cfg.guidance.min + cfg.guidance.max) / 2)
    with quiet():
        return sample(teacher.pipeline, prompts, row, seed=seed, index=index, image_size=teacher.image_size).clone()


@torch.inference_mode()
def decode(pipe: Any, latents: Tensor, batch_size: int = 64) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], float32 on the CPU."""
    vae = pipe.vae
    scaled = latents / vae.config.scaling_factor
    images = [vae.decode(chunk.to(pipe.device, vae.dtype)).sample.float().cpu() for chunk in scaled.split(batch_size)]
    return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


def latent_shape(pipe: Any, image_size: int | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the pipeline's latents at an image size in pixels, by default the pipeline's own."""
    config = pipe.unet.config
    side = config.sample_size if image_size is None else image_size // pipe.vae_scale_factor
    return config.in_channels, side, side


def draw_images(cfg: SampleConfig) -> list[Path]:
    """Draw `num_images` images of a prompt with the sampler that the LoRA's file names for `steps`, and save them as PNG files.

    Raises ValueError, before a weight is loaded, for a file of another teacher, a step count it has no sampler for, or a taken name.
    """
    facts = inspect_teacher(cfg.teacher)
    recipe = None if cfg.lora is None else read_recipe(Path(cfg.lora), facts.fingerprint)
    steps = _num_steps(cfg, recipe)
    files = _files(cfg, steps)
    pipe = load_sampler(cfg.teacher, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    middle = (cfg.teacher.guidance.min + cfg.teacher.guidance.max) / 2
    row = teacher_row(pipe.scheduler.config, steps, middle) if recipe is None else recipe[steps]
    with adapter(pipe, None if cfg.lora is None else Path(cfg.lora)):
        latents = sample(pipe, [cfg.prompt] * cfg.num_images, row, seed=cfg.seed, image_size=cfg.teacher.image_size, batch_size=4)
    pixels = decode(pipe, latents, batch_size=1).permute(0, 2, 3, 1).numpy()
    for file, image in zip(files, pipe.image_processor.numpy_to_pil(pixels), strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("xb") as stream:
            image.save(stream, format="PNG")
    return files


def read_recipe(file: Path, fingerprint: Mapping[str, Any]) -> Recipe:
    """How a LoRA file is sampled. Raises ValueError for a file of another base model, and for one that does not say."""
    header = inspect_lora(file, key="lora")
    header.require_base(fingerprint)
    if header.info is None or not header.info.recipe:
        raise ValueError(f"lora={file} carries no sampler recipe (metadata {SAMPLER_KEY}), so how to sample with it is unknown")
    return recipe_from_json(header.info.recipe)


def _num_steps(cfg: SampleConfig, recipe: Recipe | None) -> int:
    if recipe is None:
        return cfg.steps or _USUAL_STEPS
    steps = cfg.steps or (_USUAL_STEPS if _USUAL_STEPS in recipe else max(recipe))
    if steps not in recipe:
        raise ValueError(f"steps={steps}: lora={cfg.lora} is made for {' or '.join(map(str, recipe))} steps")
    return steps


def _files(cfg: SampleConfig, steps: int) -> list[Path]:
    """Names that are free: out itself if it is a .png, else files in that directory named after what is drawn."""
    out = Path(cfg.out)
    if out.suffix.lower() == ".png":
        files = [out] if cfg.num_images == 1 else [out.with_stem(f"{out.stem}_{i}") for i in range(cfg.num_images)]
        if taken := [file for file in files if file.exists()]:
            raise ValueError(f"out={cfg.out}: {taken[0]} exists; give another name, or a directory")
        return files
    words = "_".join(re.findall(r"\w+", cfg.prompt))[:80].rstrip("_") or "empty_prompt"
    numbers = itertools.count()
    free = (file for file in (out / f"{words}_{steps}steps_seed{cfg.seed}_{i}.png" for i in numbers) if not file.exists())
    return list(itertools.islice(free, cfg.num_images))


@contextmanager
def adapter(pipe: Any, file: Path | None) -> Iterator[None]:
    """Run the pipeline with a LoRA file; on exit the network is bitwise what it was. None: the teacher.

    In float32 the LoRA is fused into the network; half precision would round most of a small change away, so there it runs beside it.
    """
    if file is None:
        yield
        return
    net = pipe.unet
    original = {name: value.detach().clone() for name, value in net.state_dict().items()} if net.dtype == torch.float32 else None
    try:
        with quiet():  # else it warns, every time, that a UNet LoRA has nothing for the text encoder
            pipe.load_lora_weights(str(file), use_safetensors=True)
            if original is not None:
                pipe.fuse_lora(components=["unet"])
                pipe.unload_lora_weights()  # leaves the fused weights and removes peft's layers
        yield
    finally:
        pipe.unload_lora_weights()
        if original is not None:
            net.load_state_dict(original)  # subtracting the LoRA again would leave rounding errors behind


@contextmanager
def quiet() -> Iterator[None]:
    """Keep diffusers' warnings to itself."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


@contextmanager
def _scheduler(pipe: Any, row: Sampler) -> Iterator[None]:
    previous, log = pipe.scheduler, logging.getLogger("diffusers.schedulers.scheduling_tcd")
    level, bar = log.level, getattr(pipe, "_progress_bar_config", {})
    pipe.scheduler = row.build()
    pipe.set_progress_bar_config(disable=True)
    log.setLevel(logging.ERROR)  # a start below the top timestep is meant, and would be warned of in every batch
    try:
        yield
    finally:
        pipe.scheduler = previous
        pipe.set_progress_bar_config(**bar)
        log.setLevel(level)
