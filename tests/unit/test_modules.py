"""The exported module set, on the real UNet configurations without their weights."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from hyper_sd.lora_file import kohya_name
from hyper_sd.roles import LoraSpec, Roles

FIXTURES = Path(__file__).parent.parent / "fixtures"
# config, parameters of the network, modules and parameters of the released few-step LoRAs at rank 64
FAMILIES = {"sd15": (859_520_964, 278, 67_252_224), "sdxl": (2_567_463_684, 788, 196_751_360)}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, UNet2DConditionModel, Roles]:
    with torch.device("meta"):
        net = UNet2DConditionModel.from_config(json.loads((FIXTURES / f"unet_{request.param}.json").read_text()))
    num_params = sum(p.numel() for p in net.parameters())
    assert num_params == FAMILIES[request.param][0]
    return request.param, net, Roles(net, LoraSpec(), ("student",))


def test_module_set_is_that_of_the_released_files(family: tuple[str, UNet2DConditionModel, Roles]) -> None:
    name, _, roles = family
    tensors = roles.tensors("student")
    _, num_modules, num_params = FAMILIES[name]
    assert len({key.rpartition(".lora_")[0] for key in tensors}) == num_modules
    assert len(tensors) == 2 * num_modules
    assert sum(value.numel() for value in tensors.values()) == num_params


def test_kohya_names_are_unique_and_can_be_mapped_back(family: tuple[str, UNet2DConditionModel, Roles]) -> None:
    _, net, roles = family
    paths = {key.removesuffix(".lora_A.weight") for key in roles.tensors("student") if key.endswith(".lora_A.weight")}
    names = {}
    for path, _ in net.named_modules():  # every module, not only those with an adapter: that is what a reader looks names up in
        names.setdefault(kohya_name(path), []).append(path)
    assert all(names[kohya_name(path)] == [path] for path in paths)


def test_no_adapter_outside_the_blocks(family: tuple[str, UNet2DConditionModel, Roles]) -> None:
    _, _, roles = family
    assert {key.split(".")[0] for key in roles.tensors("student")} == {"down_blocks", "mid_block", "up_blocks"}
