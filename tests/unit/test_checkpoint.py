import json
from pathlib import Path

import pytest
import torch

from hyper_sd.checkpoint import MANIFEST, Checkpoint, CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint


def make(step: int) -> Checkpoint:
    adapters = {"student": {"a.lora_A.weight": torch.full((2, 3), float(step))}, "target": {"a.lora_A.weight": torch.zeros(2, 3)}}
    return Checkpoint(step, adapters, {"student/exp_avg/a": torch.ones(2, 3)}, {"student": step})


def test_round_trip(tmp_path: Path) -> None:
    loaded = load_checkpoint(save_checkpoint(tmp_path, make(7), keep_last=2))
    assert loaded.step == 7 and loaded.updates == {"student": 7}
    assert torch.equal(loaded.adapters["student"]["a.lora_A.weight"], torch.full((2, 3), 7.0))
    assert loaded.adapters.keys() == {"student", "target"} and torch.equal(loaded.optimizer["student/exp_avg/a"], torch.ones(2, 3))


def test_the_newest_is_found_and_old_ones_are_removed(tmp_path: Path) -> None:
    for step in (5, 10, 90, 100):
        save_checkpoint(tmp_path, make(step), keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000090", "step_00000100"]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.step == 100


def test_only_safetensors_and_json(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make(1), keep_last=1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_a_half_written_checkpoint_is_never_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(1), keep_last=2)
    half = tmp_path / "step_00000002.tmp"
    half.mkdir()
    (half / "adapters.safetensors").write_bytes(b"half")
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.step == 1
    save_checkpoint(tmp_path, make(2), keep_last=2)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.step == 2 and not half.exists()


@pytest.mark.parametrize("name", ["adapters.safetensors", "optimizer.safetensors", "state.json", MANIFEST])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_damage_names_the_file_and_the_one_before_is_taken(tmp_path: Path, name: str, damage: str) -> None:
    save_checkpoint(tmp_path, make(1), keep_last=2)
    file = save_checkpoint(tmp_path, make(2), keep_last=2) / name
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"safetensors|json"):
        load_checkpoint(tmp_path / "step_00000002")
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.step == 1


def test_none_at_all(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make(1), keep_last=1)
    manifest = json.loads((path / MANIFEST).read_text())
    assert set(manifest) == {file.name for file in path.iterdir()} - {MANIFEST}
    assert all(manifest[name]["bytes"] == (path / name).stat().st_size for name in manifest)
