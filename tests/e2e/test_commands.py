"""The commands of the README, as a user types them, with recipe=smoke on the embedded teacher."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from hyper_sd.lora_file import inspect_lora
from tests.runs import ROOT, STAGES, TSCD_STAGES, reached, wait_for

pytestmark = pytest.mark.slow


def run(script: str, *arguments: str, cwd: Path) -> str:
    """Started from another directory, so that nothing depends on the current one."""
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoke")
    run("train", "recipe=smoke", cwd=folder)
    return folder / "outputs" / "smoke"


def test_the_report_keeps_its_contract(smoke: Path) -> None:
    report = json.loads((smoke / "report.json").read_text())
    figures = {"accuracy", "frechet", "gap", "mse_to_teacher"}
    assert report["teacher"]["guidance"] == 2.0
    assert all(figures <= report["final"][steps].keys() for steps in ("1", "2", "4", "8"))
    assert {"1", "2", "4", "8"} <= report["teacher"].keys()
    assert all(stage.removeprefix("tscd_") in report["stages"][stage] for stage in TSCD_STAGES)
    assert report["stages"]["score"] == report["final"]
    assert {"prompts", "draws", "floor"} <= report["evaluation"].keys()
    assert report["engine"] == {"type": "plain", "world_size": 1, "backend": None, "device": report["engine"]["device"]}
    assert report["resumed_from"] == [] and report["wall_s"] > 0 and report["peak_rss_bytes"] > 0
    assert len(report["grid_prompts"]) > 0 and "final" in report["sampler"]
    assert (smoke / "report.html").stat().st_size > 10_000


def test_pictures(smoke: Path) -> None:
    for folder in (smoke, *(smoke / stage for stage in STAGES)):
        with Image.open(folder / "grid.png") as picture:
            assert picture.width > 300 and len(picture.getcolors(maxcolors=1 << 24) or []) > 100


def test_sample(smoke: Path, tmp_path: Path) -> None:
    prompt = "a large red circle at the top left and a small blue cross at the bottom right"
    run("sample", f"lora={smoke / 'lora.safetensors'}", f"prompt={prompt}", "steps=4", f"out={tmp_path / 'image.png'}", cwd=tmp_path)
    with Image.open(tmp_path / "image.png") as picture:
        assert picture.size == (32, 32)


def test_evaluate(smoke: Path, tmp_path: Path) -> None:
    small = ["eval.prompts=8", "eval.draws=1", "eval.sweep_prompts=0", "eval.teacher_steps=4", "eval.reference=64"]
    table = run("evaluate", f"lora={smoke / 'lora.safetensors'}", "steps=[1,2]", *small, cwd=tmp_path)
    assert "final, 2 steps" in table and "teacher, 4 steps" in table


def test_export(smoke: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    run("export", f"run={smoke}", "stage=tscd_2", "format=diffusers", "dtype=fp16", f"out={out}", cwd=tmp_path)
    with safe_open(out, framework="pt") as file:
        assert all(file.get_slice(name).get_dtype() == "F16" for name in file.keys())  # noqa: SIM118 - no dict


def test_export_of_the_feedback_at_another_weight(smoke: Path, tmp_path: Path) -> None:
    files = {}
    for weight, merge in ((1.0, "svd"), (0.0, "svd"), (0.5, "concat")):
        out = tmp_path / f"{merge}_{weight}.safetensors"
        said = run("export", f"run={smoke}", "stage=refl", f"weights={{feedback: {weight}}}", f"merge={merge}", f"out={out}", cwd=tmp_path)
        assert "which loses" in said
        files[weight] = products(out)
    trained, before = products(smoke / "refl" / "lora.safetensors"), products(smoke / "tscd_1" / "lora.safetensors")
    for name, value in trained.items():
        torch.testing.assert_close(files[1.0][name], value)
        torch.testing.assert_close(files[0.0][name], before[name])
        torch.testing.assert_close(files[0.5][name], (value + before[name]) / 2, rtol=0.2, atol=1e-4)  # the trained file is cut to the rank
    wrong = [sys.executable, str(ROOT / "scripts" / "export.py"), f"run={smoke}", "stage=refl", "weights={feedbak: 1}"]
    refused = subprocess.run(wrong, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "weights: there is no feedbak; the parts of stage=refl are feedback, student" in refused.stderr


def products(file: Path) -> dict[str, torch.Tensor]:
    """alpha / rank B A by module."""
    tensors = load_file(file)
    modules = {name.rpartition(".")[0].removesuffix(".lora_down") for name in tensors if name.endswith("lora_down.weight")}
    down, up = ({m: tensors[f"{m}.lora_{side}.weight"].flatten(1) for m in modules} for side in ("down", "up"))
    return {m: tensors[f"{m}.alpha"] / len(down[m]) * up[m] @ down[m] for m in modules}


def test_export_of_a_whole_unet(smoke: Path, tmp_path: Path) -> None:
    out = tmp_path / "unet"
    run("export", f"run={smoke}", "format=unet", "dtype=fp16", f"out={out}", cwd=tmp_path)
    assert UNet2DConditionModel.from_pretrained(out).config.in_channels == 12
    info = inspect_lora(smoke / "lora.safetensors", key="lora").info
    assert info is not None and json.loads((out / "sampler.json").read_text()) == info.recipe


def test_a_second_run_in_the_same_directory_is_refused_and_resume_does_no_work(smoke: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "recipe=smoke", f"run.dir={smoke}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    refused = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "resume=auto" in refused.stderr and "run.dir" in refused.stderr
    before = (smoke / "report.json").read_bytes()
    run("train", "recipe=smoke", f"run.dir={smoke}", "resume=auto", cwd=tmp_path)
    assert (smoke / "report.json").read_bytes() == before


def test_ctrl_c_and_a_second_run_beside_the_first(tmp_path: Path) -> None:
    run_dir, one_stage = tmp_path / "run", ("only=[tscd_8]", "eval.prompts=0", "stages.tscd_8.max_steps=2000")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "recipe=smoke", f"run.dir={run_dir}", *one_stage]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # the command to go on would begin with it
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: reached(run_dir, 2), first)
    second = subprocess.run([*command, "resume=auto"], env=environment, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2 and f"run.dir={run_dir} is in use by process {first.pid} on " in second.stderr
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0, output[-2000:]
    status = json.loads((run_dir / "run.json").read_text())
    assert (status["status"], status["stopped_by"]) == ("interrupted", "SIGINT")
    assert status["continue"] == shlex.join([*command, "resume=auto"]) and not (run_dir / "lock.json").exists()
