"""Exports: what is written is what a stock pipeline does with it, and what is not is found before the file is there."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyper_sd.export import LoraMismatch, added, call_unet, export_lora, export_run, fixed_inputs, relative_error, verify_lora
from hyper_sd.lora_file import LoraDtype, LoraFormat, inspect_lora, read_lora, save_lora
from tests.trained import RECIPE, SPEC, Trained, train

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-5), ("fp16", 2e-3), ("bf16", 2e-2)])
def test_round_trip(families: dict[str, Trained], family: str, format: LoraFormat, dtype: LoraDtype, bound: float, tmp_path: Path) -> None:
    """A stock pipeline does with the file what the training network does, and reading it gives back the tensors."""
    trained, path = families[family], tmp_path / "lora.safetensors"
    assert trained.export(path, format, dtype) <= bound

    header = inspect_lora(path)
    assert (header.format, header.dtype, header.rank) == (format, dtype, 4)
    file = read_lora(path, trained.modules, spec=SPEC, fingerprint=trained.teacher.fingerprint)
    assert file.tensors.keys() == trained.tensors.keys()
    tolerance = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8}[dtype]
    for name, value in trained.tensors.items():
        assert file.tensors[name].dtype == torch.float32
        torch.testing.assert_close(file.tensors[name], value, rtol=tolerance, atol=1e-7 if tolerance else 0.0)


def test_the_pipeline_is_given_back_without_the_lora(sd15: Trained, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in sd15.pipeline.unet.state_dict().items()}
    sd15.export(tmp_path / "lora.safetensors")
    after = sd15.pipeline.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_kohya_layout(sd15: Trained, written: Path) -> None:
    tensors = load_file(written)
    paths = {name.removesuffix(".lora_A.weight") for name in sd15.tensors if ".lora_A." in name}
    names = {"lora_unet_" + path.replace(".", "_") for path in paths}
    assert tensors.keys() == {f"{name}.{part}" for name in names for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    for name, value in tensors.items():
        if name.endswith(".alpha"):
            assert value.shape == () and value.dtype == torch.float32 and value.item() == 3.0


def test_diffusers_layout(sd15: Trained, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_lora(path, sd15.tensors, SPEC, sd15.info, format="diffusers")
    assert load_file(path).keys() == {f"unet.{name}" for name in sd15.tensors}
    config = json.loads(inspect_lora(path).metadata["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (4, 3.0)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_metadata(sd15: Trained, format: LoraFormat, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_lora(path, sd15.tensors, SPEC, sd15.info, format=format)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["hyper_sd.sampler"]) == RECIPE
    expected = {
        "hyper_sd.base_model": sd15.cfg.path,
        "hyper_sd.stage": "tscd_4",
        "hyper_sd.rank": "4",
        "hyper_sd.alpha": "3.0",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "3.0",
        "ss_steps": "150",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "32x32",
    }
    assert {key: metadata.get(key) for key in expected} == expected
    assert "4 steps: TCDScheduler, guidance_scale 1, eta 0.3" in metadata["modelspec.usage_hint"]
    header = inspect_lora(path)
    assert header.info == sd15.info
    assert header.targets == SPEC.targets


# ---- a file that does not do what the network does ------------------------------------------------------------------------


def edited(path: Path, edit: Callable[[str, Tensor], Tensor]) -> Path:
    metadata = dict(inspect_lora(path).metadata)
    save_file({name: edit(name, value) for name, value in load_file(path).items()}, path, metadata=metadata)
    return path


@pytest.mark.parametrize("size", [0.3, 1e-3], ids=["grown", "young"])
def test_a_wrong_alpha_is_found(paths: dict[str, Path], size: float, tmp_path: Path) -> None:
    """Also when the adapter is so young that leaving it out would change the output by less than the tolerance."""
    trained, path = train("sd15", paths["sd15"], size=size), tmp_path / "lora.safetensors"
    assert trained.export(path) <= 1e-5
    edited(path, lambda name, value: torch.tensor(4.0) if name.endswith(".alpha") else value)
    with pytest.raises(LoraMismatch, match="does not do what the trained network does"):
        trained.verify(path)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_rounding_of_a_network_in_bf16_hides_nothing(paths: dict[str, Path], family: str, tmp_path: Path) -> None:
    trained, path = train(family, paths[family], size=0.02, dtype=torch.bfloat16), tmp_path / "lora.safetensors"
    assert trained.export(path) <= 1e-5  # compared in float32, where the network's own answers are 1e-3 away and more
    assert trained.verify(path) > 1e-3
    edited(path, lambda name, value: torch.tensor(4.0) if name.endswith(".alpha") else value)
    trained.verify(path)  # a third more of a young adapter is less than bf16 rounds away
    with pytest.raises(LoraMismatch, match="does not do what the trained network does"):
        verify_lora(path, trained.pipeline, added(trained.pipeline.unet, trained.tensors, SPEC))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_network_in_bf16_that_runs_the_wrong_role_is_found(paths: dict[str, Path], family: str, tmp_path: Path) -> None:
    trained, path = train(family, paths[family], size=0.1, dtype=torch.bfloat16), tmp_path / "lora.safetensors"
    trained.export(path)
    with pytest.raises(LoraMismatch, match="does not do what the trained network does"):
        verify_lora(path, trained.pipeline, trained.teacher.forward, trained.teacher.forward)


def test_an_added_adapter_leaves_no_trace(sd15: Trained) -> None:
    unet, inputs = sd15.pipeline.unet, fixed_inputs(sd15.pipeline.unet, 1000)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with_adapter = added(unet, sd15.tensors, SPEC)(*inputs)
    assert relative_error(call_unet(unet, *inputs), with_adapter).min() > 0.01
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_one_wrong_module_is_found(sd15: Trained, written: Path) -> None:
    name = "lora_unet_mid_block_resnets_0_conv1.lora_up.weight"
    edited(written, lambda key, value: 2 * value if key == name else value)
    with pytest.raises(LoraMismatch):
        sd15.verify(written)


def test_a_mismatch_leaves_the_old_file(sd15: Trained, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(LoraMismatch):  # the network is asked as the teacher, not as the exported role
        export_lora(path, sd15.tensors, SPEC, sd15.info, pipeline=sd15.pipeline, trained=sd15.teacher.forward)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["lora.safetensors"]


# ---- refusals --------------------------------------------------------------------------------------------------------------


# ---- export of a run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(sd15: Trained, tmp_path: Path) -> Path:
    return make_run(sd15, tmp_path)


def make_run(trained: Trained, path: Path) -> Path:
    """A finished run's directory, as far as the export reads it."""
    teacher = {"family": trained.cfg.family, "path": trained.cfg.path, "guidance": {"min": 4, "max": 8}}
    (path / "config.yaml").write_text(json.dumps({"teacher": teacher}))  # json is yaml
    for file in (path / "lora.safetensors", path / "tscd_4" / "lora.safetensors"):
        save_lora(file, trained.tensors, SPEC, trained.info)
    return path


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_export_of_a_stage(families: dict[str, Trained], family: str, tmp_path: Path) -> None:
    run = make_run(families[family], tmp_path)
    out, error = export_run(run, stage="tscd_4", format="diffusers", dtype="fp16", out=run / "elsewhere" / "small.safetensors")
    assert out == run / "elsewhere" / "small.safetensors"
    assert error <= 2e-3
    source, exported = inspect_lora(run / "tscd_4" / "lora.safetensors"), inspect_lora(out)
    assert (exported.format, exported.dtype, exported.rank) == ("diffusers", "fp16", 4)
    assert (exported.info, exported.targets) == (source.info, source.targets)


def test_export_of_a_run_without_a_stage_or_an_out(run: Path) -> None:
    out, error = export_run(run, stage=None, format="kohya", dtype="fp32", out=None)
    assert out == run / "lora_kohya_fp32.safetensors"
    assert error <= 1e-5
    assert out.read_bytes() == (run / "lora.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("stage", "out", "message"),
    [
        ("tscd_9", None, "stage=tscd_9: there is no .*; finished stages of this run: tscd_4"),
        (None, "lora.safetensors", "out=.* must be another file"),
        (None, "lora.ckpt", r"out=.*suffix \.safetensors"),
    ],
)
def test_export_refusals(run: Path, stage: str | None, out: str | None, message: str) -> None:
    before = sorted(path.name for path in run.rglob("*"))
    with pytest.raises(ValueError, match=message):
        export_run(run, stage=stage, format="kohya", dtype="fp16", out=run / out if out else None)
    assert sorted(path.name for path in run.rglob("*")) == before


def test_export_of_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run=.*finished stages of this run: none"):
        export_run(tmp_path, stage=None, format="kohya", dtype="fp16", out=None)


# ---- the command -----------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "scripts/export.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_the_command(run: Path) -> None:
    done = command(f"run={run}", "stage=tscd_4", "format=diffusers", "dtype=bf16", f"out={run / 'out.safetensors'}")
    assert done.returncode == 0, done.stderr
    header = inspect_lora(run / "out.safetensors")
    assert (header.format, header.dtype) == ("diffusers", "bf16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: run: must be set"),
        (["run=x", "format=pickle"], "error: format: got 'pickle' (str), expected one of kohya, diffusers"),
    ],
)
def test_the_command_refuses(arguments: list[str], message: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
