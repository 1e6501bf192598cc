"""Rebuild the embedded teacher and the judge on a CPU: `python -m tools.embedded_teacher`.

About two hours on two cores. Every part goes on from its own last save after any stop; delete the work directory to start anew.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from hyper_sd.data.scenes import Scenes, sample_scenes
from tools.embedded_teacher.judge import measure_judge, train_judge
from tools.embedded_teacher.measure import measure_teacher
from tools.embedded_teacher.text import build_text_encoder, train_text_encoder, write_tokenizer
from tools.embedded_teacher.trainer import Plan
from tools.embedded_teacher.unet import build_unet, noise_schedule, train_unet
from tools.embedded_teacher.vae import psnr, train_vae

STEPS = {"vae": 2600, "judge": 1400, "text": 1200, "unet": 4500, "text_open": 900, "unet_open": 2000, "unet_restart": 1600}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("outputs/embedded_teacher"))
    parser.add_argument("--out", type=Path, default=Path("assets"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    vae = train_vae(args.workdir, STEPS["vae"])
    judge = train_judge(args.workdir, STEPS["judge"])
    judge.save(args.out / "judge", {**measure_judge(judge), "steps": STEPS["judge"]})
    tokenizer = write_tokenizer(args.workdir / "tokenizer")
    text_encoder, unet = train_conditional(vae, tokenizer, args.workdir)
    save_pipeline(args.out / "teacher", vae, text_encoder, tokenizer, unet)
    figures = {"vae_psnr_db": psnr(vae.float()), "steps": STEPS, **measure_teacher(args.out)}
    (args.out / "teacher" / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def train_conditional(vae: AutoencoderKL, tokenizer: CLIPTokenizer, workdir: Path) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Text encoder and UNet: first on captions that state everything, then on those that leave much open."""
    torch.manual_seed(0)
    text_encoder, unet = build_text_encoder(tokenizer), build_unet()
    for name, captioned, lr in (("", sample_all_stated, 1e-3), ("_open", sample_scenes, 7e-4), ("_restart", sample_scenes, 6e-4)):
        if f"text{name}" in STEPS:
            train_text_encoder(tokenizer, text_encoder, captioned, workdir, f"text{name}", STEPS[f"text{name}"])
        plan = Plan(name=f"unet{name}", steps=STEPS[f"unet{name}"], lr=lr, warmup=100, ema_decay=0.998, weight_decay=0.01)
        train_unet(unet, vae, text_encoder, tokenizer, captioned, workdir, plan)
    return text_encoder, unet


def sample_all_stated(seed: int, index: np.ndarray) -> Scenes:
    return sample_scenes(seed, index).fully_stated()


def save_pipeline(
    path: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> None:
    """Write a StableDiffusionPipeline directory with float16 weights."""
    scheduler = DDIMScheduler.from_config(noise_schedule().config, timestep_spacing="trailing", set_alpha_to_one=False)
    StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)


if __name__ == "__main__":
    main()
