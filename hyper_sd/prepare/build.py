"""Preparing data: decode, filter, place, encode once, write shards; then one index over all."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from hyper_sd.commands import PrepareConfig
from hyper_sd.data.base import BadSample
from hyper_sd.data.cache import MANIFEST, Manifest
from hyper_sd.lora_file import DTYPES
from hyper_sd.prepare.claim import claimed, identity
from hyper_sd.prepare.filters import Candidate, Size, buckets, examine
from hyper_sd.prepare.finish import check_bad, contact_sheet, finish, is_rejection, summary
from hyper_sd.prepare.inputs import Unit, units
from hyper_sd.prepare.shards import PartName, PartWriter, caption_hash, finished
from hyper_sd.processes import Processes
from hyper_sd.randomness import fold
from hyper_sd.rewards import build_reward, check_reward
from hyper_sd.sample import own_samples
from hyper_sd.stop import Stop
from hyper_sd.teachers import Teacher, base_dtype, inspect_teacher, load_teacher

T = TypeVar("T")
R = TypeVar("R")

Score = Callable[[Tensor, list[str]], Tensor]  # images (B, 3, H, W) in [0, 1] and captions to (B,); higher is better

_POLL_S = 0.5


def prepare(cfg: PrepareConfig, processes: Processes, score: Score | None = None) -> Manifest | None:
    """Make the cache `cfg.out`, or go on with it; None in all but the main process, and if a stop signal came first.

    Every process takes every world_size-th unit of the input, so that the files are the same with any number of processes. `score`
    takes the place of the reward model cfg.scorer, which filters.min_aesthetic is a limit of.
    Raises ValueError, naming the key, before any weight is loaded.
    """
    facts = inspect_teacher(cfg.teacher)
    sizes = buckets(facts.image_size, cfg.buckets)
    scale = facts.image_size // facts.latent_shape[1]
    if cfg.buckets is not None and cfg.buckets.step % scale:
        raise ValueError(f"buckets.step={cfg.buckets.step} must be a multiple of {scale}, the VAE's pixels for one of the latent")
    if (cfg.filters.min_aesthetic is None) != (score is None and cfg.scorer is None):
        raise ValueError(
            f"filters.min_aesthetic={cfg.filters.min_aesthetic} needs a scorer, e.g. +reward@scorer=aesthetic, and a scorer needs it; give "
            "both or none"
        )
    parts = units(cfg.data, cfg.shard_size)
    if cfg.scorer is not None:
        check_reward(cfg.scorer, "scorer")
    settings = identity(cfg, parts)
    with claimed(Path(cfg.out), settings, processes):
        teacher = load_teacher(cfg.teacher, processes.device, base_dtype(cfg.teacher, processes.device))
        if cfg.scorer is not None and score is None:
            score = build_reward(cfg.scorer, processes.device, "scorer").score
        with Stop().caught() as stop:
            preparer = Preparer(cfg, teacher, score, sizes, stop, processes.is_main)
            return _make(preparer, parts, settings, processes)


def _make(preparer: "Preparer", parts: list[Unit], settings: dict[str, Any], processes: Processes) -> Manifest | None:
    cfg, out, since = preparer.cfg, Path(preparer.cfg.out), time.monotonic()
    if not (out / MANIFEST).is_file():
        own = range(processes.rank, len(parts), processes.world_size)
        if not preparer.run(parts, own):
            print(f"stopped by {preparer.stop.received}; the same command goes on", flush=True)
            return None
        if not processes.is_main or not _all_there(out, len(parts), preparer.stop):
            return None
        finish(cfg, settings, preparer.teacher, len(parts))
    if not processes.is_main:
        return None
    manifest = Manifest.read(str(out))
    sheet = contact_sheet(out, preparer.teacher, cfg.sheet)
    print(summary(out, manifest, time.monotonic() - since, sheet), flush=True)
    return manifest


def _all_there(out: Path, num_units: int, stop: Stop) -> bool:
    """Wait for the other processes: for as long as it takes, which no collective does. False if a stop signal came."""
    for unit in range(num_units):
        while not ((parts := finished(out, unit)) and parts[-1].last):
            if stop.received is not None:
                return False
            time.sleep(_POLL_S)
    return True


@dataclass
class Preparer:
    """Makes the parts of units in one process."""

    cfg: PrepareConfig
    teacher: Teacher
    score: Score | None
    sizes: list[Size]
    stop: Stop
    shows: bool
    _num_read: int = field(default=0, init=False)
    _bad: list[BadSample] = field(default_factory=list, init=False)
    _num_kept: int = field(default=0, init=False)
    _captions: set[int] = field(default_factory=set, init=False)  # of what is kept of the unit

    def run(self, parts: list[Unit], own: range) -> bool:
        """False if a stop signal came first; what is finished is kept."""
        with tqdm(desc="prepare", unit="sample", disable=not self.shows, mininterval=1) as bar:
            for done, number in enumerate(own):
                known = [parts[unit].num_entries for unit in own]
                if None not in known:
                    bar.total = sum(count for count in known if count is not None)
                elif done:
                    bar.total = round(bar.n / done * len(own))  # units are much alike
                if not self._unit(number, parts[number], bar):
                    return False
        return True

    def _unit(self, number: int, unit: Unit, bar: Any) -> bool:
        earlier = finished(Path(self.cfg.out), number)
        self._captions = {int(value) for part in earlier for value in part.index(Path(self.cfg.out))["caption"]}
        for part in earlier:
            self._count(part.read, part.dropped)
        start = sum(part.read for part in earlier)
        bar.update(start)
        if earlier and earlier[-1].last:
            return True
        entries = iter(unit.entries(start))
        for count in itertools.count(len(earlier)):
            read = self._part(PartName(number, count), entries, start, bar)
            if read is None:
                return False
            start += read
            if read < self.cfg.shard_size:
                return True
        raise AssertionError("a unit has an end")

    def _part(self, name: PartName, entries: Iterator[Any], start: int, bar: Any) -> int | None:
        """The number of entries that went into a part; None if a stop signal came, and then there is no part."""
        taken = itertools.islice(enumerate(entries, start), self.cfg.shard_size)
        waiting: dict[Size, list[Candidate]] = {}
        read = 0
        with PartWriter(Path(self.cfg.out), name) as writer:
            for found in ahead(lambda pair: examine(pair[1], pair[0], self.cfg.filters, self.sizes), taken, self.cfg.data.num_workers):
                if self.stop.received is not None:
                    return None
                read += 1
                bar.update()
                if isinstance(found, BadSample):
                    writer.dropped.append(found)
                    continue
                group = waiting.setdefault(found.size, [])
                group.append(found)
                if len(group) == self.cfg.encode_batch:
                    self._write(writer, name, waiting.pop(found.size))
            for size in sorted(waiting):
                self._write(writer, name, waiting[size])
            writer.close(read, last=read < self.cfg.shard_size)
        self._num_kept += len(writer.rows)
        bar.set_postfix(kept=self._num_kept, refresh=False)
        self._count(read, writer.dropped)
        return read

    @torch.no_grad()
    def _write(self, writer: PartWriter, name: PartName, group: list[Candidate]) -> None:
        """Score, encode and write candidates of one size."""
        group = self._unique(writer, self._good(writer, group))
        if not group:
            return
        latents, dtype = self._latents(name, group), DTYPES[self.cfg.dtype]
        conds = self._conds(group)
        for row, candidate in enumerate(group):
            tensors = {"latent": latents[row], **{f"cond.{part}": value for part, value in enumerate(conds[row])}}
            tensors = {key: value.to("cpu", dtype, copy=True).contiguous() for key, value in tensors.items()}
            if not all(bool(value.isfinite().all()) for value in tensors.values()):
                writer.dropped.append(BadSample(candidate.name, "not finite", "the encoded sample"))
                self._captions.discard(caption_hash(candidate.captions))
                continue
            height, width = candidate.size
            sizes = candidate.placed.sizes if candidate.placed is not None else (height, width, 0, 0, height, width)
            writer.add(candidate.number, {"text": list(candidate.captions), "sizes": list(sizes), "name": candidate.name}, tensors)

    def _good(self, writer: PartWriter, group: list[Candidate]) -> list[Candidate]:
        least = self.cfg.filters.min_aesthetic
        if self.score is None or least is None or group[0].placed is None:
            return group
        scores = self.score(_images(group).to(self.teacher.device), [candidate.captions[0] for candidate in group]).tolist()
        for candidate, score in zip(group, scores, strict=True):
            if not score >= least:
                writer.dropped.append(BadSample(candidate.name, "filter: min_aesthetic", f"{score:.4g}"))
        return [candidate for candidate, score in zip(group, scores, strict=True) if score >= least]

    def _unique(self, writer: PartWriter, group: list[Candidate]) -> list[Candidate]:
        """Captions of other units are compared at the end."""
        if not self.cfg.filters.unique_captions:
            return group
        kept: list[Candidate] = []
        for candidate in group:
            caption = caption_hash(candidate.captions)
            if caption in self._captions:
                writer.dropped.append(BadSample(candidate.name, "filter: unique_captions"))
            else:
                self._captions.add(caption)
                kept.append(candidate)
        return kept

    def _latents(self, name: PartName, group: list[Candidate]) -> Tensor:
        if group[0].placed is not None:
            return self.teacher.encode_images(_images(group))
        index = [fold(name.unit, candidate.number) for candidate in group]
        prompts = [candidate.captions[0] for candidate in group]
        return own_samples(self.teacher, self.cfg.teacher, prompts, index, self.cfg.data.teacher_steps, self.cfg.seed)

    def _conds(self, group: list[Candidate]) -> list[tuple[Tensor, ...]]:
        """The conditions of each candidate's captions, their leading dimension; none where embeddings are off."""
        if not self.cfg.embeddings:
            return [()] * len(group)
        parts = self.teacher.encode_prompts([caption for candidate in group for caption in candidate.captions])
        split = [part.split([len(candidate.captions) for candidate in group]) for part in parts]
        return list(zip(*split, strict=True))

    def _count(self, read: int, dropped: Sequence[BadSample]) -> None:
        """Of all that this process has looked at, also before an interruption; what all processes found is judged at the end."""
        self._num_read += read
        self._bad += [sample for sample in dropped if not is_rejection(sample.reason)]
        check_bad(self.cfg, self._bad, self._num_read)


def ahead(function: Callable[[T], R], items: Iterable[T], num_workers: int) -> Iterator[R]:
    """`map` by threads that stay a bounded number of items ahead: images in memory are the price of each."""
    if num_workers == 0:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(num_workers, thread_name_prefix="prepare") as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _images(group: list[Candidate]) -> Tensor:
    return torch.stack([candidate.placed.tensor() for candidate in group if candidate.placed is not None])
