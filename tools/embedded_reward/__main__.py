"""Rebuild the embedded rewards on a CPU: `python -m tools.embedded_reward`.

About ten minutes each on one core; goes on from its last save after any stop. With --weak, in a quarter of a minute, one that can be
hacked (docs/refl.md).
"""

import argparse
import json
from pathlib import Path

import torch

from hyper_sd.rewards.embedded import EmbeddedKind, EmbeddedReward, save_reward
from tools.embedded_reward.training import RECIPES, WEAK, Recipe, measure, train, train_weak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("outputs/embedded_reward"))
    parser.add_argument("--out", type=Path, default=Path("assets/reward"))
    parser.add_argument("--kind", choices=list(RECIPES), nargs="*", default=list(RECIPES))
    parser.add_argument("--weak", type=Path, metavar="DIR", help="make nothing but the weak one, in this directory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.weak:
        _write("embedded", train_weak(args.weak / "work"), WEAK, args.weak)
        return
    for kind in args.kind:
        _write(kind, train(kind, args.workdir), RECIPES[kind], args.out)


def _write(kind: EmbeddedKind, reward: EmbeddedReward, recipe: Recipe, out: Path) -> None:
    save_reward(reward, kind, out)
    facts = measure(reward, recipe)
    (out / f"{kind}.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(kind, json.dumps(facts, indent=2), flush=True)


if __name__ == "__main__":
    main()
