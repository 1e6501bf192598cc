"""A data set of the hub, read by the real libraries from a server on this machine."""

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hyper_sd.processes import Processes
from tests.hub import running
from tests.runs import ROOT
from tests.shards import picture
from tests.tiny import tiny_sd15
from tests.unit.test_data_docs import BLOCKS
from tests.unit.test_prepare import made

# one process, since huggingface_hub reads its environment when it is imported
PROGRAM = """
import json, sys
from pathlib import Path
from hyper_sd.processes import Processes
from tests.unit.test_prepare import latents_of, made

teacher, out = map(Path, sys.argv[1:])
processes, found = Processes(cpu_threads=1), {}
for name, options in json.loads(sys.stdin.read()).items():
    try:
        made(teacher, out / name, processes, "data=hf", "shard_size=2", "sheet=0", *options)
        found[name] = {caption: float(latent.sum()) for caption, latent in latents_of(out / name).items()}
    except ValueError as error:
        found[name] = str(error)
print("found", json.dumps(found))
"""


def write_data_set(folder: Path) -> None:
    """Five photos with captions in two parquet files, as `push_to_hub` leaves them."""
    import datasets

    folder.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for file, numbers in enumerate((range(3), range(3, 5))):
        rows = []
        for number in numbers:
            picture(40, 32, (number * 40, 90, 0)).save(buffer := io.BytesIO(), "PNG")
            rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "text": f"a red circle {number}"})
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"train-{file:05}-of-00002.parquet")


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_prepared_streamed_or_downloaded(tmp_path: Path) -> None:
    write_data_set(tmp_path / "hub" / "owner" / "name" / "data")
    write_data_set(tmp_path / "hub" / "owner" / "torn" / "data")
    torn = tmp_path / "hub" / "owner" / "torn" / "data" / "train-00001-of-00002.parquet"
    torn.write_bytes(torn.read_bytes()[:-200])
    runs = {
        "streamed": ["data.path=owner/name"],
        "downloaded": ["data.path=owner/name", "data.streaming=false", "data.revision=main"],
        "some": ["data.path=owner/name", "data.streaming=false", "data.split=train[:3]"],
        "absent": ["data.path=owner/absent"],
        "split": ["data.path=owner/name", "data.split=test"],
        "column": ["data.path=owner/name", "data.caption_column=label"],
        "torn": ["data.path=owner/torn"],
    }
    with running(tmp_path / "hub") as hub:
        hub.failures = 2
        command = [sys.executable, "-c", PROGRAM, str(tiny_sd15(tmp_path / "teacher", image_size=32)), str(tmp_path)]
        environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, input=json.dumps(runs), capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stderr[-3000:]
        assert hub.failures == 0 and any("parquet bytes=" in request for request in hub.requests), "by ranges"
    found = json.loads(done.stdout.splitlines()[-1].removeprefix("found "))
    assert found["streamed"].keys() == {f"a red circle {number}" for number in range(5)}
    assert found["streamed"] == pytest.approx(found["downloaded"], rel=1e-2)
    assert found["some"].keys() == {f"a red circle {number}" for number in range(3)}
    cannot = "the data set cannot be opened: "
    assert found["absent"].startswith(f"data.path=owner/absent, data.split=train: {cannot}Dataset 'owner/absent' doesn't exist")
    assert found["split"].startswith(f"data.path=owner/name, data.split=test: {cannot}Bad split: test")
    assert found["column"] == "data.caption_column=label: the data set has the columns image, text"
    assert found["torn"].startswith("data.path=owner/torn: file 1 cannot be read: ")


@pytest.mark.slow
def test_what_the_documented_download_fetches_is_prepared(tmp_path: Path) -> None:
    words = next(shlex.split(line) for line in BLOCKS.splitlines() if line.startswith("hf download"))
    name, folder = words[2], words[words.index("--local-dir") + 1]
    write_data_set(tmp_path / "hub" / name / "data")
    (tmp_path / "hub" / name / "README.md").write_text("not asked for")
    with running(tmp_path / "hub") as hub:
        command = [str(Path(sys.executable).with_name("hf")), *words[1:]]
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
    found = {str(file.relative_to(tmp_path / folder)) for file in (tmp_path / folder).rglob("*.*") if ".cache" not in file.parts}
    assert found == {f"data/train-{number:05}-of-00002.parquet" for number in range(2)}
    options = ("data=hf", f"data.path={tmp_path / folder}", "sheet=0")
    teacher = tiny_sd15(tmp_path / "teacher", image_size=32)
    assert made(teacher, tmp_path / "cache", Processes(cpu_threads=1), *options).num_samples == 5
