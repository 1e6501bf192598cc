"""Export: an adapter to a LoRA file that a stock diffusers pipeline has loaded and that was found to do what the training network does."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from diffusers.utils import logging
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from hyper_sd.config import TeacherConfig
from hyper_sd.denoiser import Forward
from hyper_sd.guidance import Cond
from hyper_sd.lora_file import DTYPES, LoraDtype, LoraFormat, inspect_lora, read_lora, save_lora
from hyper_sd.lora_metadata import LoraInfo, SamplerRecipe
from hyper_sd.merge import concatenated, truncated
from hyper_sd.roles import LoraSpec, Role, Roles
from hyper_sd.structured import structured
from hyper_sd.teachers import TeacherFacts, load_pipeline

# Largest ||file - trained|| / ||trained|| of the UNet's output, by the file's dtype,
TOLERANCE: dict[torch.dtype, float] = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_OF_EFFECT = 0.05  # as a share of what the adapter changes at all: a young adapter that is not applied must not pass,
_OF_ROUNDING = 4.0  # and relative to what half precision rounds away without the adapter; with it, it was 1.2 to 1.4 times as much
PARTS = "parts"
_SIDE, _TOKENS = 16, 8  # of the check's inputs: adapters do not depend on sizes, and a check at full size costs as much as a training step


class LoraMismatch(ValueError):
    """A written LoRA file does not do what the trained adapter does."""


def lora_info(facts: TeacherFacts, *, stage: str, recipe: SamplerRecipe, extra: Mapping[str, str] | None = None) -> LoraInfo:
    """What a LoRA trained on this teacher says about itself; `extra` holds further metadata such as ss_steps or ss_seed."""
    return LoraInfo(
        base_model=facts.name,
        architecture=facts.architecture,
        prediction=facts.prediction,
        image_size=facts.image_size,
        fingerprint=facts.fingerprint,
        stage=stage,
        recipe=recipe,
        extra=extra or {},
    )


def export_lora(
    path: Path,
    tensors: Mapping[str, Tensor],
    spec: LoraSpec,
    info: LoraInfo,
    *,
    pipeline: Any,
    trained: Forward,
    untrained: Forward | None = None,
    format: LoraFormat = "kohya",
    dtype: LoraDtype = "fp32",
) -> float:
    """Write a LoRA file, verify it (see `verify_lora`), and only then give it its name; returns the relative error.

    The rounding of a network that computes in half precision (`untrained` is given) would hide a small adapter that is missing or of a
    wrong alpha, so such a file is also verified against W + alpha / rank B A in float32, and that error is returned.
    """
    errors: list[float] = []

    def check(file: Path) -> None:
        errors.append(verify_lora(file, pipeline, trained, untrained))
        if untrained is not None:
            errors[0] = verify_lora(file, pipeline, added(pipeline.unet, tensors, spec))

    save_lora(path, tensors, spec, info, format=format, dtype=dtype, check=check)
    return errors[0]


@torch.no_grad()
def verify_lora(path: Path, pipeline: Any, trained: Forward, untrained: Forward | None = None) -> float:
    """Load a LoRA file into a stock float32 pipeline and compare the UNet's output with the training network's on four fixed inputs.

    `trained(x_t, t, cond)` runs the training network under the exported role, on the pipeline's device. Where it computes in half
    precision, `untrained` runs it without an adapter: what it is off by then is its rounding. Returns the largest
    ||file - trained|| / ||trained||; raises LoraMismatch if it exceeds TOLERANCE (1e-3 for a float32 file) or 5 % of what the adapter
    changes in the output, or four times that rounding where this is more. The pipeline is given back without the LoRA, before the
    training network is called.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # its rounding is as large as the tolerance
        return _verify(path, pipeline, trained, untrained)


def _verify(path: Path, pipeline: Any, trained: Forward, untrained: Forward | None) -> float:
    unet = pipeline.unet
    inputs = fixed_inputs(unet, pipeline.scheduler.config.num_train_timesteps)
    base = call_unet(unet, *inputs)
    num_modules = _load(pipeline, path)
    try:
        loaded = call_unet(unet, *inputs)
    finally:
        pipeline.unload_lora_weights()
    expected = trained(*inputs).float()
    rounding = 0.0 if untrained is None else _OF_ROUNDING * relative_error(untrained(*inputs).float(), base).max().item()
    header = inspect_lora(path, key="file")
    if num_modules != len(header.modules):
        raise LoraMismatch(f"a stock pipeline took up {num_modules} of the {len(header.modules)} modules in the LoRA file")
    error, effect = relative_error(loaded, expected), relative_error(base, expected)
    tolerance = TOLERANCE[DTYPES[header.dtype]]
    allowed = max(rounding, min(tolerance, max(_OF_EFFECT * effect.max().item(), tolerance / 10)))
    if not error.max().item() <= allowed:
        raise LoraMismatch(
            "the LoRA file does not do what the trained network does: in a stock pipeline the UNet's output is off by "
            f"{error.max().item():.2e} of its norm, allowed are {allowed:.2e} ({header.format} keys, {header.dtype}); "
            f"the adapter changes it by {effect.max().item():.2e}"
        )
    return error.max().item()


def added(unet: Any, tensors: Mapping[str, Tensor], spec: LoraSpec) -> Forward:
    """A UNet's answers with alpha / rank B A x added to what every layer that an adapter has a part for makes of its input x."""
    scale = spec.alpha / spec.rank

    def adds(a: Tensor, b: Tensor) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            if isinstance(layer, nn.Conv2d):
                low = functional.conv2d(*inputs, a.to(output), None, layer.stride, layer.padding, layer.dilation)
                return output + scale * functional.conv2d(low, b.to(output))
            return output + scale * functional.linear(functional.linear(*inputs, a.to(output)), b.to(output))

        return hook

    @torch.no_grad()
    def forward(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with ExitStack() as hooks:
            for name, a in tensors.items():
                if ".lora_A." in name:
                    layer = unet.get_submodule(name.removesuffix(".lora_A.weight"))
                    hooks.enter_context(layer.register_forward_hook(adds(a, tensors[name.replace(".lora_A.", ".lora_B.")])))
            return call_unet(unet, x_t, t, cond)

    return forward


def export_run(run_dir: Path, *, stage: str | None, format: LoraFormat, dtype: LoraDtype, out: Path | None) -> tuple[Path, float]:
    """Convert the LoRA of a run's stage (null: of the whole run) and verify it; returns the file and its relative error.

    `out` null is a file beside the original, named after format and dtype. Raises ValueError, naming the key, before the
    teacher is loaded.
    """
    source, info = run_adapter(run_dir, stage)
    out = _beside(source, f"lora_{format}_{dtype}.safetensors", out)
    pipeline = run_pipeline(run_dir)
    file = read_lora(source, [path for path, _ in pipeline.unet.named_modules()], key="run")

    def trained(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return adapter_output(pipeline, source, (x_t, t, cond))

    return out, export_lora(out, file.tensors, file.spec, info, pipeline=pipeline, trained=trained, format=format, dtype=dtype)


def save_parts(folder: Path, roles: Roles, role: Role, info: LoraInfo) -> None:
    """One LoRA file for each adapter of a role, in `folder`/parts, so that they can be merged with other weights."""
    for adapter in role:
        save_lora(folder / PARTS / f"{adapter}.safetensors", roles.state_dict(adapter), roles.spec, info)


def export_merged(
    run_dir: Path,
    *,
    stage: str,
    weights: Mapping[str, float],
    merge: Literal["svd", "concat"],
    format: LoraFormat,
    dtype: LoraDtype,
    out: Path | None,
) -> tuple[Path, float, float]:
    """Merge the parts of a run's stage with these weights (a part that is not named keeps 1) and verify the file.

    `concat` is exact at the sum of the parts' ranks, `svd` the nearest at one part's. Returns the file, its relative error, and what the
    merge itself lost. Raises ValueError, naming the key, before the teacher is loaded.
    """
    source, info = run_adapter(run_dir, stage)
    files = {file.stem: file for file in sorted((source.parent / PARTS).glob("*.safetensors"))}
    if not files:
        raise ValueError(f"weights: stage={stage} of run={run_dir} is a single adapter, there is nothing to weigh")
    if unknown := sorted(weights.keys() - files.keys()):
        raise ValueError(f"weights: there is no {', '.join(unknown)}; the parts of stage={stage} are {', '.join(files)}")
    out = _beside(source, f"lora_{merge}_{format}_{dtype}.safetensors", out)
    pipeline = run_pipeline(run_dir)
    modules = [path for path, _ in pipeline.unet.named_modules()]
    parts = [read_lora(file, modules, key="run") for file in files.values()]
    merged, spec = concatenated([part.tensors for part in parts], [weights.get(name, 1.0) for name in files], parts[0].spec)
    lost = 0.0
    if merge == "svd":
        spec = parts[0].spec
        merged, lost = truncated(merged, spec.rank)

    def trained(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return _output(pipeline, merged, spec, (x_t, t, cond))

    return out, export_lora(out, merged, spec, info, pipeline=pipeline, trained=trained, format=format, dtype=dtype), lost


def _beside(source: Path, name: str, out: Path | None) -> Path:
    out = out or source.with_name(name)
    if out.suffix != ".safetensors" or out.resolve() == source.resolve():
        raise ValueError(f"out={out} must be another file than the run's own {source}, with the suffix .safetensors")
    return out


def run_adapter(run_dir: Path, stage: str | None) -> tuple[Path, LoraInfo]:
    """The LoRA file of a run's stage (None: of the whole run), and what it says about itself."""
    source = _source(run_dir, stage)
    info = inspect_lora(source, key="run").info
    if info is None:
        raise ValueError(f"run={run_dir}: {source} was not written by a training run")
    return source, info


def run_pipeline(run_dir: Path) -> Any:
    """A fresh stock pipeline of the teacher that the run was trained on."""
    return load_pipeline(_teacher_config(run_dir))


def adapter_output(pipeline: Any, file: Path, inputs: tuple[Tensor, Tensor, Cond]) -> Tensor:
    """What the pipeline's UNet, which then keeps the adapter's layers, answers under a LoRA file as the training network runs it."""
    lora = read_lora(file, [path for path, _ in pipeline.unet.named_modules()], key="run")
    return _output(pipeline, lora.tensors, lora.spec, inputs)


def _output(pipeline: Any, tensors: Mapping[str, Tensor], spec: LoraSpec, inputs: tuple[Tensor, Tensor, Cond]) -> Tensor:
    roles = Roles(pipeline.unet, spec, ("exported",))
    roles.load_state_dict("exported", tensors)
    with roles.use(("exported",)):
        return call_unet(pipeline.unet, *inputs)


def _source(run_dir: Path, stage: str | None) -> Path:
    source = (run_dir / stage if stage else run_dir) / "lora.safetensors"
    if not source.is_file():
        stages = sorted(file.parent.name for file in run_dir.glob("*/lora.safetensors"))
        key = f"stage={stage}" if stage else f"run={run_dir}"
        raise ValueError(f"{key}: there is no {source}; finished stages of this run: {', '.join(stages) or 'none'}")
    return source


def _teacher_config(run_dir: Path) -> TeacherConfig:
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise ValueError(f"run={run_dir}: there is no {file}, which says what teacher the run was trained on")
    return structured(TeacherConfig, yaml.safe_load(file.read_text())["teacher"], "teacher")


def _load(pipeline: Any, path: Path) -> int:
    """Load a LoRA into a pipeline; the number of modules that have taken it up."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else it warns, every time, that a UNet LoRA has nothing for the text encoder
    try:
        pipeline.load_lora_weights(str(path))
    finally:
        logging.set_verbosity(verbosity)
    return sum(isinstance(module, LoraLayer) for module in pipeline.unet.modules())


def fixed_inputs(unet: Any, num_steps: int) -> tuple[Tensor, Tensor, Cond]:
    """Four (x_t, t, cond) for any Stable Diffusion UNet, the same in every process; t spreads over the whole range."""
    config, generator = unet.config, torch.Generator().manual_seed(0)
    t = torch.linspace(0, num_steps - 1, 4).long()
    x_t = torch.randn(4, config.in_channels, _SIDE, _SIDE, generator=generator)
    cond = [torch.randn(4, _TOKENS, config.cross_attention_dim, generator=generator)]
    if config.addition_embed_type == "text_time":  # SDXL
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        cond += [torch.randn(4, pooled, generator=generator), torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]]).repeat(4, 1)]
    return x_t.to(unet.device), t.to(unet.device), tuple(c.to(unet.device) for c in cond)


def call_unet(unet: Any, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    text, *added = (c.to(unet.dtype) for c in cond)
    added_cond = {"text_embeds": added[0], "time_ids": added[1]} if added else None
    return unet(x_t.to(unet.dtype), t, encoder_hidden_states=text, added_cond_kwargs=added_cond).sample.float()


def relative_error(value: Tensor, reference: Tensor) -> Tensor:
    """||value - reference|| / ||reference|| by input, shape (B,)."""
    return (value - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
