"""The tiny decoder in the place of the teacher's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny

from hyper_sd.config import FilesConfig
from hyper_sd.rewards.tiny_decoder import check_tiny_decoder, load_tiny_decoder
from tests.tiny import tiny_decoder

CPU = torch.device("cpu")
KEY = "decode.tiny"


@pytest.fixture
def files(tmp_path: Path) -> FilesConfig:
    return FilesConfig(path=str(tiny_decoder(tmp_path / "tiny", latent_channels=3)), file="diffusion_pytorch_model.safetensors")


def test_images_are_those_of_the_pipeline_with_this_autoencoder(files: FilesConfig) -> None:
    """A stock pipeline divides latents by the autoencoder's own scaling factor, and images run from -1 to 1."""
    latents = torch.randn(2, 3, 8, 8)
    stock: Any = AutoencoderTiny.from_pretrained(files.path)
    with torch.no_grad():
        expected = stock.decode(latents / stock.config.scaling_factor).sample / 2 + 0.5
    got = load_tiny_decoder(files, CPU, KEY).decode(latents)
    assert got.shape == (2, 3, 32, 32) and got.dtype == torch.float32
    torch.testing.assert_close(got, expected)


def test_gradients_reach_the_latents_and_nothing_else(files: FilesConfig) -> None:
    decoder = load_tiny_decoder(files, CPU, KEY)
    latents = (0.1 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))).requires_grad_()
    (gradient,) = torch.autograd.grad(decoder.decode(latents).square().sum(), latents)
    length = gradient.norm()
    step = 1e-3 * gradient / length
    with torch.no_grad():
        change = decoder.decode(latents + step).square().double().sum() - decoder.decode(latents - step).square().double().sum()
    torch.testing.assert_close(change.float() / 2e-3, length, rtol=0.02, atol=1e-4)
    assert not any(p.requires_grad for p in decoder._model.parameters())


def test_one_that_fits_is_taken(files: FilesConfig) -> None:
    check_tiny_decoder(files, 32, (3, 8, 8), KEY)


@pytest.mark.parametrize(
    ("image_size", "shape", "message"),
    [
        (
            32,
            (4, 8, 8),
            r"decode\.tiny\.path=\S+ decodes latents of 3 channels, 4 pixels to each; the teacher's have 4 channels and 4 pixels",
        ),
        (64, (3, 8, 8), r"the teacher's have 3 channels and 8 pixels; choose the tiny decoder of this family, or decode\.tiny=null"),
    ],
)
def test_one_for_other_latents_is_refused(files: FilesConfig, image_size: int, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tiny_decoder(files, image_size, shape, KEY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "madebyollin/taesd"}, r"decode\.tiny\.revision=None must be the full hash of a commit"),
        ({"sha256": "0" * 64}, r"decode\.tiny\.sha256=0{64} is not that of"),
        ({"file": "other.safetensors"}, r"decode\.tiny\.path=\S+ holds no other\.safetensors"),
    ],
)
def test_wrong_files_are_refused(files: FilesConfig, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tiny_decoder(FilesConfig(**{**vars(files), **changes}), 32, (3, 8, 8), KEY)


def test_another_autoencoder_is_refused(files: FilesConfig) -> None:
    config = Path(files.path or "") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match=r"decode\.tiny\.path=\S+ holds a AutoencoderKL; it must be an AutoencoderTiny"):
        check_tiny_decoder(files, 32, (3, 8, 8), KEY)
