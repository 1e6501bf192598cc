"""Files of reward models as they were released, with the published names, and tiny: random weights of a few channels."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from hyper_sd.config import FilesConfig, RewardConfig
from tests.tiny import MAX_LENGTH, VOCABULARY, write_tokenizer

LAYOUTS = json.loads((Path(__file__).parent / "fixtures" / "reward_layouts.json").read_text())
KINDS = ("clip_score", "pickscore", "hps_v2", "aesthetic", "image_reward")
_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *VOCABULARY)


def layout(name: str, num_layers: int | None = None) -> dict[str, list[int]]:
    """Every published name with its shape; "{} x 24" in the fixture stands for layers 0 to 23. `num_layers` keeps the first few."""
    shapes = {}
    for folded, shape in LAYOUTS[name].items():
        pattern, _, count = folded.partition(" x ")
        shapes |= {pattern.format(i): shape for i in range(num_layers or int(count))} if count else {pattern: shape}
    return shapes


def tiny_weights(name: str, sizes: Mapping[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the published names, two layers of them, with smaller sizes. The head of ImageReward keeps its own."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for key, shape in layout(name, num_layers=2).items():
        small = [size if key.startswith("mlp.") and size == 1024 else sizes.get(size, size) for size in shape]
        noise = torch.randn(small, generator=generator)
        if key.endswith("position_ids"):
            tensors[key] = torch.arange(small[-1])[None]
        elif len(small) > 1:
            tensors[key] = noise / noise[0].numel() ** 0.5
        else:
            tensors[key] = 0.1 * noise + bool(re.search(r"(norm\d?|ln_\w+|LayerNorm)\.weight$", key))
    return tensors


def write_clip(folder: Path, seed: int = 0) -> FilesConfig:
    """A tiny CLIPModel of 28 pixels with its tokenizer, as transformers saves them."""
    torch.manual_seed(seed)
    tokenizer = write_tokenizer(folder, VOCABULARY)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 24}
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_LENGTH, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        projection_dim=24, text_config=sizes | words | {"bos_token_id": 0}, vision_config=sizes | {"image_size": 28, "patch_size": 14}
    )
    CLIPModel(config).save_pretrained(folder)
    return FilesConfig(path=str(folder), file="model.safetensors")


def write_reward(kind: str, folder: Path) -> RewardConfig:
    """The files of one reward in `folder`, and its configuration."""
    clip = write_clip(folder / "clip")
    if kind in ("clip_score", "pickscore"):
        return _config(kind, clip)
    files, base = FilesConfig(path=str(folder), file=f"{kind}.pt"), clip
    if kind == "aesthetic":
        torch.save(tiny_weights(kind, {768: 24}), folder / f"{kind}.pt")
    elif kind == "hps_v2":
        words = len(json.loads((folder / "clip" / "vocab.json").read_text()))
        sizes = {1280: 160, 1024: 128, 5120: 640, 4096: 512, 3840: 480, 3072: 384, 49408: words, 77: MAX_LENGTH, 257: 5}
        torch.save({"epoch": 0, "state_dict": tiny_weights(kind, sizes)}, folder / f"{kind}.pt")
        base = FilesConfig(path=clip.path, file="tokenizer.json")
    else:
        (folder / "vocab.txt").write_text("\n".join(_BERT) + "\n")
        torch.save(
            tiny_weights(kind, {1024: 128, 4096: 512, 3072: 384, 768: 64, 197: 5, 30524: len(_BERT), 512: 40}), folder / f"{kind}.pt"
        )
        base = FilesConfig(path=str(folder), file="vocab.txt")
    return _config(kind, files, base)


def _config(kind: str, files: FilesConfig, base: FilesConfig | None = None) -> RewardConfig:
    return RewardConfig(kind=kind, path=files.path, file=files.file, base=base, alpha=1.0)  # pyright: ignore[reportArgumentType]
