"""Rebuild the embedded teacher and the judge on a CPU: `python -m tools.embedded_teacher`.

About an hour and a quarter on one core. Every part goes on from its own last save after any stop; delete the work directory to start anew.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from tools.embedded_teacher.judge import measure_judge, train_judge
from tools.embedded_teacher.measure import measure_teacher
from tools.embedded_teacher.text import build_text_encoder, train_text_encoder, write_tokenizer
from tools.embedded_teacher.trainer import Plan
from tools.embedded_teacher.unet import build_unet, noise_schedule, train_unet
from tools.embedded_teacher.vae import psnr, train_decoder, train_vae

STEPS = {"vae": 2400, "decoder": 500, "judge": 1400, "text": 1200, "unet": 4500}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("outputs/embedded_teacher"))
    parser.add_argument("--out", type=Path, default=Path("assets"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    vae = train_vae(args.workdir, STEPS["vae"])
    train_decoder(vae, args.workdir, STEPS["decoder"])
    judge = train_judge(args.workdir, STEPS["judge"])
    judge.save(args.out / "judge", {**measure_judge(judge), "steps": STEPS["judge"]})
    tokenizer = write_tokenizer(args.workdir / "tokenizer")
    torch.manual_seed(0)
    text_encoder, unet = build_text_encoder(tokenizer), build_unet()
    train_text_encoder(tokenizer, text_encoder, args.workdir, STEPS["text"])
    plan = Plan(name="unet", steps=STEPS["unet"], lr=1e-3, ema_decay=0.998, weight_decay=0.01)
    train_unet(unet, vae, text_encoder, tokenizer, args.workdir, plan)
    save_pipeline(args.out / "teacher", vae, text_encoder, tokenizer, unet)
    figures = {"vae_psnr_db": psnr(vae.float()), "steps": STEPS, **measure_teacher(args.out)}
    (args.out / "teacher" / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


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
