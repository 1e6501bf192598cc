"""What the finished teacher reaches: reconstructions, accuracy and Fréchet distance by number of steps, through the stock pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from hyper_sd.data.scenes import captions, render, sample_scenes
from hyper_sd.judge import Judge, all_right
from hyper_sd.metrics import Gaussian, frechet_jackknife

SEED = 51
GUIDANCES = (2.0, 3.0, 4.0)
FEW_STEP_GUIDANCES = (1.0, 1.5, 2.0, 3.0)


@torch.inference_mode()
def measure_teacher(assets: Path, num: int = 1000) -> dict[str, Any]:
    """Accuracy of reconstructions, and [accuracy, Fréchet distance] by steps and guidance on `num` prompts."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(assets / "teacher", dtype=torch.float32, use_safetensors=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    judge = Judge.load(assets / "judge")
    scenes = sample_scenes(SEED, np.arange(num))
    labels, prompts = scenes.labels(), captions(scenes)
    reference = Gaussian.fit(torch.cat([judge.features(render(sample_scenes(SEED + 1 + i, np.arange(512)))) for i in range(16)]))
    decoded = []
    for pixels in render(scenes).split(64):
        decoded.append((pipe.vae.decode(pipe.vae.encode(2 * pixels - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1))
    figures: dict[str, Any] = {"reconstructions_right": _accuracy(judge, torch.cat(decoded), labels)}
    for steps, guidances in ((25, GUIDANCES), (2, FEW_STEP_GUIDANCES), (1, FEW_STEP_GUIDANCES)):
        for guidance in guidances:
            draw = torch.Generator().manual_seed(SEED)
            images = []
            for start in range(0, num, 50):
                part = prompts[start : start + 50]
                output = pipe(part, num_inference_steps=steps, guidance_scale=guidance, generator=draw, output_type="pt")
                images.append(output.images)
            result = torch.cat(images)
            frechet = frechet_jackknife(judge.features(result), reference).value
            figures[f"{steps} steps, guidance {guidance}"] = [round(_accuracy(judge, result, labels), 4), round(frechet, 4)]
    return figures


def _accuracy(judge: Judge, images: torch.Tensor, labels: torch.Tensor) -> float:
    return all_right(judge.attributes(images), labels).float().mean().item()
