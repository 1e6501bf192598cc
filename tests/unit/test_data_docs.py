"""The commands of docs/data.md, on stand-ins with the layout of what they download."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hyper_sd.cli import compose, literal
from hyper_sd.commands import PrepareConfig
from hyper_sd.config import DataConfig, run_config
from hyper_sd.data import build_source
from hyper_sd.data.folder import Entry, entries
from hyper_sd.prepare.inputs import Item, units
from hyper_sd.structured import resolved, structured
from tests.fixtures.render import PHOTOS
from tests.runs import ROOT
from tests.shards import write_tar

DOCS = (ROOT / "docs" / "data.md").read_text()
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", DOCS, re.DOTALL)).replace("\\\n", " ")
PROGRAMS = re.findall(r"python - <<'END'\n(.*?)\nEND\n", BLOCKS, re.DOTALL)
COMMANDS = [line.partition(" #")[0].strip() for line in BLOCKS.splitlines() if "scripts/" in line]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one(command: str) -> None:
    words = shlex.split(command)
    script = next(number for number, word in enumerate(words) if word.startswith("scripts/"))
    given = [literal(word) for word in words[script + 1 :] if word != "…"]
    if words[script] == "scripts/prepare.py":
        data = structured(PrepareConfig, resolved(compose("prepare", given))).data
    else:
        data = run_config(compose("train", given)).data
    told = dict(word.split("=", 1) for word in words if word.startswith(("data=", "data.path=")))
    assert told["data"] == data.kind and told.get("data.path", data.path) == data.path


def test_captions_of_coco_become_a_table(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    images = [{"id": 9, "file_name": "000000000009.jpg"}, {"id": 25, "file_name": "000000000025.jpg"}]
    rows = [{"image_id": image, "id": number, "caption": f"caption {number}"} for number, image in enumerate((25, 9, 9, 25, 9))]
    layout = {"info": {}, "licenses": [], "images": images, "annotations": rows}
    (tmp_path / "annotations" / "captions_train2017.json").write_text(json.dumps(layout))
    for image in images:
        shutil.copy(PHOTOS / "plain.jpg", tmp_path / "train2017" / str(image["file_name"]))
    subprocess.run([sys.executable, "-c", PROGRAMS[0]], cwd=tmp_path, check=True, timeout=60)
    found = [entry for entry in entries(str(tmp_path / "train2017")) if isinstance(entry, Entry)]
    assert {entry.file.name: entry.captions for entry in found} == {
        "000000000009.jpg": ("caption 1", "caption 2", "caption 4"),
        "000000000025.jpg": ("caption 0", "caption 3"),
    }


def test_shards_of_img2dataset_are_read(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for number in range(3):
        about = {"caption": f"a photo {number}", "url": "https://host/a.jpg", "key": f"{number:09}", "status": "success", "width": 96}
        members[f"{number:09}.jpg"] = (PHOTOS / "plain.jpg").read_bytes()
        members[f"{number:09}.json"] = json.dumps(about).encode()
        members[f"{number:09}.txt"] = about["caption"].encode() if isinstance(about["caption"], str) else b""
    write_tar(tmp_path / "00000.tar", members)
    (unit,) = units(DataConfig(kind="webdataset", path=f"{tmp_path}/{{00000..00000}}.tar", batch_size=1), shard_size=10)
    assert [item.captions for item in unit.entries(0) if isinstance(item, Item)] == [(f"a photo {number}",) for number in range(3)]


def test_prompts_of_diffusiondb_are_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    prompts = ["a cat", "a dog", "", "a cat", "blood"]
    columns = {"image_name": list("abcde"), "prompt": prompts, "seed": range(5), "prompt_nsfw": [0.01, 0.02, 0.0, 0.01, 0.9]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "metadata.parquet")
    subprocess.run([sys.executable, "-c", PROGRAMS[1]], cwd=tmp_path, check=True, timeout=60)
    cfg = DataConfig(kind="prompts", path=str(tmp_path / "prompts.parquet"), caption_column="prompt", batch_size=2)
    assert sorted(build_source(cfg, seed=0, image_size=32).batch(range(2)).captions) == ["a cat", "a dog"]
