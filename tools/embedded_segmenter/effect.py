"""What a LoRA changes in the segmenter's loss on images that were noised and denoised: `python -m tools.embedded_segmenter.effect A B`.

A and B are LoRA files of the embedded teacher. Both denoise the same noised scenes, which neither was trained on, with the same noise, to
the last step of each rollout that the images enter.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyper_sd.cli import compose
from hyper_sd.config import SegmenterConfig, run_config
from hyper_sd.data.scenes import IMAGE_SIZE, SHAPES, captions, render, sample_scenes
from hyper_sd.data.scenes_data import scene_instances
from hyper_sd.denoiser import Denoiser
from hyper_sd.lora_file import read_lora
from hyper_sd.objective import Batch
from hyper_sd.randomness import Draws
from hyper_sd.report import save_grid
from hyper_sd.rewards.segmenter import EMBEDDED, build_segmenter
from hyper_sd.roles import Roles
from hyper_sd.stages.refl import ReFL
from hyper_sd.stages.rollout import STUDENT
from hyper_sd.teachers import Teacher, load_teacher

SEED = 4211  # of scenes and noise; no training uses it
CPU = torch.device("cpu")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs=2, type=Path, metavar="LORA")
    parser.add_argument("--scenes", type=int, default=512)
    parser.add_argument("--rollout", type=int, nargs="*", default=[1, 2, 4], help="step counts")
    parser.add_argument("--start", type=int, default=899, help="where one step starts, and the highest timestep images are noised to")
    parser.add_argument("--grid", type=Path, help="a PNG of the first eight scenes as A and B denoise them in the first of the rollouts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scenes = sample_scenes(SEED, np.arange(args.scenes))
    images, objects = render(scenes), scene_instances(scenes, IMAGE_SIZE)
    segmenter = build_segmenter(SegmenterConfig(path=EMBEDDED, file="model.safetensors"), SHAPES, CPU)
    print(f"renders: {segmenter.loss(images, objects).mean():.3f}", flush=True)
    teachers = [load_teacher(run_config(compose("train", [])).teacher, CPU, torch.float32) for _ in args.files]
    denoisers = [_denoiser(teacher, file) for teacher, file in zip(teachers, args.files, strict=True)]
    for steps in args.rollout:
        rollout: dict[str, Any] = {"perceptual_rollout": (steps,), "perceptual_start": args.start, "start": args.start}
        stage = ReFL(adapter="student", trained_step="last", perceptual_weight=1.0, **rollout)
        shown = [_denoised(stage, *pair, images, captions(scenes)) for pair in zip(denoisers, teachers, strict=True)]
        before, after = (segmenter.loss(one, objects) for one in shown)
        change = after - before
        error = change.std() / len(change) ** 0.5
        print(f"{steps} steps: {before.mean():.3f} -> {after.mean():.3f}, change {change.mean():+.3f} +- {error:.3f}", flush=True)
        if args.grid and steps == args.rollout[0]:
            columns = {"render": images, "before": shown[0], "after": shown[1]}
            save_grid(args.grid, {name: column[:8] for name, column in columns.items()}, captions(scenes)[:8])


def _denoiser(teacher: Teacher, file: Path) -> Denoiser:
    names = [path for path, _ in teacher.net.named_modules()]
    lora = read_lora(file, names)
    roles = Roles(teacher.net, lora.spec, (STUDENT,))
    roles.load_state_dict(STUDENT, lora.tensors)
    return Denoiser(teacher.forward, roles, teacher.schedule, teacher.prediction)


def _denoised(stage: ReFL, denoiser: Denoiser, teacher: Teacher, images: Tensor, prompts: list[str]) -> Tensor:
    """What the student makes of the images, noised: the decoded x0 at the step of the stage's perceptual term."""
    cond, uncond = teacher.encode_prompts(prompts), teacher.uncond(len(prompts))
    batch = Batch(teacher.encode_images(images), cond, uncond, Draws(SEED, 0, tuple(range(len(prompts)))))
    return teacher.decode(denoiser(stage.student_role, *stage.perceptual_input(denoiser, batch), cond).x0)


if __name__ == "__main__":
    main()
