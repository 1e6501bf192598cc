"""Rebuild the embedded segmenter on a CPU: `python -m tools.embedded_segmenter`.

About ten minutes on one core; goes on from its last save after any stop.
"""

import argparse
import json
from pathlib import Path

import torch

from tools.embedded_segmenter.training import measure, save, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("outputs/embedded_segmenter"))
    parser.add_argument("--out", type=Path, default=Path("assets/segmenter"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    save(train(args.workdir), args.out)
    facts = measure(args.out)
    (args.out / "segmenter.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2), flush=True)


if __name__ == "__main__":
    main()
