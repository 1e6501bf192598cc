"""Bad input ends with one clear error that names the key, before anything is written."""

import re
from pathlib import Path

import pytest
import torch

from hyper_sd.config import run_config
from hyper_sd.lora_file import save_lora
from hyper_sd.lora_metadata import LoraInfo
from hyper_sd.roles import LoraSpec
from tests.runs import compose, overrides, start, train
from tests.tiny import tiny_sd15


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd15(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def trained(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(teacher, tmp_path_factory.mktemp("trained") / "run", "only=[tscd_8]") / "lora.safetensors"


def refused(teacher: Path, run_dir: Path, *extra: str) -> str:
    """The message of the ValueError; asserts that nothing was written."""
    with pytest.raises(ValueError, match=r"\w") as error:
        train(teacher, run_dir, *extra)
    assert not run_dir.exists()
    return str(error.value)


def test_segments_must_divide_the_solver_steps(teacher: Path, tmp_path: Path) -> None:
    message = refused(teacher, tmp_path / "run", "stages.tscd_8.solver_steps=50")
    assert "stages.tscd_8.segments must divide stages.tscd_8.solver_steps: got segments=8, solver_steps=50" in message
    assert re.search(r"try .*solver_steps=\d+ or segments=\d+", message)


def test_the_batch_must_divide_into_micro_batches(teacher: Path, tmp_path: Path) -> None:
    assert "engine.accumulation" in refused(teacher, tmp_path / "run", "engine.accumulation=3")


def test_missing_init(teacher: Path, tmp_path: Path) -> None:
    assert "init=" in refused(teacher, tmp_path / "run", f"init={tmp_path / 'none.safetensors'}")


def test_truncated_init(teacher: Path, trained: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(trained.read_bytes()[:-100])
    assert "init=" in refused(teacher, tmp_path / "run", f"init={broken}")


def test_a_pickle_as_init_is_not_opened(teacher: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "lora.safetensors"
    torch.save({"a": torch.zeros(1)}, pickled)
    assert "init=" in refused(teacher, tmp_path / "run", f"init={pickled}")


def test_init_of_another_rank(teacher: Path, trained: Path, tmp_path: Path) -> None:
    message = refused(teacher, tmp_path / "run", f"init={trained}", "lora.rank=8")
    assert "lora.rank" in message and "4" in message and "8" in message


def test_init_of_another_base(teacher: Path, tmp_path: Path) -> None:
    info = LoraInfo(
        base_model="other",
        architecture="stable-diffusion-v1/lora",
        prediction="eps",
        image_size=32,
        fingerprint={"unet_sha256": "0"},
        stage="tscd_8",
        recipe={},
        extra={},
    )
    other = tmp_path / "other.safetensors"
    tensors = {"conv_in.lora_A.weight": torch.ones(4, 3), "conv_in.lora_B.weight": torch.ones(3, 4)}
    save_lora(other, tensors, LoraSpec(rank=4, alpha=4.0), info)
    assert "another base model" in refused(teacher, tmp_path / "run", f"init={other}")


def test_empty_data(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert "data.path" in refused(teacher, tmp_path / "run", "data=folder", f"data.path={tmp_path / 'photos'}", "data.batch_size=4")


def test_missing_teacher(tmp_path: Path) -> None:
    assert "teacher.path" in refused(tmp_path / "none", tmp_path / "run")


def test_a_judge_of_other_images(tmp_path: Path) -> None:
    large = tiny_sd15(tmp_path / "teacher", image_size=64)
    assert "eval.judge" in refused(large, tmp_path / "run", "eval.judge=embedded")


def test_a_run_directory_that_is_a_file(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match=r"run\.dir"):
        train(teacher, tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_run_directory_that_cannot_be_made(teacher: Path) -> None:
    assert "run.dir" in refused(teacher, Path("/proc/hyper_sd_run"))


def test_a_run_directory_that_is_not_empty(teacher: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"resume=never.*resume=auto.*run\.dir"):
        train(teacher, run_dir)
    assert [path.name for path in run_dir.iterdir()] == ["notes.txt"]


def test_wrong_type(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stages\.tscd_2\.max_steps.*'abc'"):
        run_config(compose("train", overrides(teacher, tmp_path / "run", "stages.tscd_2.max_steps=abc")))


@pytest.mark.parametrize(
    ("extra", "named"),
    [("stages.tscd_2.max_stps=3", "max_steps"), ("stages.tscd_8.solver_steps=50", "stages.tscd_8.segments")],
    ids=["unknown key", "wrong value"],
)
def test_the_command_fails_with_one_line(teacher: Path, tmp_path: Path, extra: str, named: str) -> None:
    process = start(teacher, tmp_path / "run", extra)
    output, _ = process.communicate(timeout=120)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and len(errors) == 1 and named in errors[0]
    assert "Traceback" not in output and not (tmp_path / "run").exists()
