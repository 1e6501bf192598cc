"""Adapters of a tiny teacher of each family, trained for show once for all tests of LoRA files and exports."""

from pathlib import Path

import pytest

from hyper_sd.lora_file import save_lora
from tests.tiny import tiny_sd15, tiny_sdxl
from tests.trained import SPEC, Trained, train


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {"sd15": tiny_sd15(root / "sd15"), "sdxl": tiny_sdxl(root / "sdxl")}


@pytest.fixture(scope="session")
def families(paths: dict[str, Path]) -> dict[str, Trained]:
    return {family: train(family, path) for family, path in paths.items()}


@pytest.fixture(scope="session")
def sd15(families: dict[str, Trained]) -> Trained:
    return families["sd15"]


@pytest.fixture
def written(sd15: Trained, tmp_path: Path) -> Path:
    save_lora(tmp_path / "lora.safetensors", sd15.tensors, SPEC, sd15.info)
    return tmp_path / "lora.safetensors"
