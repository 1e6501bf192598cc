"""Export of a whole UNet: the base with an adapter fused into it, for users of a model and not of a LoRA."""

import json
import shutil
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from hyper_sd.export import TOLERANCE, LoraMismatch, adapter_output, call_unet, fixed_inputs, relative_error, run_adapter, run_pipeline
from hyper_sd.files import fsync, share
from hyper_sd.lora_file import DTYPES, LoraDtype
from hyper_sd.sample import adapter

RECIPE = "sampler.json"


def export_fused(run_dir: Path, *, stage: str | None, dtype: LoraDtype, out: Path | None) -> tuple[Path, float]:
    """Write a run's adapter fused into its base as a diffusers UNet directory with its sampler recipe beside it, as `sampler.json`.

    The written directory is loaded again and compared with the network that runs the adapter unfused, before it gets its name.
    Returns it and the relative error; raises ValueError, naming the key, before the teacher is loaded, and LoraMismatch.
    """
    source, info = run_adapter(run_dir, stage)
    out = out or source.with_name(f"unet_{dtype}")
    if out.exists():
        raise ValueError(f"out={out} exists; give the name of a new directory")
    pipeline = run_pipeline(run_dir)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    with adapter(pipeline, source):
        deepcopy(pipeline.unet).to(DTYPES[dtype]).save_pretrained(partial)
    (partial / RECIPE).write_text(json.dumps(info.recipe, indent=1) + "\n")
    error = _verify(partial, pipeline, source, TOLERANCE[DTYPES[dtype]])
    for path in (*partial.iterdir(), partial):
        share(path)
        fsync(path)
    partial.rename(out)
    return out, error


@torch.no_grad()
def _verify(directory: Path, pipeline: Any, source: Path, tolerance: float) -> float:
    """The largest relative error of the written UNet against the base running the adapter in float32."""
    written = type(pipeline.unet).from_pretrained(directory, torch_dtype=torch.float32).eval()
    inputs = fixed_inputs(written, pipeline.scheduler.config.num_train_timesteps)
    error = relative_error(call_unet(written, *inputs), adapter_output(pipeline, source, inputs)).max().item()
    if not error <= tolerance:
        shutil.rmtree(directory)
        raise LoraMismatch(f"the fused UNet is off by {error:.2e} of its output's norm, allowed are {tolerance:.2e}")
    return error
