"""LoRA files: equal contents are equal bytes, alpha is what the file says, and what is not a fitting LoRA is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyper_sd.lora_file import LoraFormat, inspect_lora, read_lora, replace_recipe, save_lora
from hyper_sd.roles import LoraSpec
from hyper_sd.teachers import inspect_teacher
from tests.trained import SPEC, Trained


def test_equal_contents_are_equal_bytes(sd15: Trained, written: Path, tmp_path: Path) -> None:
    for number in range(4):  # the order of safetensors' metadata changes from call to call
        save_lora(tmp_path / f"{number}.safetensors", sd15.tensors, SPEC, sd15.info)
        assert (tmp_path / f"{number}.safetensors").read_bytes() == written.read_bytes()


def test_others_may_read_what_they_may_of_any_file(sd15: Trained, written: Path, tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    assert written.stat().st_mode == (tmp_path / "any").stat().st_mode
    replace_recipe(written, sd15.info.recipe)
    assert written.stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_a_file_of_another_alpha_is_rescaled_to_the_specs(sd15: Trained, format: LoraFormat, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_lora(path, sd15.tensors, SPEC, sd15.info, format=format)
    own = read_lora(path, sd15.modules)
    assert own.spec == SPEC
    other = read_lora(path, sd15.modules, spec=LoraSpec(rank=4, alpha=12.0))
    assert other.spec.alpha == 12.0
    for name, value in sd15.tensors.items():
        assert torch.equal(own.tensors[name], value)
        assert torch.equal(other.tensors[name], value / 4 if ".lora_B." in name else value)


def test_a_foreign_file_without_alpha_has_scale_one(sd15: Trained, tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({f"unet.{name}": value for name, value in sd15.tensors.items()}, path)
    file = read_lora(path, sd15.modules)
    assert (file.spec.rank, file.spec.alpha, file.header.info) == (4, 4.0, None)


# ---- a file that does not do what the network does ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor(float("nan")), "non-finite.*diverged"),
        (torch.tensor(1e6), "overflows dtype=fp16"),
    ],
)
def test_non_finite_tensors_are_refused(sd15: Trained, value: Tensor, message: str, tmp_path: Path) -> None:
    tensors = sd15.tensors
    name = next(iter(tensors))
    tensors[name][0, 0] = value
    with pytest.raises(ValueError, match=message):
        save_lora(tmp_path / "lora.safetensors", tensors, SPEC, sd15.info, dtype="fp16")
    assert not list(tmp_path.iterdir())


def test_empty_tensors_are_refused(sd15: Trained, tmp_path: Path) -> None:
    tensors = sd15.tensors
    name = next(iter(tensors))
    tensors[name] = torch.empty(0)
    with pytest.raises(ValueError, match=f"empty tensor: {name}"):
        save_lora(tmp_path / "lora.safetensors", tensors, SPEC, sd15.info)


def test_half_an_adapter_is_refused(sd15: Trained, tmp_path: Path) -> None:
    tensors = sd15.tensors
    tensors.pop(next(iter(tensors)))
    with pytest.raises(ValueError, match="not an adapter"):
        save_lora(tmp_path / "lora.safetensors", tensors, SPEC, sd15.info)


def test_tensors_of_another_rank_are_refused(sd15: Trained, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected lora\.rank=8"):
        save_lora(tmp_path / "lora.safetensors", sd15.tensors, LoraSpec(rank=8), sd15.info)


def test_an_unwritable_place_is_refused(sd15: Trained, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written.*choose another out .* or run\.dir"):
        save_lora(tmp_path / "file" / "lora.safetensors", sd15.tensors, SPEC, sd15.info)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"init=.*none\.safetensors: there is no such file"):
        inspect_lora(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_truncated_file_is_refused(written: Path, keep: int) -> None:
    written.write_bytes(written.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"init=.*not a whole safetensors file"):
        inspect_lora(written)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    torch.save({"unet.a.lora_A.weight": torch.ones(1, 1)}, path)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        inspect_lora(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"unet.conv_in.weight": (4, 4)}, "no part of a UNet LoRA"),
        ({"lora_te_text_model.lora_down.weight": (4, 4)}, "no part of a UNet LoRA"),
        ({"unet.a.lora_A.weight": (4, 4)}, "a has no lora_B"),
        (
            {
                "unet.a.lora_A.weight": (4, 4),
                "unet.a.lora_B.weight": (4, 4),
                "unet.b.lora_A.weight": (2, 4),
                "unet.b.lora_B.weight": (4, 2),
            },
            "ranks",
        ),
        ({}, "no tensors"),
    ],
)
def test_what_is_no_lora_is_refused(tensors: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(ValueError, match=message):
        inspect_lora(path)


def test_another_rank_is_refused(sd15: Trained, written: Path) -> None:
    with pytest.raises(ValueError, match=r"init=.*has rank 4 but lora\.rank=8; set lora\.rank=4"):
        read_lora(written, sd15.modules, spec=LoraSpec(rank=8))


def test_another_base_model_is_refused(sd15: Trained, written: Path, paths: dict[str, Path]) -> None:
    other = inspect_teacher(replace(sd15.cfg, family="sdxl", path=str(paths["sdxl"])))
    with pytest.raises(ValueError, match=r"init=.*trained on another base model.*set teacher\.path"):
        read_lora(written, sd15.modules, fingerprint=other.fingerprint)


def test_modules_the_network_does_not_have_are_refused(written: Path, families: dict[str, Trained]) -> None:
    with pytest.raises(ValueError, match=r"init=.*does not fit the network.*teacher\.path"):
        read_lora(written, [path for path in families["sd15"].modules if "resnets.0" not in path])


def test_damaged_metadata_is_refused(sd15: Trained, written: Path) -> None:
    metadata = {**inspect_lora(written).metadata, "hyper_sd.sampler": '{"4": {"scheduler": "TCDScheduler"}}'}
    save_file(load_file(written), written, metadata=metadata)
    with pytest.raises(ValueError, match=r"init=.*metadata is damaged.*hyper_sd\.sampler"):
        inspect_lora(written)


# ---- export of a run ------------------------------------------------------------------------------------------------------
