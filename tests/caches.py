"""Small prepared caches without a teacher: sample n has a latent full of n."""

from collections.abc import Sequence
from pathlib import Path

import torch

from hyper_sd.prepare.finish import seal
from hyper_sd.prepare.shards import PartName, PartWriter, finished

Size = tuple[int, int]


def write_cache(out: Path, shards: Sequence[Sequence[Size]], *, captions: int = 1, embeddings: bool = False) -> Path:
    """One shard for every list of sizes (height, width) in pixels; samples are numbered through."""
    number = 0
    for shard, sizes in enumerate(shards):
        with PartWriter(out, PartName(0, shard)) as writer:
            for row, (height, width) in enumerate(sizes):
                tensors = {"latent": torch.full((4, height // 8, width // 8), float(number))}
                if embeddings:
                    tensors["cond.0"] = torch.tensor([[number, caption] for caption in range(captions)], dtype=torch.float32)
                texts = [f"number {number} caption {caption}" for caption in range(captions)]
                writer.add(row, {"text": texts, "sizes": [100, 200, 3, 4, height, width], "name": f"image {number}"}, tensors)
                number += 1
            writer.close(len(sizes), last=shard == len(shards) - 1)
    made = {"teacher": "tiny", "fingerprint": {"pipeline": "tiny"}, "image_size": 64, "dtype": "fp32", "embeddings": embeddings}
    seal(out, finished(out, 0), {**made, "source": {}, "settings": {}, "probe": {}})
    return out
