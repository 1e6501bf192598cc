"""The command line, as a user starts it."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from hyper_sd.cli import compose, literal, submitted
from hyper_sd.config import RunConfig, run_config
from hyper_sd.paths import config_dir

ROOT = Path(__file__).parents[2]
GROUPS = ("teacher", "data", "adapter", "optimizer", "engine", "eval", "tracker", "segmenter", "adversarial")
# those whose options help names
OPTION_GROUPS = ("recipe", "teacher", "data", "tracker", "stage", "reward", "segmenter", "decoder", "adversarial")


def run_of(*overrides: str) -> RunConfig:
    return run_config(compose("train", list(overrides)))


def python(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=180)


# ---- values that Hydra's grammar does not read


@given(st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="[\"'"), min_size=1))
def test_a_prompt_is_taken_literally(text: str) -> None:
    for prompt in (text.strip() or "x", f"it's {text}", f"a, b={text}\\", f"{text}\\'"):
        parsed = OverridesParser.create().parse_override(literal(f"prompt={prompt}"))
        if prompt not in ("null", "???"):
            assert parsed.value() == prompt
            assert not parsed.is_sweep_override()


@pytest.mark.parametrize("value", ["/s/{0000..0099}.tar", "C:/my images/ä.tar", "a=b", "it's"])
def test_paths_hydra_does_not_read_are_quoted(value: str) -> None:
    assert run_of("data=webdataset", literal(f"data.path={value}"), literal(f"init={value}")).data.path == value


@pytest.mark.parametrize("override", ["seed=3", "only=[a,b]", "+x={a:1}", "x='a b'", "x=1,2", "~stages.tscd_8", "x=range(1,3)"])
def test_what_hydra_reads_stays_as_it_is(override: str) -> None:
    assert literal(override) == override


# ---- the command line, as a user starts it

WITHOUT_TORCH = """
import json, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
    code = 0
except SystemExit as stop:
    code = stop.code or 0
print(json.dumps([code, "torch" in sys.modules]))
"""

JOB = """
from hyper_sd.cli import entry
from hyper_sd.config import run_config
@entry("train")
def main(cfg):
    run = run_config(cfg)
    print("RUN", run.run.dir, run.stages["tscd_1"].method["ema_decay"], flush=True)
    {body}
main()
"""


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--help"], 0, ["stages.tscd_2.max_steps", "resume"]),
        (["--cfg", "job"], 0, ["segments: 8", "resume: never"]),
        (["seedd=3"], 2, ["did you mean seed?"]),
        (["--cfg", "job", "recipe=dmo"], 2, ["did you mean demo?"]),
        (["stages.tscd_2.max_steps=abc"], 2, ["stages.tscd_2.max_steps: got 'abc' (str), expected int"]),
        (["--experimental-rerun", "x.pickle"], 2, ["would load a pickle"]),
    ],
)
def test_answers_without_torch_from_anywhere(tmp_path: Path, arguments: list[str], code: int, says: list[str]) -> None:
    done = python("-c", WITHOUT_TORCH, str(ROOT / "scripts" / "train.py"), *arguments, cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1]) == [code, False], done.stderr
    assert [word for word in says if word not in done.stdout + done.stderr] == []
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_group_and_option(tmp_path: Path) -> None:
    text = python(str(ROOT / "scripts" / "train.py"), "--help", cwd=tmp_path).stdout
    words = set(text.replace(",", " ").split())
    options = {path.stem for group in OPTION_GROUPS for path in (config_dir() / group).glob("*.yaml")}
    assert {*options, *GROUPS, *OPTION_GROUPS} - words == set()


def test_hydra_leaves_the_process_alone(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB.format(body="import logging, os; print(os.getcwd(), logging.getLogger().handlers)"))
    done = python("job.py", cwd=tmp_path)
    assert done.stdout.splitlines() == ["RUN outputs/demo 0.95", f"{tmp_path} []"], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["job.py"]


def test_own_yaml_files(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB.format(body="print(run.name)"))
    (tmp_path / "mine" / "recipe").mkdir(parents=True)
    (tmp_path / "mine" / "recipe" / "own.yaml").write_text("# @package _global_\ndefaults: [smoke, _self_]\nname: own\nseed: 5\n")
    done = python("job.py", "--config-dir", "mine", "recipe=own", cwd=tmp_path)
    assert done.stdout.splitlines() == ["RUN outputs/own 0.95", "own"], done.stderr
    typo = python("job.py", "--config-dir", "mine", "recipe=owm", cwd=tmp_path)
    assert (typo.returncode, "did you mean own?" in typo.stderr) == (2, True)


def test_an_installed_package_brings_its_yaml_files(tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(ROOT / "hyper_sd", site / "hyper_sd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(config_dir(), site / "hyper_sd" / "configs")
    (tmp_path / "job.py").write_text(JOB.format(body="from hyper_sd.paths import config_dir; print(config_dir())"))
    done = python("job.py", cwd=tmp_path, PYTHONPATH=str(site))
    assert done.stdout.splitlines() == ["RUN outputs/demo 0.95", str(site / "hyper_sd" / "configs")], done.stderr


def test_our_value_errors_are_one_line_and_others_keep_their_traceback(tmp_path: Path) -> None:
    (tmp_path / "ours.py").write_text(JOB.format(body="from hyper_sd.structured import build_target; build_target({}, 'stages.x')"))
    ours = python("ours.py", cwd=tmp_path)
    assert ours.returncode == 2 and ours.stderr.startswith("error: stages.x._target_: got null") and ours.stderr.count("\n") == 1
    debug = python("ours.py", cwd=tmp_path, HYPER_SD_TRACEBACK="1")
    assert debug.returncode == 1 and "Traceback" in debug.stderr
    (tmp_path / "foreign.py").write_text(JOB.format(body="int('x')"))
    foreign = python("foreign.py", cwd=tmp_path)
    assert foreign.returncode == 1 and "Traceback" in foreign.stderr and "int('x')" in foreign.stderr


# ---- several runs


def test_multirun_gives_every_job_its_process_and_directory_and_reports_failures(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB.format(body="raise SystemExit(3 * (run.stages['tscd_1'].method['ema_decay'] == 0.9))"))
    done = python("job.py", "-m", "recipe=smoke", "stages.tscd_1.ema_decay=0.9,0.95", cwd=tmp_path)
    started = [line for line in done.stdout.splitlines() if line.startswith("RUN")]
    assert started == [f"RUN outputs/multirun/smoke/stages.tscd_1.ema_decay={decay} {decay}" for decay in (0.9, 0.95)]
    assert done.returncode == 1
    assert "1 of 2 jobs finished" in done.stdout and "exit code 3: outputs/multirun/smoke/stages.tscd_1.ema_decay=0.9\n" in done.stderr


def test_multirun_of_all_combinations_under_an_own_directory(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB.format(body="pass"))
    done = python("job.py", "-m", "recipe=smoke,demo", "run.dir=here", "seed=range(0,2)", cwd=tmp_path)
    directories = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("RUN")]
    assert directories == [f"here/recipe={recipe},seed={seed}" for recipe in ("smoke", "demo") for seed in (0, 1)]
    assert done.returncode == 0


def test_multirun_checks_all_jobs_before_the_first_and_refuses_launchers(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB.format(body="pass"))
    typo = python("job.py", "-m", "recipe=smoke,smok", cwd=tmp_path)
    assert (typo.returncode, typo.stdout) == (2, "") and "did you mean smoke?" in typo.stderr
    launched = python("job.py", "-m", "seed=1,2", cwd=tmp_path, WORLD_SIZE="2")
    assert (launched.returncode, launched.stdout) == (2, "") and "WORLD_SIZE=2" in launched.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_multirun_lets_the_job_save_and_starts_no_other(tmp_path: Path, number: signal.Signals) -> None:
    body = """
    import pathlib, signal, sys, time
    def save(*_):
        time.sleep(0.5)
        pathlib.Path("saved").touch()
        sys.exit(130)
    signal.signal(signal.SIGINT, save); signal.signal(signal.SIGTERM, save)
    pathlib.Path("ready").touch()
    time.sleep(30)
    """
    (tmp_path / "job.py").write_text(JOB.format(body=body.strip()))
    command = [sys.executable, "job.py", "-m", "seed=1,2"]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert (tmp_path / "saved").exists() and process.returncode == 1
    assert output.count("RUN") == 1 and "resume=auto" in output


def test_only_training_can_be_swept(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "export.py"), "-m", "run=a,b"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "scripts/train.py" in done.stderr and "Traceback" not in done.stderr


def test_a_sweep_for_one_of_hydras_launchers_numbers_its_directories() -> None:
    sweep = ["hydra/launcher=submitit_slurm", "recipe=smoke", "stages.tscd_1.ema_decay=0.9,0.95"]
    args = argparse.Namespace(config_dir=None)
    assert submitted("train", args, sweep) == [*sweep, "run.dir='outputs/multirun/${name}/${hydra:job.num}'"]
    assert submitted("train", args, [*sweep, "run.dir=mine"])[-1] == "run.dir='mine/${hydra:job.num}'"
    with pytest.raises(SystemExit):
        submitted("train", args, [*sweep, "lora.rnk=1,2"])
