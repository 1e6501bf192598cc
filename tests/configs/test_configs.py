"""Every yaml composes and builds; every mistake gets one clear message, at once."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from omegaconf import OmegaConf

from hyper_sd.ablation import check_equal_cost, check_plans, runs_of
from hyper_sd.cli import compose
from hyper_sd.config import FeaturesConfig, FilesConfig, RewardConfig, RunConfig, SegmenterConfig, run_config
from hyper_sd.paths import asset_dir, config_dir
from hyper_sd.plan_checks import check_plan, notices
from hyper_sd.roles import LoraSpec
from hyper_sd.stages.refl import ReFL
from hyper_sd.stages.score import Score
from hyper_sd.stages.tscd import TSCD
from hyper_sd.structured import build_target, structured
from hyper_sd.teachers import inspect_teacher

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (config_dir() / "recipe").glob("*.yaml"))
COMMANDS = sorted(path.stem for path in config_dir().glob("*.yaml") if path.stem != "command")
GROUPS = ("teacher", "data", "adapter", "optimizer", "engine", "eval", "tracker", "segmenter")
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((config_dir() / group).glob("*.yaml"))]
REWARDS = sorted(path.stem for path in (config_dir() / "reward").glob("*.yaml"))
COCO = ("data.annotations=instances.json", "data.captions=captions.json")
STAGES = ("tscd_8", "tscd_4", "tscd_2", "tscd_1", "refl", "score")
AFTER_TSCD = {  # what recipes add to the first four stages
    **dict.fromkeys(("demo", "smoke"), ("refl", "score")),
    **dict.fromkeys(("sd15", "sdxl", "ablation"), ("score",)),  # rewards for real images are chosen by who has them
    **dict.fromkeys(("sd15_feedback", "sdxl_feedback"), ("score", "refl")),
    **dict.fromkeys(("demo_tscd", "demo_long", "demo_ablation", "cfg_preserving"), ()),
}


def run_of(*overrides: str) -> RunConfig:
    return run_config(compose("train", list(overrides)))


# ---- every yaml


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds(recipe: str) -> None:
    config = run_of(f"recipe={recipe}", "data.path=somewhere")
    assert config.name == recipe
    assert config.run.dir == f"outputs/{recipe}"
    assert recipe not in AFTER_TSCD or tuple(config.stages) == (*STAGES[:4], *AFTER_TSCD[recipe])
    for plan in [*config.stages.values(), *(stage for stages in config.plans.values() for stage in stages.values())]:
        build_target(plan.method, plan.key).check(1000)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_group_option_builds(group: str, option: str) -> None:
    config = run_of(f"{group}={option}", "data.path=somewhere", *(COCO if option == "coco" else ()))
    if group in ("data", "tracker"):
        assert getattr(config, group).kind == option


@pytest.mark.parametrize(
    ("group", "kind"), [("reward", RewardConfig), ("features", FeaturesConfig), ("segmenter", SegmenterConfig), ("decoder", FilesConfig)]
)
def test_models_build_and_pin_what_they_name(group: str, kind: type[FilesConfig]) -> None:
    files = sorted((config_dir() / group).glob("*.yaml"))
    for file in files:
        config = structured(kind, OmegaConf.to_container(OmegaConf.load(file)))
        for source in (config, getattr(config, "base", None)):
            assert source is None or source.path in (None, "embedded") or len(source.revision or "") == 40 or source.sha256, file
    if group == "reward":
        assert compose("evaluate", ["run=x"]).rewards.keys() == {file.stem for file in files}


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_builds(name: str) -> None:
    config = run_of("recipe=demo_tscd", f"+reward@rewards.mine={name}", f"+reward@heldout={name}")
    assert config.rewards.keys() == {"mine"} and config.rewards["mine"] == config.heldout


@pytest.mark.parametrize("name", sorted(path.stem for path in (config_dir() / "decoder").glob("*.yaml")))
def test_every_decoder_builds(name: str) -> None:
    tiny = run_of(f"+decoder@decode.tiny={name}").decode.tiny
    assert tiny is not None and tiny.path == f"madebyollin/{name}"


@pytest.mark.parametrize("recipe", ["demo", "demo_tscd", "sd15", "sdxl"])
def test_the_papers_adversarial_term_has_its_weights_in_any_recipe(recipe: str) -> None:
    stages = run_of(f"recipe={recipe}", "adversarial=paper", "data.path=x").stages
    tscd = {name: build_target(plan.method, name) for name, plan in stages.items() if name.startswith("tscd")}
    weights = {s.segments: (s.distance_weight, s.adversarial.weight if s.adversarial else 0) for s in tscd.values()}
    assert weights == {8: (1, 0), 4: (1, 0.1), 2: (0.5, 0.5), 1: (0.1, 1)}


@pytest.mark.parametrize("path", sorted((config_dir() / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_launcher_files_load_and_say_how_to_use_them(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes == (1 if path.stem == "cpu" else 2)
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"accelerate launch --config_file configs/accelerate/{path.name}" in line for line in head)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_composes_and_keeps_hydra_quiet(name: str) -> None:
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        settings = hydra.compose(name, return_hydra_config=True).hydra
    assert (settings.output_subdir, settings.run.dir, settings.job.chdir) == (None, ".", False)
    assert settings.job_logging.root is None and settings.hydra_logging.root is None
    assert f"scripts/{name}.py" in settings.help.template and (ROOT / "scripts" / f"{name}.py").is_file()


def test_the_default_is_the_demo() -> None:
    assert run_of() == run_of("recipe=demo")
    assert run_of().teacher.path == "embedded" and run_of().data.kind == "scenes"


@pytest.mark.parametrize(("name", "stage"), [("tscd", TSCD), ("score", Score), ("refl", ReFL)])
def test_the_stage_yaml_is_the_dataclass(name: str, stage: type) -> None:
    """Same keys, same defaults; but the yaml takes guidance from the teacher, and eta from what samplers are told."""
    node = OmegaConf.to_container(OmegaConf.load(config_dir() / "stage" / f"{name}.yaml"))
    assert isinstance(node, dict)
    fields = {f.name: f.default for f in dataclasses.fields(stage)}
    defaults = {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items() if v is not dataclasses.MISSING}
    elsewhere = {"guidance", "eta"}
    assert {name: node[name] for name in defaults.keys() - elsewhere} == {k: v for k, v in defaults.items() if k not in elsewhere}
    training = {"max_steps", "batch_size", "optimizer", "optimizers", "lr_scheduler", "guard"}
    assert node.keys() - training == {"_target_", *fields}


def test_the_lora_yaml_is_the_released_one() -> None:
    lora = run_of("recipe=sdxl", "data.path=x").lora
    assert LoraSpec(rank=lora.rank, alpha=lora.alpha, targets=lora.targets) == LoraSpec()


@pytest.mark.parametrize(("teacher", "low", "high"), [("embedded", 2, 2), ("sd15", 4, 8), ("sdxl", 3, 8)])
def test_stages_take_the_guidance_of_the_teacher(teacher: str, low: float, high: float) -> None:
    stage = run_of(f"teacher={teacher}").stages["tscd_8"]
    guidance = build_target(stage.method, stage.key).guidance
    assert (guidance.min, guidance.max) == (low, high)


@pytest.mark.parametrize(("recipe", "plans"), [("demo_ablation", ["single_stage"]), ("ablation", ["dmd", "tcd_dmd"])])
def test_the_plans_of_an_ablation_cost_the_same(recipe: str, plans: list[str]) -> None:
    config = run_of(f"recipe={recipe}")
    assert config.seeds == 3 and list(config.plans) == plans
    check_equal_cost(config)
    with pytest.raises(ValueError, match=f"plans.{plans[0]}: takes"):
        check_equal_cost(
            run_of(f"recipe={recipe}", "data.batch_size=16", f"plans.{plans[0]}.{next(iter(config.plans[plans[0]]))}.max_steps=8")
        )


def test_what_an_ablation_accepts_holds_for_each_of_its_runs() -> None:
    runs = [run for _, _, run in runs_of(run_of("recipe=demo_ablation", "run.dir=here", "run.accept_changed=[data.path]"))]
    assert {run.run.dir for run in runs} == {f"here/{plan}_seed{seed}" for plan in ("full", "single_stage") for seed in range(3)}
    assert all(run.run.accept_changed == ("data.path",) for run in runs)


def test_paths_lead_to_files() -> None:
    assert (config_dir() / "train.yaml").is_file()
    assert asset_dir("teacher").parent.name == "assets"


# ---- overrides


def test_one_stage_or_all_stages_can_be_changed() -> None:
    config = run_of("stages.tscd_2.optimizer.lr=1e-3", "stages.tscd_2.max_steps=7", "optimizer.lr=2e-4", "data.batch_size=6")
    rates = [stage.optimizer.lr for stage in config.stages.values()]
    assert rates == [2e-4, 2e-4, 1e-3, 5e-4, 3e-4, 1e-4]  # the recipe gives the last three their own
    assert config.stages["tscd_2"].max_steps == 7
    assert {stage.batch_size for stage in config.stages.values()} == {6}


def test_each_role_of_a_stage_has_its_own_optimizer() -> None:
    added = (
        "recipe=demo_tscd",
        "+stage@stages.score=score",
        "stages.score.max_steps=4",
        "stages.score.optimizers.fake.lr=1e-3",
        "optimizer.lr=2e-4",
    )
    plan = run_of(*added).stages["score"]
    assert (plan.optimizer.lr, plan.optimizers["fake"].lr) == (2e-4, 1e-3)
    with pytest.raises(ValueError, match=r"stages.score.optimizers.fake.lr: got"):
        run_of(*added, "stages.score.optimizers.fake.lr=-1")


def test_an_optimizer_of_an_adapter_that_is_not_there_is_refused() -> None:
    config = run_of("+stages.score.optimizers.fakes.lr=1e-3")
    with pytest.raises(ValueError, match=r"stages\.score\.optimizers: there is no fakes to train; the stage trains student, fake, heads"):
        check_plan(config, inspect_teacher(config.teacher))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.start=812", "eval.start must be a timestep of the samplers' grid, 24, 49, ... 999: got 812; or null for the last"),
        ("eval.start=3", "eval.start must be a timestep of the samplers' grid"),
        ("eval.start=5000", "eval.start must be a timestep of the samplers' grid"),
        ("stages.score.eta=0.3", "stages.score.eta=0.3: adapters are sampled with eval.eta=1.0; set eval.eta alone"),
        ("teacher.dtype=fp16", "teacher.dtype=fp16: gradients of distances this small are zero in float16; train with auto, bf16 or fp32"),
        ("eval.prompts=2", "eval.prompts must be at least 4, for a Fréchet distance, or 0: got 2"),
        ("eval.sweep_prompts=3", "eval.sweep_prompts must be at least 4"),
        ("lora.targets=[to_q,to_kk]", "lora.targets: no layer of the network ends in 'to_kk'; did you mean to_k?"),
    ],
)
def test_what_cannot_be_trained_or_measured_is_refused_before_weights_load(override: str, message: str) -> None:
    config = run_of(override)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_plan(config, inspect_teacher(config.teacher))


def test_a_start_that_no_stage_leaves_to_the_samplers_is_free() -> None:
    config = run_of("eval.start=812", "only=[refl]")
    check_plan(config, inspect_teacher(config.teacher))


@pytest.mark.parametrize("override", ["eval.judge=null", "eval.prompts=0"])
def test_plans_are_not_trained_if_they_could_not_be_compared(override: str) -> None:
    with pytest.raises(ValueError, match=override.replace(".", r"\.")):
        check_plans(run_of("recipe=demo_ablation", override))


@pytest.mark.parametrize(
    ("overrides", "image_size", "notice"),
    [
        ([], 32, None),
        (["only=[tscd_1]"], 32, "only: tscd_1 starts from a fresh adapter"),
        (["only=[refl]", "init=x", "stages.refl.reward_weight=0"], 32, "stages.refl: reward_weight=0 leaves .* nothing will be learnt"),
        (["eval.steps=[1,3]"], 32, "eval.steps: no stage's adapter is made for 3 steps"),
        ([], 512, "rewards: embedded knows scenes of 32 pixels alone, and the teacher draws 512"),
        (["recipe=demo_tscd"], 512, None),
    ],
)
def test_what_was_hardly_meant_is_said(overrides: list[str], image_size: int, notice: str | None) -> None:
    config = run_of(*overrides)
    stages = {name: build_target(plan.method, plan.key) for name, plan in config.selected.items()}
    said = list(notices(config, replace(inspect_teacher(config.teacher), image_size=image_size), stages))
    assert len(said) == (notice is not None) and all(re.search(str(notice), line) for line in said)


def test_a_stage_can_be_dropped_and_added() -> None:
    config = run_of("~stages.tscd_8", "+stage@stages.tscd_5=tscd", "stages.tscd_5.segments=5", "stages.tscd_5.max_steps=3")
    assert tuple(config.stages) == ("tscd_4", "tscd_2", "tscd_1", "refl", "score", "tscd_5")
    assert config.stages["tscd_5"].method["segments"] == 5


def test_only_selects_in_the_order_of_the_plan() -> None:
    assert tuple(run_of("only=[tscd_1,tscd_2]").selected) == ("tscd_2", "tscd_1")
    assert tuple(run_of().selected) == STAGES


def test_guidance_can_be_switched_off() -> None:
    stage = run_of("stages.tscd_2.guidance=null").stages["tscd_2"]
    assert build_target(stage.method, stage.key).guidance is None


def test_recipe_and_groups_are_free_to_combine() -> None:
    config = run_of("recipe=demo", "teacher=sd15", "teacher.path=here", "data=folder", "data.path=there", "eval.judge=null")
    assert (config.teacher.path, config.data.kind, config.data.path, config.eval.judge) == ("here", "folder", "there", None)
    assert config.data.batch_size == 16
    assert run_of("recipe=demo_tscd").data.batch_size == 32  # what the ablations and the longer run have


@pytest.mark.parametrize(("recipe", "size", "at_once"), [("demo", 32, 64), ("sd15", 512, 8), ("sdxl", 1024, 2), ("sdxl", 4096, 1)])
def test_images_sampled_at_once_go_by_their_size(recipe: str, size: int, at_once: int) -> None:
    path = [] if recipe == "demo" else ["teacher.path=here", "data.path=there"]
    assert run_of(f"recipe={recipe}", *path).eval.images_at_once(size) == at_once
    assert run_of(f"recipe={recipe}", *path, "eval.batch_size=3").eval.images_at_once(size) == 3


# ---- mistakes


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seedd=1", ["seedd: unknown key", "did you mean seed?", "teacher", "recipe"]),
        ("recipe=dmo", ["recipe=dmo", "did you mean demo?", *RECIPES]),
        ("teachr=sd15", ["teachr: unknown key", "did you mean teacher?"]),
        ("teacher=sd16", ["teacher=sd16", "did you mean sd15?", "embedded"]),
        ("stages.tscd_8.segmets=4", ["stages.tscd_8.segmets", "did you mean segments?", "solver_steps"]),
        ("stages.tscd_2.optimizer.lrr=1", ["stages.tscd_2.optimizer.lrr", "did you mean lr?", "betas"]),
        ("stages.tscd_3.segments=4", ["stages.tscd_3", *STAGES]),
        ("~stages.tscd_9", ["stages.tscd_9", *STAGES]),
        ("+stage@stages.tscd_16=tscc", ["stage=tscc", "did you mean tscd?"]),
        ("seed.x=1", ["seed.x", "single value"]),
        ("stages.tscd_1.adversarial.weight=1", ["stages.tscd_1.adversarial is null", "'stages.tscd_1.adversarial={weight: ...}'"]),
        ("segmenter.path=x", ["segmenter.path: no segmenter is chosen", "segmenter=NAME"]),
        ("stage.max_steps=5", ["stage.max_steps: stage is a group of files, not a key; did you mean stages?"]),
        ("adapter.rank=4", ["adapter.rank: adapter is a group of files, not a key.", "Allowed:", "lora"]),
        ("stag.max_steps=5", ["stag: unknown key; did you mean stages?"]),
        ("recipe=2", ["recipe=2: expected a name, got a number"]),
        ("adversarial.weight=1", ["adversarial.weight: adversarial is a group of files, not a key.", "stages"]),
        ("seed=1,2", ["seed=1,2", "-m"]),
        ("seed=[1", ["[1"]),
    ],
)
def test_typos_name_the_nearest_and_the_allowed(override: str, says: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        compose("train", [override])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1
    assert [word for word in says if word not in message] == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.tscd_2.max_steps=abc", "stages.tscd_2.max_steps: got 'abc' (str), expected int >= 1"),
        ("stages.tscd_2.max_steps=1e3", "stages.tscd_2.max_steps: got 1000.0 (float), expected int >= 1"),
        ("stages.tscd_2.max_steps=true", "stages.tscd_2.max_steps: got True (bool), expected int >= 1"),
        ("stages.tscd_2.max_steps=0", "stages.tscd_2.max_steps: got 0 (int), expected int >= 1"),
        ("stages.tscd_2.optimizer.lr=-1", "stages.tscd_2.optimizer.lr: got -1 (int), expected float > 0"),
        ("stages.tscd_2.optimizer.lr=nan", "stages.tscd_2.optimizer.lr: got nan (float), expected float > 0"),
        ("optimizer.betas=[0.9]", "stages.tscd_8.optimizer.betas: got [0.9] (list), expected a list of 2, each float >= 0 and < 1"),
        ("optimizer.betas=[0.9,1]", "stages.tscd_8.optimizer.betas[1]: got 1 (int), expected float >= 0 and < 1"),
        ("lora.rank=null", "lora.rank: got null, expected int >= 1"),
        ("lora.targets=to_q", "lora.targets: got 'to_q' (str), expected a list of str"),
        ("resume=always", "resume: got 'always' (str), expected one of never, auto"),
        ("eval.judge=human", "eval.judge: got 'human' (str), expected embedded or null"),
        ("engine.gradient_checkpointing=1", "engine.gradient_checkpointing: got 1 (int), expected bool"),
        ("engine.cpu_threads=many", "engine.cpu_threads: got 'many' (str), expected int >= 1 or null"),
        ("data=folder", "data.path: must be set, expected str"),
        ("+stage@stages.x=tscd", "stages.x.max_steps: must be set, expected int >= 1"),
        ("+teacher.pth=x", "teacher.pth: unknown key; did you mean path? Allowed here: family, path, revision"),
        ("+hello=x", "hello: unknown key"),
        ("stages.tscd_8=3", "stages.tscd_8: got 3 (int), expected the keys of a stage"),
        ("~stages", "stages: there is none"),
        ("only=[]", "only: no stage is left"),
        ("only=[tscd_2,tscd_3]", "only: there is no stage 'tscd_3'"),
        ("run.dir=${nme}", "run.dir: Interpolation key 'nme' not found"),
        ("stages.tscd_8._target_=os.system", "stages.tscd_8._target_: got 'os.system' (str)"),
        ("stages.tscd_8._target_=hyper_sd.../os", "stages.tscd_8._target_: got"),
        ("~stages.tscd_8._target_", "stages.tscd_8._target_: got null"),
    ],
)
def test_wrong_values_name_key_given_and_expected(override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole message is compared
        run_of(override)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"_target_": "hyper_sd.stages.tscd.TSCDD", "segments": 1}, "s._target_: cannot find 'hyper_sd.stages.tscd.TSCDD'"),
        ({"_target_": "hyper_sd.stages.nothing.TSCD", "segments": 1}, "s._target_: cannot find 'hyper_sd.stages.nothing.TSCD'"),
        ({"_target_": "hyper_sd.config.resolved", "cfg": {}}, "s._target_: 'hyper_sd.config.resolved' is not a dataclass"),
        ({"_target_": "hyper_sd.config.importlib.import_module", "name": "os"}, "s._target_: cannot find"),
        ({"_target_": "hyper_sd_evil.X"}, "s._target_: got 'hyper_sd_evil.X' (str)"),
        ({"_target_": "hyper_sd.stages.tscd.TSCD"}, "s.segments: must be set, expected int"),
        ({"_target_": "hyper_sd.stages.tscd.TSCD", "segments": 1, "los": "mse"}, "s.los: unknown key; did you mean loss?"),
        ({"_target_": "hyper_sd.stages.tscd.TSCD", "segments": 1, "loss": "mae"}, "s.loss: got 'mae' (str), expected one of mse, huber"),
        ({"_target_": "hyper_sd.stages.tscd.TSCD", "segments": 1, "guidance": {"min": "x", "max": 2}}, "s.guidance.min: got 'x' (str)"),
        ({"_target_": "hyper_sd.stages.tscd.TSCD", "segments": 1, "guidance": {"min": 1}}, "s.guidance.max: must be set"),
    ],
)
def test_build_target_builds_only_our_dataclasses(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole message is compared
        build_target(mapping, "s")
    assert str(error.value).startswith(message)


def test_structured_keeps_and_converts() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Node:
        rate: float
        sizes: tuple[int, ...] = ()
        by_name: dict[str, float] = dataclasses.field(default_factory=dict)

    node = structured(Node, {"rate": 1, "sizes": [1, 2], "by_name": {"a": 2}})
    assert node == Node(rate=1.0, sizes=(1, 2), by_name={"a": 2.0})
    assert type(node.rate) is float and type(node.by_name["a"]) is float
    with pytest.raises(ValueError, match=r"^n\.by_name\.a: got 'x' \(str\), expected float$"):
        structured(Node, {"rate": 1, "by_name": {"a": "x"}}, "n")
    with pytest.raises(ValueError, match=r"^n: got 3 \(int\), expected a mapping with the keys rate, sizes, by_name$"):
        structured(Node, 3, "n")
