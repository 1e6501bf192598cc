"""Rebuild the embedded rewards on a CPU: `python -m tools.embedded_reward`.

About ten minutes each on one core; goes on from its last save after any stop.
"""

import argparse
import json
from pathlib import Path

import torch

from hyper_sd.rewards.embedded import save_reward
from tools.embedded_reward.training import RECIPES, measure, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("outputs/embedded_reward"))
    parser.add_argument("--out", type=Path, default=Path("assets/reward"))
    parser.add_argument("--kind", choices=list(RECIPES), nargs="*", default=list(RECIPES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kind in args.kind:
        reward = train(kind, args.workdir)
        save_reward(reward, kind, args.out)
        facts = measure(reward, kind)
        (args.out / f"{kind}.json").write_text(json.dumps(facts, indent=2) + "\n")
        print(kind, json.dumps(facts, indent=2), flush=True)


if __name__ == "__main__":
    main()
