"""What reward hacking looks like: `python -m tools.embedded_reward.figure FREE_RUN GUARDED_RUN BEFORE.safetensors OUT.png`.

The rewards of two runs of one feedback stage over its steps, and one-step images of a few prompts before it, after the run without
a guard's end, and of the adapter that the guard kept.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hyper_sd.evaluate import read_run
from hyper_sd.measure import HELDOUT, make_draw
from hyper_sd.report import draw_grid
from hyper_sd.sample import adapter, decode, quiet, read_recipe, sample
from hyper_sd.teachers import inspect_teacher, load_pipeline

SIZE = (560, 260)
COLORS = {"trained": (200, 40, 50), HELDOUT: (30, 100, 180)}
PROMPTS = 6


def main(free: Path, guarded: Path, before: Path, out: Path) -> None:
    torch.set_num_threads(1)
    columns = {"before": before, "no guard": free / "lora.safetensors", "guard": guarded / "lora.safetensors"}
    grid = images(free, columns)
    curves = [curve(run, title) for run, title in ((free, "no guard"), (guarded, "guard: patience 3"))]
    whole = Image.new("RGB", (max(grid.width, SIZE[0]), sum(part.height for part in (*curves, grid))), "white")
    top = 0
    for part in (*curves, grid):
        whole.paste(part, (0, top))
        top += part.height
    whole.save(out, optimize=True)


def images(run_dir: Path, columns: dict[str, Path]) -> Image.Image:
    """One-step images of each file for the same prompts and noise."""
    run = read_run(run_dir)
    pipe, fingerprint = load_pipeline(run.teacher), inspect_teacher(run.teacher).fingerprint
    draw = make_draw(run.eval, 0, PROMPTS)
    cells: dict[str, Tensor] = {}
    for name, file in columns.items():
        with quiet(), adapter(pipe, file):
            cells[name] = decode(pipe, sample(pipe, draw.prompts, read_recipe(file, fingerprint)[1], seed=draw.seed), PROMPTS)
    return draw_grid(cells, draw.prompts)


def curve(run_dir: Path, title: str) -> Image.Image:
    """The trained rewards and the held-out one over a stage's steps, on one scale."""
    history = json.loads((run_dir / "refl" / "guard.json").read_text())["history"]
    values = [row[name] for row in history for name in COLORS]
    low, span, last = min(values), max(max(values) - min(values), 1e-9), history[-1]["step"]
    image = Image.new("RGB", SIZE, "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(size=15)
    left, right, up, down = 60, SIZE[0] - 20, 40, SIZE[1] - 35
    canvas.rectangle((left, up, right, down), outline="gray")
    for name, color in COLORS.items():
        points = [(left + (right - left) * row["step"] / last, down - (down - up) * (row[name] - low) / span) for row in history]
        canvas.line(points, fill=color, width=3)
    canvas.text((left, 12), f"{title}: trained reward (red), held-out reward (blue)", "black", font)
    canvas.text((5, up), f"{low + span:.2f}", "black", font)
    canvas.text((5, down - 15), f"{low:.2f}", "black", font)
    canvas.text((left, down + 8), "step 0", "black", font)
    canvas.text((right - 60, down + 8), f"step {last:g}", "black", font)
    return image


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
