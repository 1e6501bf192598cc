"""ImageReward v1.0: how people rate an image for its prompt (Xu et al. 2023, arXiv 2304.05977).

score = (head(h) - .16717) / 1.03334, where h is what a BERT with cross-attention to the patches of a ViT-L/16 makes of the first token.
Range: unbounded, about -2 to 2: mean 0 and deviation 1 over the authors' data.
Default alpha: 2, that of the authors' ReFL.
Licence: Apache-2.0; the tokenizer (bert-base-uncased) too.
Memory: 1.8 GB in float32.

The released file is BLIP's state dict in a pickle; its keys are renamed to those of BlipVisionModel, and are those of BlipTextModel.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BertTokenizer
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from hyper_sd.config import FilesConfig, RewardConfig
from hyper_sd.randomness import send
from hyper_sd.rewards.base import crop, normalise
from hyper_sd.rewards.head import load_head
from hyper_sd.rewards.weights import Tensors, find, load_model, read, rename

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of raw scores, from the authors' package
_MAX_TOKENS = 35
_HEAD = 64  # channels of an attention head, in both models
_UNUSED = re.compile(r"^blip\.(vision_proj|text_proj)\.|^blip\.text_encoder\.embeddings\.position_ids$")
_RULES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"^norm\.", "post_layernorm."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)


class ImageReward:
    def __init__(self, vision: Any, text: Any, head: Any, tokenizer: Any):
        self._vision, self._text, self._head, self._tokenizer = vision, text, head, tokenizer

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = normalise(crop(images.float(), self._vision.config.image_size))
        patches = self._vision(pixel_values=pixels).last_hidden_state
        tokens = self._tokenizer(list(prompts), padding="max_length", truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
        numbers, mask = send(tokens.input_ids, images), send(tokens.attention_mask, images)
        hidden = self._text(numbers, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        return (self._head(hidden[:, 0]).squeeze(1) - _MEAN) / _STD


def load_image_reward(config: RewardConfig, tokenizer: FilesConfig, device: torch.device, key: str) -> ImageReward:
    """The released weights in the file of `config`; the tokenizer is BERT's, of which a vocabulary is all that is read."""
    words = BertTokenizer(vocab=str(find(tokenizer, f"{key}.base")))
    vision, text, head = split_blip(read(find(config, key), key))
    try:
        vision_config, text_config = configs_of(vision, text)
    except KeyError as error:
        raise ValueError(f"{key}.file={config.file} is no ImageReward: it has no {error}") from error
    return ImageReward(
        load_model(BlipVisionModel, vision_config, vision, key).to(device),
        load_model(BlipTextModel, text_config, text, key, add_pooling_layer=False).to(device),
        load_head(head, text_config.hidden_size, key).to(device),
        words,
    )


def split_blip(tensors: Mapping[str, Tensor]) -> tuple[Tensors, Tensors, Tensors]:
    """The released names to those of BlipVisionModel, BlipTextModel and the head. BLIP's contrastive projections are not used."""
    used = {name: value for name, value in tensors.items() if not _UNUSED.search(name)}
    parts = {prefix: _under(prefix, used) for prefix in ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")}
    others = {name: value for name, value in used.items() if not name.startswith(tuple(parts))}
    vision = {rename(name, _RULES): value for name, value in parts["blip.visual_encoder."].items()}
    return vision | others, parts["blip.text_encoder."], parts["mlp."]  # a stranger is refused where the vision model is loaded


def configs_of(vision: Mapping[str, Tensor], text: Mapping[str, Tensor]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """The configurations of converted weights, read off their shapes; what shapes do not say is that of ImageReward."""
    patches, words = vision["embeddings.patch_embedding.weight"], text["embeddings.word_embeddings.weight"]
    positions = text["embeddings.position_embeddings.weight"]
    side = round((vision["embeddings.position_embedding"].shape[1] - 1) ** 0.5) * patches.shape[-1]
    return (
        BlipVisionConfig(
            hidden_size=len(patches),
            intermediate_size=len(vision["encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=sum(name.endswith(".mlp.fc1.weight") for name in vision),
            num_attention_heads=len(patches) // _HEAD,
            image_size=side,
            patch_size=patches.shape[-1],
            layer_norm_eps=1e-6,
        ),
        BlipTextConfig(
            vocab_size=len(words),
            hidden_size=words.shape[1],
            encoder_hidden_size=len(patches),
            intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=sum(name.endswith(".intermediate.dense.weight") for name in text),
            num_attention_heads=words.shape[1] // _HEAD,
            max_position_embeddings=len(positions),
        ),
    )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
