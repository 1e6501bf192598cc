"""Files that would run code if they were trusted: refused by name, nothing executed, nothing written."""

import argparse
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hyper_sd.checkpoint import MANIFEST, Checkpoint, CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from hyper_sd.config import run_config
from tests.runs import ROOT, compose, train
from tests.tiny import tiny_sd15


class Payload:
    """What is unpickled creates a file."""

    def __init__(self, marker: Path):
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._marker),)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd15(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def write_pickle(file: Path, marker: Path, kind: str) -> None:
    if kind == "torch":
        torch.save(Payload(marker), file)
    else:
        file.write_bytes(pickle.dumps(Payload(marker)))


def test_the_payload_is_one(marker: Path, tmp_path: Path) -> None:
    write_pickle(tmp_path / "x", marker, "plain")
    pickle.loads((tmp_path / "x").read_bytes())
    assert marker.exists()


@pytest.mark.parametrize("kind", ["torch", "plain"])
@pytest.mark.parametrize("name", ["adapters.safetensors", "optimizer.safetensors"])
def test_a_pickle_in_a_checkpoint_whose_checksums_match(name: str, kind: str, marker: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        tensors = {"a": torch.full((2,), float(step))}
        newest = save_checkpoint(tmp_path / "saved", Checkpoint(step, {"student": tensors}, tensors, {"student": step}), keep_last=2)
    write_pickle(newest / name, marker, kind)
    sign(newest, name)
    with pytest.raises(CheckpointError, match=rf"{name} is not a safetensors file"):
        load_checkpoint(newest)
    taken = latest_checkpoint(tmp_path / "saved")
    assert taken is not None and taken.step == 1 and not marker.exists()


def sign(folder: Path, name: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest[name]["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", ["torch", "plain"])
def test_a_pickle_as_init(kind: str, teacher: Path, marker: Path, tmp_path: Path) -> None:
    write_pickle(tmp_path / "lora.safetensors", marker, kind)
    with pytest.raises(ValueError, match=r"init=.*not a whole safetensors file"):
        train(teacher, tmp_path / "run", f"init={tmp_path / 'lora.safetensors'}")
    assert not marker.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("instead", [True, False], ids=["in place of safetensors", "beside no safetensors"])
def test_a_pickle_as_the_teacher(instead: bool, teacher: Path, marker: Path, tmp_path: Path) -> None:
    hostile = shutil.copytree(teacher, tmp_path / "teacher")
    weights = hostile / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    write_pickle(weights if instead else weights.with_suffix(".bin"), marker, "torch")
    with pytest.raises(ValueError, match=r"teacher\.path=.*the pipeline cannot be loaded"):
        train(hostile, tmp_path / "run")
    assert not marker.exists() and not list((tmp_path / "run").glob("*/*"))


def test_code_beside_the_teacher(teacher: Path, marker: Path, tmp_path: Path) -> None:
    hostile = shutil.copytree(teacher, tmp_path / "teacher")
    (hostile / "unet" / "evil.py").write_text(f"import os; os.mkdir({str(marker)!r})\nclass Net: ...\n")
    (hostile / "pipeline.py").write_text(f"import os; os.mkdir({str(marker)!r})\n")
    index = json.loads((hostile / "model_index.json").read_text())
    (hostile / "model_index.json").write_text(json.dumps(index | {"unet": ["evil", "Net"]}))
    with pytest.raises(ValueError, match=r"teacher\.path="):
        train(hostile, tmp_path / "run")
    assert not marker.exists()


TARGET = "_target_: os.mkdir, path: '{marker}'"
HOSTILE = {
    "python tag": ("x: !!python/object/apply:os.mkdir ['{marker}']", "python/object/apply"),
    "target of a stage": ("stages: {tscd_8: {TARGET}}", "stages.tscd_8._target_: got 'os.mkdir'"),
    "target beside a stage": ("eval: {judge: {TARGET}}", "eval.judge: got {'_target_': 'os.mkdir'"),
    "hydra callback": ("hydra: {callbacks: {x: {TARGET}}}", "hydra.callbacks.x._target_: got 'os.mkdir'"),
    "hydra launcher": ("hydra: {launcher: {_target_: os.getcwd}}", "hydra.launcher._target_: got 'os.getcwd'"),
    "logging factory": ("hydra: {job_logging: {version: 1, handlers: {x: {(): os.mkdir}}}}", "got 'os.mkdir'"),
    "hydra's own output": ("hydra: {output_subdir: x, run: {dir: '{marker}'}}", "hydra.run.dir"),
    "path of a stage": ("stages: {'../../executed': {max_steps: 1}}", "names a directory of the run"),
}


def write_recipe(name: str, marker: Path, folder: Path) -> str:
    """A recipe that is hostile in one way; what its refusal says."""
    text, says = HOSTILE[name]
    (folder / "recipe").mkdir(parents=True)
    text = text.replace("TARGET", TARGET).replace("{marker}", str(marker))
    (folder / "recipe" / "evil.yaml").write_text(f"# @package _global_\ndefaults: [smoke, _self_]\n{text}\n")
    return says


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe(name: str, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says = write_recipe(name, marker, tmp_path / "mine")
    with pytest.raises((SystemExit, ValueError)) as error:
        run_config(compose("train", ["recipe=evil"], argparse.Namespace(config_dir=str(tmp_path / "mine"))))
    assert says in capsys.readouterr().err + str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_hostile_recipe_as_a_command(marker: Path, tmp_path: Path) -> None:
    says = write_recipe("hydra callback", marker, tmp_path / "mine")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config-dir", "mine", "recipe=evil"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_python_tag_in_the_settings_of_a_run(teacher: Path, marker: Path, tmp_path: Path) -> None:
    settings = ("only=[tscd_8]", "stages.tscd_8.max_steps=1")
    run_dir = train(teacher, tmp_path / "run", *settings)
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(f"evil: !!python/object/apply:os.mkdir ['{marker}']\n{config}")
    with pytest.raises(ValueError, match=r"config\.yaml says what the run began with and cannot be read"):
        train(teacher, run_dir, *settings, "resume=auto")
    assert not marker.exists()
