"""A whole UNet written from a run is the base with its adapter, and samples as its recipe says."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from hyper_sd.config import TeacherConfig
from hyper_sd.fused import export_fused
from hyper_sd.randomness import Purpose, normal
from hyper_sd.sample import recipe_from_json, sample, stage_recipe
from hyper_sd.teachers import load_pipeline, load_teacher
from tests.adapters import ADAPTER, teacher_config, write_adapter
from tests.tiny import BETAS, tiny_sd15, tiny_sdxl

PROMPTS = ["a red circle", "a blue square on a red background"]


def make_run(config: TeacherConfig, path: Path):
    """A finished run of a one-step model that starts at 800, as far as the export reads it; and its training network."""
    teacher = {"family": config.family, "path": config.path, "guidance": {"min": 4, "max": 8}}
    path.mkdir()
    (path / "config.yaml").write_text(json.dumps({"teacher": teacher}))  # json is yaml
    return write_adapter(path / "lora.safetensors", config, stage_recipe(BETAS, (1,), solver_steps=40, start=800))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_one_step_of_the_fused_unet_is_one_jump_of_the_student(family: str, tmp_path: Path) -> None:
    config = teacher_config(tiny_sd15(tmp_path / "teacher") if family == "sd15" else tiny_sdxl(tmp_path / "teacher"), family)
    denoiser = make_run(config, tmp_path / "run")
    out, error = export_fused(tmp_path / "run", stage=None, dtype="fp32", out=None)
    assert out == tmp_path / "run" / "unet_fp32" and error <= 1e-4
    row = recipe_from_json(json.loads((out / "sampler.json").read_text()))[1]
    assert row.scheduler == "LCMScheduler" and row.timesteps == (800,)

    pipe = load_pipeline(config)
    pipe.unet = UNet2DConditionModel.from_pretrained(out)
    found = sample(pipe, PROMPTS, row, seed=7)
    teacher = load_teacher(config, torch.device("cpu"), torch.float32)
    noise = normal((7, Purpose.SAMPLE), range(2), teacher.latent_shape)
    with torch.no_grad():
        expected = denoiser((ADAPTER,), noise, torch.full((2,), 800), teacher.encode_prompts(PROMPTS)).x0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_half_precision_and_a_directory_that_exists(tmp_path: Path) -> None:
    config = teacher_config(tiny_sd15(tmp_path / "teacher"))
    make_run(config, tmp_path / "run")
    out, error = export_fused(tmp_path / "run", stage=None, dtype="fp16", out=tmp_path / "unet")
    weights = load_file(out / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16} and 0 < error < 1e-2
    (tmp_path / "any").mkdir()
    (tmp_path / "any" / "file").touch()
    assert out.stat().st_mode == (tmp_path / "any").stat().st_mode
    assert {path.stat().st_mode for path in out.iterdir()} == {(tmp_path / "any" / "file").stat().st_mode}
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"out=.*exists"):
        export_fused(tmp_path / "run", stage=None, dtype="fp16", out=out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
