"""HPS v2 and v2.1: which of two images people prefer for a prompt (Wu et al. 2023, arXiv 2306.09341).

score = cos(image, prompt) of a CLIP ViT-H/14 trained on their choices. The image is not cropped but padded to a square.
Range: -1 to 1; images of diffusion models have about 0.25 to 0.28 (v2) or 0.25 to 0.34 (v2.1). The two cannot be compared.
Default alpha: 0.30 for v2 and 0.35 for v2.1 (ours): above every model in the benchmark tables of the authors, .285 and .333 at best.
Licence: Apache-2.0.
Memory: 3.9 GB in float32, the text model included.

The released file is open_clip's state dict in a pickle; its keys are renamed to those of CLIPModel.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from hyper_sd.config import FilesConfig, RewardConfig
from hyper_sd.rewards.base import TowerReward, pad
from hyper_sd.rewards.clip import ClipTower, load_tokenizer
from hyper_sd.rewards.weights import Tensors, find, load_model, read, rename

_TEXT_HEAD, _VISION_HEAD = 64, 80  # channels of an attention head in ViT-H/14
_RULES = (
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


class HpsV2(TowerReward[ClipTower]):
    def score_embedded(self, embedded: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.tower.cosines(embedded, prompts)


def load_hps_v2(config: RewardConfig, tokenizer: FilesConfig, device: torch.device, key: str) -> HpsV2:
    """The released weights in the file of `config`; the tokenizer is CLIP's."""
    words = load_tokenizer(tokenizer, f"{key}.base")
    tensors = from_open_clip(read(find(config, key), key))
    try:
        clip_config = config_of(tensors, words.eos_token_id)
    except KeyError as error:
        raise ValueError(f"{key}.file={config.file} is no HPS v2: it has no {error}") from error
    return HpsV2(ClipTower(load_model(CLIPModel, clip_config, tensors, key).to(device), words, fit=pad))


def from_open_clip(tensors: Mapping[str, Tensor]) -> Tensors:
    """open_clip's names and layout to those of CLIPModel: projections are transposed, joint q, k, v cut in three."""
    converted: Tensors = {}
    for name, value in tensors.items():
        new = rename(name, _RULES)
        if ".in_proj_" in new:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                converted[new.replace("in_proj_", f"{part}_proj.")] = third
        else:
            converted[new] = value.T if name in ("visual.proj", "text_projection") else value
    return converted


def config_of(tensors: Mapping[str, Tensor], eos_token_id: int) -> CLIPConfig:
    """The CLIPConfig of converted weights, read off their shapes; what shapes do not say is that of ViT-H/14."""
    positions, words = (tensors[f"text_model.embeddings.{name}_embedding.weight"] for name in ("position", "token"))
    patches = tensors["vision_model.embeddings.patch_embedding.weight"]
    text, vision = (_sizes(tensors, f"{name}_model.encoder.layers") for name in ("text", "vision"))
    side = round((len(tensors["vision_model.embeddings.position_embedding.weight"]) - 1) ** 0.5) * patches.shape[-1]
    projection = {"projection_dim": len(tensors["visual_projection.weight"]), "hidden_act": "gelu"}
    return CLIPConfig(
        projection_dim=projection["projection_dim"],
        text_config={
            **(text | projection),
            "num_attention_heads": words.shape[1] // _TEXT_HEAD,
            "vocab_size": len(words),
            "max_position_embeddings": len(positions),
            "eos_token_id": eos_token_id,
        },
        vision_config={
            **(vision | projection),
            "num_attention_heads": len(patches) // _VISION_HEAD,
            "image_size": side,
            "patch_size": patches.shape[-1],
        },
    )


def _sizes(tensors: Mapping[str, Tensor], layers: str) -> dict[str, int]:
    inner, width = tensors[f"{layers}.0.mlp.fc1.weight"].shape
    num = sum(name.startswith(layers) and name.endswith(".mlp.fc1.weight") for name in tensors)
    return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": num}
