"""Each sample exactly once an epoch, whatever the shards, sizes, processes, workers and points of resuming."""

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyper_sd.config import DataConfig, DataPart
from hyper_sd.data import Prefetcher, Samples, Source, build_source
from hyper_sd.data.order import BucketOrder, EpochOrder, MixOrder
from tests.caches import write_cache
from tests.shards import image_shard

SQUARE, WIDE, TALL = (64, 64), (48, 80), (80, 48)


def epochs(stream: Sequence[int], num: int) -> list[list[int]]:
    """A stream cut into passes of `num`, the last one maybe a part."""
    return [list(stream[start : start + num]) for start in range(0, len(stream), num)]


def assert_exact(stream: Sequence[int], members: Sequence[int]) -> None:
    """Every pass over the members has each once; what is left over has none twice."""
    for epoch in epochs(stream, len(members)):
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(members)
        assert len(epoch) < len(members) or set(epoch) == set(members)


@given(st.integers(1, 50), st.integers(0, 3))
def test_an_epoch_is_a_permutation_and_each_is_another(num: int, seed: int) -> None:
    order = EpochOrder(num, seed)
    stream = [order.index(position) for position in range(3 * num)]
    assert_exact(stream, range(num))
    if num > 20:
        assert len({tuple(epoch) for epoch in epochs(stream, num)}) == 3


@given(st.lists(st.integers(1, 23), min_size=1, max_size=4), st.integers(1, 7), st.integers(0, 3))
def test_every_bucket_is_exact_every_group_of_one_bucket_and_no_bucket_stays_behind(sizes: list[int], group: int, seed: int) -> None:
    ends = np.cumsum(sizes)
    buckets = [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    order = BucketOrder(buckets, group, seed)
    ends_of_epochs = [sum(epoch * size // group for size in sizes) for epoch in range(4)]  # in groups
    stream = [order.index(position) for position in range(ends_of_epochs[-1] * group)]
    bucket_of = np.searchsorted(ends, stream, side="right")
    assert all(len(set(row)) == 1 for row in epochs(bucket_of.tolist(), group))
    for number, bucket in enumerate(buckets):
        own = [index for index, place in zip(stream, bucket_of, strict=True) if place == number]
        assert_exact(own, bucket.tolist())
        for epoch, end in enumerate(ends_of_epochs):
            assert epoch * len(bucket) - group < (bucket_of[: end * group] == number).sum() <= epoch * len(bucket)
    fresh = BucketOrder(buckets, group, seed)
    places = list(range(0, len(stream), 5))[::-1]
    assert [fresh.index(position) for position in places] == [stream[position] for position in places]


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=5), st.integers(0, 3))
def test_a_mix_gives_each_source_its_share_and_its_groups_in_turn(weights: list[float], seed: int) -> None:
    order = MixOrder(weights, seed)
    places = [order.place(group) for group in range(2 * order.block)]
    for number, weight in enumerate(weights):
        own = sorted(group for source, group in places if source == number)
        assert own == list(range(len(own)))
        assert abs(len(own) / len(places) - weight / sum(weights)) < 0.002 * len(weights)


def numbers(samples: Samples) -> list[int]:
    values = samples.latents if samples.latents is not None else (samples.images * 255 if samples.images is not None else None)
    assert values is not None
    return values[:, 0, 0, 0].round().int().tolist()


def read_by_processes(open_source: dict[str, object], batch: int, world: int, workers: int, steps: range) -> list[int]:
    """What all processes of a run read from its step steps.start on, each through a source and a prefetcher of its own."""
    shares: list[list[list[int]]] = []
    size = batch // world
    for rank in range(world):
        source = build_source(
            DataConfig(batch_size=batch, num_workers=workers, **open_source),  # pyright: ignore[reportArgumentType]
            seed=5,
            image_size=16,
        )
        first = rank * size
        with Prefetcher(
            source, lambda step, first=first: [range(step * batch + first, step * batch + first + size)], steps, ahead=2, pin=False
        ) as reading:
            shares.append([numbers(reading.take()[0][1]) for _ in steps])
    return [number for step in zip(*shares, strict=True) for share in step for number in share]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([SQUARE, WIDE, TALL]), min_size=1, max_size=6), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
    st.data(),
)
def test_a_cache_is_read_exactly_by_any_processes_and_from_any_step(
    shards: list[list[tuple[int, int]]], world: int, size: int, workers: int, data: st.DataObject
) -> None:
    flat = [shape for shard in shards for shape in shard]
    batch, num_steps = world * size, 2 * len(flat) // (world * size) + 2
    begin = data.draw(st.integers(0, num_steps - 1))
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, object] = {"kind": "cache", "path": str(write_cache(Path(folder), shards))}
        straight = read_by_processes(options, batch, 1, 0, range(num_steps))
        resumed = read_by_processes(options, batch, world, workers, range(begin, num_steps))
    assert resumed == straight[begin * batch :]
    for shape in set(flat):
        members = [number for number, other in enumerate(flat) if other == shape]
        assert_exact([number for number in straight if flat[number] == shape], members)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 2), st.data())
def test_raw_shards_are_read_exactly_by_any_processes_and_from_any_step(
    shards: list[int], world: int, workers: int, data: st.DataObject
) -> None:
    total, begin = sum(shards), data.draw(st.integers(0, 4))
    with tempfile.TemporaryDirectory() as folder:
        for number, size in enumerate(shards):
            image_shard(Path(folder) / f"{number}.tar", range(sum(shards[:number]), sum(shards[:number]) + size))
        options: dict[str, object] = {"kind": "webdataset", "path": f"{folder}/{{0..{len(shards) - 1}}}.tar"}
        num_steps = max(5, 2 * total // world)
        straight = read_by_processes(options, world, 1, 0, range(num_steps))
        assert read_by_processes(options, world, world, workers, range(begin, num_steps)) == straight[begin * world :]
    assert_exact(straight, range(total))


def test_a_mix_of_kinds_keeps_every_source_exact_and_every_batch_of_one_source(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", [[SQUARE, WIDE] * 4])
    image_shard(tmp_path / "a.tar", range(100, 107))
    parts = (
        DataPart(kind="cache", path=str(tmp_path / "cache"), weight=3),
        DataPart(kind="webdataset", path=str(tmp_path / "a.tar"), weight=1),
    )
    source: Source = build_source(DataConfig(kind="mix", batch_size=2, sources=parts), seed=0, image_size=16)
    batches = [numbers(source.batch(range(2 * step, 2 * step + 2))) for step in range(1000)]
    assert all(len({number >= 100 for number in batch}) == 1 for batch in batches)
    raw = [number for batch in batches for number in batch if number >= 100]
    assert len(raw) == 2 * 250
    assert_exact(raw, range(100, 107))
    for bucket in ({0, 2, 4, 6}, {1, 3, 5, 7}):
        assert_exact([number for batch in batches for number in batch if number in bucket], sorted(bucket))
    assert source.num_samples == 15 and source.batch_size == 2
    counts = Counter(number for batch in batches for number in batch if number < 100)
    assert max(counts.values()) - min(counts.values()) <= 3


def test_a_bad_sample_beside_an_endless_source_is_weighed_in_its_own(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": f"a prompt {i}" if i else ""}) + "\n" for i in range(1000)))
    prompts = DataPart(kind="prompts", path=str(tmp_path / "prompts.jsonl"))
    for max_bad_fraction, refused in ((0.01, False), (0.0001, True)):
        mixed = DataConfig(kind="mix", batch_size=2, sources=(prompts, DataPart(kind="scenes")), max_bad_fraction=max_bad_fraction)
        with pytest.raises(ValueError, match="1 of 1000 samples are bad") if refused else nullcontext():
            build_source(mixed, seed=0, image_size=32)
