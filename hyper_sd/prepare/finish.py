"""The end of preparing: one index over all parts, dataset.json, what was dropped, a contact sheet."""

import hashlib
import io
import json
import shutil
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hyper_sd.commands import PrepareConfig
from hyper_sd.data import storage
from hyper_sd.data.bad import FEWEST
from hyper_sd.data.base import BadSample
from hyper_sd.data.cache import FORMAT, INDEX, MANIFEST, CacheSource, Manifest, probe
from hyper_sd.files import replace_file, write_json
from hyper_sd.prepare.shards import PARTS, Part, finished, writing
from hyper_sd.teachers import Teacher

DROPPED, SHEET = "dropped.jsonl", "contact_sheet.png"
_CELL, _GAP, _LINES, _COLUMNS = 192, 6, 3, 6  # pixels, lines of text


def is_rejection(reason: str) -> bool:
    """Whether a filter asked for it; else the sample is bad."""
    return reason.startswith("filter: ")


def check_bad(cfg: PrepareConfig, bad: Sequence[BadSample], num_read: int) -> None:
    """Raise ValueError if so many of what was read cannot be used; what a filter left out is not among them."""
    limit = cfg.data.max_bad_fraction
    if bad and len(bad) > limit * max(num_read, FEWEST):
        raise ValueError(
            f"{bad[-1]}; {len(bad)} of {num_read} samples are bad, more than data.max_bad_fraction={limit:g} allows; what is wrong is "
            f"listed in {cfg.out}; the same command with a larger one goes on"
        )


def finish(cfg: PrepareConfig, settings: dict[str, Any], teacher: Teacher, num_units: int) -> None:
    """Write dataset.json, last of all. Raises ValueError if no sample is left, or too many of all are bad."""
    out = Path(cfg.out)
    parts = [part for unit in range(num_units) for part in finished(out, unit)]
    bad = [sample for part in parts for sample in part.dropped if not is_rejection(sample.reason)]
    check_bad(cfg, bad, sum(part.read for part in parts))
    made = {
        "teacher": teacher.facts.name,
        "fingerprint": teacher.fingerprint,
        "image_size": teacher.image_size,
        "dtype": cfg.dtype,
        "embeddings": cfg.embeddings,
        "source": settings["data"],
        "settings": settings,
        "probe": probe(teacher, cfg.embeddings),
    }
    with writing(out):
        seal(out, parts, made, unique=cfg.filters.unique_captions)


def seal(out: Path, parts: list[Part], made: dict[str, Any], *, unique: bool = False) -> None:
    """Join finished parts to a cache; `made` are the fields of its manifest that say how it was made."""
    index, again = _merge(out, [part for part in parts if part.kept], unique=unique)
    dropped = [sample for part in parts for sample in part.dropped] + again
    replace_file(out / DROPPED, "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in dropped).encode())
    reasons = dict(Counter(sample.reason for sample in dropped).most_common())
    if index is None:
        raise ValueError(f"out={out}: no sample is left of {sum(part.read for part in parts)}: {reasons}; see {out / DROPPED}")
    data = safetensors.numpy.save(index)
    shards = [part.shard for part in parts if part.shard is not None]
    counts = np.bincount(index["shard"], minlength=len(shards)).tolist()  # fewer than their parts kept, where captions came again
    sizes = Counter(f"{width}x{height}" for height, width in zip(index["height"].tolist(), index["width"].tolist(), strict=True))
    manifest = Manifest(
        format=FORMAT,
        num_samples=len(index["shard"]),
        num_read=sum(part.read for part in parts),
        dropped=reasons,
        buckets=dict(sizes.most_common()),
        shards=[shard | {"num_samples": count} for shard, count in zip(shards, counts, strict=True)],
        index_sha256=hashlib.sha256(data).hexdigest(),
        **made,
    )
    replace_file(out / INDEX, data)
    write_json(out / MANIFEST, manifest.to_json())
    shutil.rmtree(out / PARTS)


def _merge(out: Path, parts: list[Part], *, unique: bool) -> tuple[dict[str, np.ndarray] | None, list[BadSample]]:
    """One index over the parts, and what of it is dropped because a unit before has the same caption."""
    if not parts:
        return None, []
    indices = [part.index(out) for part in parts]
    index = {name: np.concatenate([part[name] for part in indices]) for name in indices[0]}
    index["shard"] = np.repeat(np.arange(len(parts)), [part.kept for part in parts])
    captions = index.pop("caption")
    if not unique:
        return index, []
    kept = np.zeros(len(captions), dtype=bool)
    kept[np.unique(captions, return_index=True)[1]] = True
    again = []
    for row in np.flatnonzero(~kept):
        info = storage.read(str(out / f"{parts[index['shard'][row]].name}.tar"), int(index["offset"][row]), int(index["split"][row]))
        again.append(BadSample(json.loads(info)["name"], "filter: unique_captions"))
    return {name: column[kept] for name, column in index.items()}, again


def summary(out: Path, manifest: Manifest, seconds: float, sheet: Path | None) -> str:
    """What a user wants to know at the end."""
    total, kept = manifest.num_read, manifest.num_samples
    megabytes = sum(shard["bytes"] for shard in manifest.shards) / 1e6
    shards = f"{len(manifest.shards)} shard{'s' if len(manifest.shards) > 1 else ''}"
    lines = [f"{out}: kept {kept} of {total} ({kept / total:.1%}) in {shards}, {megabytes:.1f} MB, {seconds:.0f} s"]
    lines += [f"  dropped {count:>8}  {reason}" for reason, count in manifest.dropped.items()]
    lines += [f"  bucket  {count:>8}  {size}" for size, count in manifest.buckets.items()]
    if manifest.dropped:
        lines.append(f"  what was dropped: {out / DROPPED}")
    if sheet is not None:
        lines.append(f"  contact sheet:    {sheet}")
    lines.append(f"  train on it with: data=cache data.path={out}")
    return "\n".join(lines)


@torch.no_grad()
def contact_sheet(out: Path, teacher: Teacher, num: int) -> Path | None:
    """Samples spread over the cache, read from its shards, decoded by the VAE, with their captions; None for num=0."""
    if num == 0:
        return None
    source = CacheSource(str(out), seed=0, batch_size=1)
    total = source.num_samples
    chosen = [number * total // min(num, total) for number in range(min(num, total))]
    rows = [source.row(index) for index in chosen]
    pictures = [_thumbnail(teacher.decode(row.latent[None])[0]) for row in rows]
    height = max(picture.height for picture in pictures) + 13 * _LINES + 2 * _GAP
    sheet = Image.new("RGB", (_COLUMNS * _CELL, -(-len(chosen) // _COLUMNS) * height), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for place, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        left, top = place % _COLUMNS * _CELL + (_CELL - picture.width) // 2, place // _COLUMNS * height + _GAP
        sheet.paste(picture, (left, top))
        text = "\n".join(textwrap.wrap(row.caption, 32)[:_LINES])
        canvas.multiline_text((place % _COLUMNS * _CELL + _GAP, top + picture.height + 2), text, fill="black", font=font, spacing=1)
    sheet.save(file := io.BytesIO(), "PNG")
    with writing(out):
        replace_file(out / SHEET, file.getvalue())
    return out / SHEET


def _thumbnail(image: Tensor) -> Image.Image:
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())
    scale = (_CELL - 2 * _GAP) / max(picture.size)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
