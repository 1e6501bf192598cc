"""What reading prepared data costs: `python benchmarks/reader.py [num_samples=2000] [batch_size=32] [num_workers=4] [rate=500]`.

Writes a cache of random latents of SDXL's size (4 x 128 x 128, fp16), without and with text embeddings, and measures the samples
a second that the reader alone makes of it, in the random order of training, and how long a training that takes `rate` samples a second
would stand still for them. Prints a table and, last, one line of JSON.
"""

import json
import shutil
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

from hyper_sd.data import Prefetcher
from hyper_sd.data.cache import CacheSource
from hyper_sd.prepare.finish import seal
from hyper_sd.prepare.shards import PartName, PartWriter, finished

OPTIONS = {"num_samples": 2000, "batch_size": 32, "num_workers": 4, "rate": 500, "seconds": 10}
SHARD = 500
EMBEDDINGS = {"cond.0": (1, 77, 2048), "cond.1": (1, 1280), "cond.2": (1, 6)}


def main() -> None:
    options = dict(OPTIONS)
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key not in options:
            raise SystemExit(f"unknown option {key}; allowed: {', '.join(options)}")
        options[key] = int(value)
    rows = []
    for embeddings in (False, True):
        folder = Path(tempfile.mkdtemp(prefix="reader-"))
        try:
            write_cache(folder, options["num_samples"], embeddings=embeddings)
            rows.append({"embeddings": embeddings, **measure(folder, options)})
        finally:
            shutil.rmtree(folder)
    print(f"{'embeddings':<12}{'samples/s':>12}{'MB/s':>10}{'waiting share at ' + str(options['rate']) + '/s':>28}")
    for row in rows:
        print(f"{row['embeddings']!s:<12}{row['samples_per_s']:>12.0f}{row['mb_per_s']:>10.0f}{row['waiting_share']:>28.4f}")
    print(json.dumps({**options, "rows": rows}))


def measure(folder: Path, options: dict[str, int]) -> dict[str, float]:
    """The reader alone, then beside a consumer that leaves the processor free, as a GPU does."""
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.tar")) / options["num_samples"]
    alone = _run(folder, options, rest_s=0.0)
    beside = _run(folder, options, rest_s=options["batch_size"] / options["rate"])
    rate = alone["samples_per_s"]
    return {"samples_per_s": rate, "mb_per_s": rate * num_bytes / 1e6, "waiting_share": beside["waiting_share"]}


def _run(folder: Path, options: dict[str, int], rest_s: float) -> dict[str, float]:
    size = options["batch_size"]
    source = CacheSource(str(folder), 0, size, options["num_workers"])
    steps = (step for step in range(10**9))
    with Prefetcher(source, lambda step: [range(step * size, (step + 1) * size)], steps, ahead=2, pin=False) as reading:
        for _ in islice(iter(reading.take, None), 4):  # threads, the first permutation
            time.sleep(rest_s)
        waited, start, num = reading.waited_s, time.monotonic(), 0
        while time.monotonic() - start < options["seconds"]:
            samples = reading.take()[0][1]
            assert samples.latents is not None and len(samples.latents) == size
            num += size
            time.sleep(rest_s)
        elapsed = time.monotonic() - start
    return {"samples_per_s": num / elapsed, "waiting_share": (reading.waited_s - waited) / elapsed}


def write_cache(folder: Path, num: int, *, embeddings: bool) -> None:
    """A cache of random samples, as scripts/prepare.py would write it."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"latent": (4, 128, 128), **(EMBEDDINGS if embeddings else {})}
    for start in range(0, num, SHARD):
        end = min(start + SHARD, num)
        with PartWriter(folder, PartName(0, start // SHARD)) as writer:
            for number in range(start, end):
                tensors = {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}
                writer.add(number, {"text": [f"caption {number}"], "sizes": [1024, 1024, 0, 0, 1024, 1024], "name": str(number)}, tensors)
            writer.close(end - start, last=end == num)
    made = {"teacher": "random", "fingerprint": {}, "image_size": 1024, "dtype": "fp16", "embeddings": embeddings}
    seal(folder, finished(folder, 0), {**made, "source": {}, "settings": {}, "probe": {}})


if __name__ == "__main__":
    main()
