import hashlib
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


def test_a_run_that_went_back_leaves_nothing_above_what_it_saves(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(250), keep_last=2)
    (save_checkpoint(tmp_path, make(300), keep_last=2) / "state.json").unlink()
    save_checkpoint(tmp_path, make(270), keep_last=1, keep_every=100)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.step == 270
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000270"]


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


def test_keep_every_keeps_more(tmp_path: Path) -> None:
    for step in range(1, 8):
        save_checkpoint(tmp_path, make(step), keep_last=1, keep_every=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000006", "step_00000007"]


def test_a_place_that_cannot_be_written_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "saved", make(1), keep_last=1)
    (tmp_path / "saved" / "step_00000002.tmp").write_text("no save leaves a file of this name")
    with pytest.raises(CheckpointError, match=r"step_00000002 cannot be saved: .*before it are untouched"):
        save_checkpoint(tmp_path / "saved", make(2), keep_last=1)
    assert load_checkpoint(tmp_path / "saved" / "step_00000001").step == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be saved"):
        save_checkpoint(tmp_path / "file", make(2), keep_last=1)


def test_what_was_left_by_a_kill_is_cleared_away(tmp_path: Path) -> None:
    for name in ("step_00000001.tmp", "step_00000003.tmp.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapters.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, make(5), keep_last=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


def test_skipped_updates_are_counted_on(tmp_path: Path) -> None:
    saved = Checkpoint(4, {}, {"a": torch.ones(1)}, {"student": 4}, skipped={"student": 3}, in_a_row={"student": 2})
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved, keep_last=1))
    assert (loaded.updates, loaded.skipped, loaded.in_a_row) == ({"student": 4}, {"student": 3}, {"student": 2})


@pytest.mark.parametrize("state", ['{"step": "x"}', "[]", '{"step": 1, "updates": 3}'])
def test_a_state_of_another_form_is_named(state: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make(1), keep_last=1)
    (path / "state.json").write_text(state)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["state.json"]["sha256"] = hashlib.sha256(state.encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        load_checkpoint(path)
