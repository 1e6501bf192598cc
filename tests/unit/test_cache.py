"""Reading prepared caches: what is damaged is replaced or refused, and what they hold reaches the teacher."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from hyper_sd.config import DataConfig
from hyper_sd.data import Samples, Source, build_source
from hyper_sd.data.cache import CacheSource, probe
from hyper_sd.prepare.finish import seal
from hyper_sd.prepare.shards import PartName, PartWriter, finished
from tests.caches import write_cache

SQUARE, WIDE = (64, 64), (48, 80)


def cache(path: Path, *, batch_size: int = 2, max_bad: float = 0.5, fingerprint: dict[str, str] | None = None) -> Source:
    cfg = DataConfig(kind="cache", path=str(path), batch_size=batch_size, max_bad_fraction=max_bad)
    return build_source(cfg, seed=0, image_size=64, fingerprint=fingerprint)


def numbers(samples: Samples) -> list[int]:
    assert samples.latents is not None
    return samples.latents[:, 0, 0, 0].int().tolist()


def test_samples_come_whole(tmp_path: Path) -> None:
    source = cache(write_cache(tmp_path, [[SQUARE] * 3, [SQUARE] * 2], captions=2, embeddings=True))
    samples = source.batch(range(5))
    assert samples.latents is not None and samples.latents.shape == (5, 4, 8, 8) and samples.latents.dtype == torch.float32
    assert samples.sizes is not None and samples.sizes.tolist() == [[100, 200, 3, 4, 64, 64]] * 5
    assert samples.conds is not None
    for number, caption, cond in zip(numbers(samples), samples.captions, samples.conds[0].int().tolist(), strict=True):
        assert cond[0] == number and caption == f"number {number} caption {cond[1]}"


def test_every_caption_has_its_turns(tmp_path: Path) -> None:
    source = cache(write_cache(tmp_path, [[SQUARE] * 4], captions=3))
    drawn = {caption for epoch in range(12) for caption in source.batch(range(4 * epoch, 4 * epoch + 4)).captions}
    assert len(drawn) == 12
    assert source.batch([5, 6]).captions == source.batch(range(4, 8)).captions[1:3]
    samples = source.batch(range(4))
    assert [f"{name.replace('image', 'number')} caption" for name in samples.names] == [text[:-2] for text in samples.captions]


def test_a_batch_of_two_groups_is_refused(tmp_path: Path) -> None:
    source = cache(write_cache(tmp_path, [[SQUARE, WIDE] * 4]))
    assert source.batch_size == 2
    batches = [source.batch([2 * group, 2 * group + 1]).latents for group in range(20)]
    shapes = [tuple(latents.shape[2:]) for latents in batches if latents is not None]
    assert set(shapes) == {(8, 8), (6, 10)} and len(shapes) == 20
    change_of_size = next(group for group in range(20) if shapes[group] != shapes[group + 1])
    with pytest.raises(ValueError, match=r"a batch must lie in one group of data.batch_size"):
        source.batch([2 * change_of_size + 1, 2 * change_of_size + 2])


def test_a_flipped_byte_costs_one_sample_and_always_the_same_takes_its_place(tmp_path: Path) -> None:
    shard = write_cache(tmp_path, [[SQUARE, WIDE] * 4]) / "00000-00000.tar"
    index = load_file(tmp_path / "index.safetensors")
    data = bytearray(shard.read_bytes())
    data[index["offset"][3] + index["length"][3] - 4] ^= 1  # the least bit of a number: still a latent, only not the one that was written
    shard.write_bytes(data)
    batches = [cache(tmp_path).batch(range(2 * group, 2 * group + 2)) for group in range(4)]
    bad = [sample for batch in batches for sample in batch.bad]
    assert len(set(bad)) == 1 and bad[0].reason == "damaged" and "00000-00000.tar" in bad[0].name
    again = [cache(tmp_path).batch(range(2 * group, 2 * group + 2)) for group in (3, 2, 1, 0)][::-1]
    assert [numbers(batch) for batch in again] == [numbers(batch) for batch in batches]
    halves = [cache(tmp_path).batch([position]) for position in range(8)]
    assert [number for half in halves for number in numbers(half)] == [number for batch in batches for number in numbers(batch)]


def test_a_torn_shard_costs_what_it_lost(tmp_path: Path) -> None:
    write_cache(tmp_path, [[SQUARE] * 4, [SQUARE] * 4])
    torn = tmp_path / "00000-00001.tar"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    source = cache(tmp_path)
    assert 1 <= len(source.bad) <= 3 and {sample.reason for sample in source.bad} == {"torn shard"}
    assert source.num_samples == 8 - len(source.bad)
    drawn = numbers(source.batch(range(source.num_samples)))
    assert sorted(drawn) == list(range(source.num_samples))
    with pytest.raises(ValueError, match=r"of 8 samples are bad, more than data.max_bad_fraction=0.01"):
        cache(tmp_path, max_bad=0.01)
    torn.unlink()
    assert len(cache(tmp_path).bad) == 4


def test_a_latent_that_is_not_finite_is_replaced(tmp_path: Path) -> None:
    with PartWriter(tmp_path, PartName(0, 0)) as writer:
        for number in range(4):
            latent = torch.full((4, 8, 8), float("nan" if number == 2 else number))
            writer.add(number, {"text": ["a"], "sizes": [64, 64, 0, 0, 64, 64], "name": f"photo {number}"}, {"latent": latent})
        writer.close(4, last=True)
    made = {"teacher": "tiny", "fingerprint": {}, "image_size": 64, "dtype": "fp32", "embeddings": False, "source": {}, "settings": {}}
    seal(tmp_path, finished(tmp_path, 0), {**made, "probe": {}})
    samples = cache(tmp_path).batch(range(4))
    assert [(sample.reason, sample.name.startswith("photo 2 ")) for sample in samples.bad] == [("not finite", True)]
    assert set(numbers(samples)) == {0, 1, 3}


def test_nothing_half_written_counts(tmp_path: Path) -> None:
    with PartWriter(tmp_path, PartName(0, 0)) as writer:
        writer.add(0, {"text": ["a"], "sizes": [64, 64, 0, 0, 64, 64], "name": "a"}, {"latent": torch.zeros(4, 8, 8)})
    assert finished(tmp_path, 0) == [] and not list(tmp_path.glob("*.tar")), "left before close"
    with pytest.raises(ValueError, match=r"holds no dataset.json: .* has not finished; run it again"):
        cache(tmp_path)


def change(path: Path, **fields: object) -> None:
    manifest = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps(manifest | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 9}, "was prepared in format 9"),
        ({"index_sha256": "0"}, "index.safetensors is not that of dataset.json"),
        ({"shards": [{"name": "../../etc/passwd.tar"}]}, "not a file of the cache; it is refused"),
        ({"shards": [{"name": "pipe:touch x"}]}, "not a file of the cache; it is refused"),
        ({"unknown": 1}, "is not one of a prepared cache"),
    ],
)
def test_a_changed_manifest_is_refused(fields: dict[str, object], message: str, tmp_path: Path) -> None:
    change(write_cache(tmp_path, [[SQUARE] * 2]), **fields)
    with pytest.raises(ValueError, match=f"data.path.*{message}"):
        cache(tmp_path)


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path, [[SQUARE] * 2])
    cache(tmp_path, fingerprint={"pipeline": "tiny"})
    with pytest.raises(ValueError, match=r"was prepared for another teacher, tiny: pipeline, schedule differ"):
        cache(tmp_path, fingerprint={"pipeline": "other", "schedule": "x"})


class Weights:
    """An encoder whose weights are one number."""

    def __init__(self, weight: float):
        self.weight = weight

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return self.weight * images[:, :, ::8, ::8]

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[torch.Tensor, ...]:
        return (torch.full((len(prompts), 2, 3), self.weight),)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    change(write_cache(tmp_path, [[SQUARE] * 2], embeddings=True), probe=probe(Weights(1.0), embeddings=True))
    source = CacheSource(str(tmp_path), 0, 2)
    source.check(Weights(1.0))
    source.check(Weights(1.001))  # another precision
    with pytest.raises(ValueError, match=r"was prepared with another VAE than that of teacher.path"):
        source.check(Weights(1.1))


def test_every_tensor_of_a_batch_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = CacheSource(str(write_cache(tmp_path / "cache", [[(64, 64)] * 2], embeddings=True)), 0, 2).batch(range(2))
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())  # needs a GPU
    again = samples.pinned()
    assert again.latents is not None and again.conds is not None and again.sizes is not None
    for before, after in zip(pinned, (again.latents, again.sizes, *again.conds), strict=True):
        assert torch.equal(before, after)
