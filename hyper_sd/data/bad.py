"""Bad samples of a run: counted, listed in a file, and the end of it where there are too many."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hyper_sd.data.base import BadSample, Samples, Source

FEWEST = 100  # reads that the share is taken of at least: one bad sample among the first ten is no verdict


def check_opened(source: Source, max_fraction: float) -> None:
    """Raise ValueError if more than this share of the samples was left out when the source was opened."""
    num_bad = len(source.bad)
    total = num_bad + (source.num_samples or 0)
    if num_bad > max_fraction * total:
        raise ValueError(
            f"{source.bad[0]}; {num_bad} of {total} samples are bad, more than data.max_bad_fraction={max_fraction:g} allows; mend or "
            "remove them, or raise it"
        )


class BadSamples:
    """The bad samples of a stage: `num` over all processes so far, part of checkpoints.

    All processes of a run append to the same list, one json object a line.
    """

    def __init__(self, file: Path, max_fraction: float):
        self._file, self._max_fraction = file, max_fraction
        earlier = file.read_text().splitlines() if file.is_file() else []
        self._listed = {name for line in earlier if (name := _name(line)) is not None}
        self._num_new = 0
        self.num = 0

    def restore(self, num: int) -> None:
        """A stage begins or goes on."""
        self.num, self._num_new = num, 0

    def opened(self, source: Source) -> None:
        """List what was left out when the source was opened, which is the same in all processes: for the main one."""
        self._list(source.bad)

    def add(self, samples: Samples) -> None:
        self._num_new += len(samples.bad)
        self._list(samples.bad)

    def take(self) -> int:
        """The number of bad samples that this process met since the last call."""
        taken, self._num_new = self._num_new, 0
        return taken

    def count(self, num_new: int, num_read: int) -> None:
        """Add what all processes met. Raises ValueError, in each of them, if too many of the stage's num_read samples were bad."""
        self.num += num_new
        if self.num > self._max_fraction * max(num_read, FEWEST):
            raise ValueError(
                f"data.path: {self.num} of {num_read} samples read were bad, more than data.max_bad_fraction={self._max_fraction:g} "
                f"allows; {self._file} lists them: mend or remove them, or raise it"
            )

    def _list(self, samples: Sequence[BadSample]) -> None:
        new = {sample.name: sample for sample in samples if sample.name not in self._listed}
        if new:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                file.write("".join(json.dumps(asdict(sample)) + "\n" for sample in new.values()))
            self._listed.update(new)


def _name(line: str) -> str | None:
    try:
        return str(json.loads(line)["name"])
    except (ValueError, KeyError, TypeError):
        return None  # half a line: the process was killed while it wrote
