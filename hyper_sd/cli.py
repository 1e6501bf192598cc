"""`entry`: Hydra's command line with clear errors. Imports no torch, so that `--help` and a typo answer at once."""

import argparse
import functools
import itertools
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from hyper_sd.paths import config_dir
from hyper_sd.structured import nearest

FREE_TEXT = ("prompt", "data.path")  # commas and braces in the values of these keys are meant literally
HYDRAS_OWN = ("hydra._internal.", "hydra.experimental.callbacks.", "hydra_plugins.")
TRACEBACK = "HYPER_SD_TRACEBACK"
_REFUSED = (HydraException, OmegaConfBaseException, ValueError)  # a bare ValueError from Hydra: a group that was given a number


def entry(config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make `main(cfg)` a command: `configs/<config_name>.yaml` and the overrides of the command line, composed by Hydra.

    Overrides are checked before Hydra sees them. A ValueError, FloatingPointError or OSError raised by this package is
    printed as one line, exit code 2.
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def job(cfg: DictConfig) -> None:
            try:
                main(cfg)
            except (ValueError, FloatingPointError, OSError) as error:
                if os.environ.get(TRACEBACK) or not _is_ours(error):
                    traceback.print_exc()
                    raise SystemExit(1) from None
                fail(str(error))

        @functools.wraps(main)
        def command() -> None:
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it says, at every start, that torchvision is missing
            args = get_args_parser().parse_args()
            if args.experimental_rerun is not None:
                fail("--experimental-rerun is not supported: it would load a pickle")
            if args.config_path is not None:
                fail("--config-path is not supported: --config-dir adds a directory with your own yaml files")
            overrides = [literal(text) for text in args.overrides]
            name = args.config_name or config_name
            if args.multirun and not _has_launcher(overrides):
                raise SystemExit(multirun(name, args, overrides))
            if args.multirun:
                overrides = submitted(name, args, overrides)
            elif not (args.help or args.hydra_help or args.shell_completion):
                compose(name, overrides, args)
            sys.argv[1:] = _without(sys.argv[1:], args.overrides) + overrides
            hydra.main(config_path=str(config_dir()), config_name=config_name, version_base="1.3")(job)()

        return command

    return decorate


def compose(config_name: str, overrides: Sequence[str], args: argparse.Namespace | None = None) -> DictConfig:
    """The composed configuration; a wrong override ends the program with one message and exit code 2."""
    extra = os.path.abspath(args.config_dir) if args is not None and args.config_dir else None
    search = [f"hydra.searchpath=[file://{extra}]"] if extra else []
    with hydra.initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
        try:
            cfg = hydra.compose(config_name, overrides=[*search, *overrides], return_hydra_config=True)
        except _REFUSED as error:
            fail(_explain(config_name, overrides, search) or _first_lines(error))
        except yaml.YAMLError as error:
            fail(f"a yaml file cannot be read, or asks for more than plain values: {_first_lines(error)}")
    refuse_foreign_code(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def refuse_foreign_code(cfg: DictConfig) -> None:
    """End the program if a yaml file has Hydra call what is not its own, or write files. Our own sections are checked in config.py."""
    if cfg.hydra.run.dir != "." or cfg.hydra.output_subdir is not None:
        fail("hydra.run.dir and hydra.output_subdir cannot be changed: everything is written into run.dir")
    nodes: list[tuple[str, Any]] = [("hydra", OmegaConf.to_container(cfg.hydra, resolve=False))]
    while nodes:
        key, node = nodes.pop()
        if isinstance(node, dict | list):
            nodes += [(f"{key}.{name}", item) for name, item in (node.items() if isinstance(node, dict) else enumerate(node))]
        elif key.rpartition(".")[2] in ("_target_", "()", "class") and not str(node).startswith(HYDRAS_OWN):
            fail(f"{key}: got {node!r}; only what Hydra itself defines may be named there")


def multirun(config_name: str, args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run every combination of the comma-separated values in its own process and run.dir; the exit code is 1 if any failed."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        fail(f"--multirun starts its own processes and cannot run under a launcher with WORLD_SIZE={os.environ['WORLD_SIZE']}")
    if config_name != "train":
        fail("--multirun is for scripts/train.py: only training runs have a run.dir for each job")
    jobs = list(_jobs(overrides))
    configs = [compose(config_name, job, args) for _, job in jobs]
    flags = _without(sys.argv[1:], [*args.overrides, "-m", "--multirun"])
    own_dir = any(text.startswith("run.dir=") for text in overrides)
    failed = []
    for number, ((name, job), cfg) in enumerate(zip(jobs, configs, strict=True), 1):
        parent = str(cfg.run.dir) if own_dir else f"outputs/multirun/{cfg.name}"
        run_dir = f"{parent}/{name}"
        print(f"[{number}/{len(jobs)}] {' '.join(job)} -> {run_dir}", flush=True)
        code, stopped = _run([sys.executable, sys.argv[0], *flags, *job, literal(f"run.dir={run_dir}")])
        if code:
            failed.append(run_dir)
            print(f"[{number}/{len(jobs)}] exit code {code}: {run_dir}", file=sys.stderr, flush=True)
        if stopped:
            print(f"stopped; the same command with resume=auto goes on ({len(jobs) - number} jobs were not started)", flush=True)
            return 1
    print(f"{len(jobs) - len(failed)} of {len(jobs)} jobs finished" + "".join(f"\n  failed: {run_dir}" for run_dir in failed), flush=True)
    return int(bool(failed))


def submitted(config_name: str, args: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """The overrides of a sweep that one of Hydra's launchers runs, each job with a run.dir of its own; all are checked first."""
    parents = [text.removeprefix("run.dir=") for text in overrides if text.startswith("run.dir=")] or ["outputs/multirun/${name}"]
    rest = [text for text in overrides if not text.startswith("run.dir=")]
    for _, job in _jobs(rest):
        compose(config_name, [text for text in job if not text.startswith("hydra")], args)
    return [*rest, f"run.dir='{parents[-1]}/${{hydra:job.num}}'"]


def literal(override: str) -> str:
    """Quote the value of `key=value` if Hydra's grammar does not read it (`{0..9}`, `=`, apostrophes) or if the key holds free text."""
    key, equals, value = override.partition("=")
    if not equals or value[:1] in ("'", '"', "[") or (key not in FREE_TEXT and (value[:1] == "{" or _parses(override))):
        return override
    if key in FREE_TEXT and value in ("null", "???", ""):
        return override
    return f"{key}={_quoted(value)}"


def _has_launcher(overrides: Sequence[str]) -> bool:
    return any(text.startswith("hydra/launcher=") for text in overrides)


def fail(message: str) -> NoReturn:
    """End the program with one clear message."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _run(command: Sequence[str]) -> tuple[int, bool]:
    """The exit code of a command, and whether this process was told to stop. It passes the signal on once and waits: the job saves."""
    process = subprocess.Popen(command, start_new_session=True)  # else Ctrl-C in a terminal would reach the job twice
    stopped = False

    def stop(number: int, _: object) -> None:
        nonlocal stopped
        stopped = True
        process.send_signal(number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        code = process.wait()
        return code, stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _quoted(value: str) -> str:
    # a backslash is an escape only before a quote or at the end of a quoted value
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"'{escaped}'"


def _parses(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _jobs(overrides: Sequence[str]) -> Iterable[tuple[str, list[str]]]:
    """A directory name and the overrides of each job of a sweep."""
    choices = [_choices(text) for text in overrides]
    swept = [index for index, options in enumerate(choices) if len(options) > 1]
    for number, job in enumerate(itertools.product(*choices)):
        name = re.sub(r"[^\w.=,+~@-]", "_", ",".join(job[index] for index in swept)) or "0"
        yield (name if len(name) <= 120 else f"{number}_{name[:110]}"), list(job)


def _choices(override: str) -> list[str]:
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        fail(_first_lines(error))
    if not parsed.is_sweep_override():
        return [override]
    if not parsed.is_discrete_sweep():
        fail(f"{override}: only lists of values and range() can be swept")
    return [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()]


def _explain(config_name: str, overrides: Sequence[str], search: list[str]) -> str | None:
    """What is wrong with the first wrong override: the key or option that does not exist, the nearest match, and what is allowed."""
    loader = GlobalHydra.instance().config_loader()
    options = functools.partial(loader.get_group_options, config_name=config_name, overrides=search)
    parsed: list[Override] = []
    for text in overrides:
        try:
            parsed.append(OverridesParser.create().parse_override(text))
        except HydraException as error:
            return _first_lines(error)
    groups = [group for group in loader.list_groups("") if group not in ("hydra", "accelerate")]
    for override in parsed:
        if override.is_sweep_override():
            return (
                f"{override.input_line}: a list of values separated by commas needs -m (one run for each); "
                f"for one value that contains commas write {override.key_or_group}=\"'...'\""
            )
        if override.key_or_group not in groups or override.is_delete() or _composes(config_name, override, search):
            continue
        if message := _wrong_option(options, override):
            return message
    chosen = [o.input_line for o in parsed if options(o.key_or_group)]
    try:
        cfg = hydra.compose(config_name, overrides=[*search, *(line for line in chosen if line)])
    except HydraException:
        return None
    unchosen = functools.partial(_would_make, cfg, config_name, search, options)
    for override in parsed:
        adds = override.is_add() or override.is_force_add()
        if not adds and not options(override.key_or_group) and (message := _wrong_key(cfg, override.key_or_group, groups, unchosen)):
            return message
    return None


def _composes(config_name: str, override: Override, search: list[str]) -> bool:
    """Whether the override is right by itself: a command may take a name that is no file of the group."""
    try:
        hydra.compose(config_name, overrides=[*search, str(override.input_line)])
    except (*_REFUSED, yaml.YAMLError):
        return False
    return True


def _would_make(cfg: DictConfig, config_name: str, search: list[str], options_of: Callable[[str], list[str]], group: str) -> bool:
    """Whether one of the group's files, of which none is chosen, would make the group's name a key."""
    try:
        return group not in cfg and group in hydra.compose(config_name, overrides=[*search, f"{group}={options_of(group)[0]}"])
    except (*_REFUSED, yaml.YAMLError):
        return False


def _wrong_option(options_of: Callable[[str], list[str]], override: Override) -> str | None:
    options = options_of(override.key_or_group)
    given = str(override.value())
    if isinstance(override.value(), int | float):
        return f"{override.key_or_group}={given}: expected a name, got a number (--help lists the names)"
    if given in options:
        return None
    return f"{override.key_or_group}={given}: there is no such {override.key_or_group}{_suggestion(given, options)}"


def _wrong_key(cfg: DictConfig, key: str, groups: Sequence[str], unchosen: Callable[[str], bool]) -> str | None:
    node: Any = OmegaConf.to_container(cfg, resolve=False)
    walked: list[str] = []
    for part in key.split("."):
        where = ".".join([*walked, part])
        if node is None and walked:
            parent = ".".join(walked)
            return (
                f"{where}: {parent} is null, so it has no {part}; give it whole, e.g. '{parent}={{{part}: ...}}', or choose a file for it"
            )
        if not isinstance(node, dict):
            return f"{where}: unknown key; {'.'.join(walked)} is a single value"
        if not walked and part in groups and unchosen(part):
            return f"{key}: no {part} is chosen; choose one with {part}=NAME (--help lists them), then its keys can be set"
        if part not in node and not walked and part in groups:
            return f"{key}: {part} is a group of files, not a key{_suggestion(part, [*node], similar=0.8)}"
        if part not in node:
            return f"{where}: unknown key{_suggestion(part, [*map(str, node), *(() if '.' in key else groups)])}"
        node = node[part]
        walked.append(part)
    return None


def _suggestion(given: str, allowed: Sequence[str], similar: float = 0.5) -> str:
    match = nearest(given, allowed, similar)
    return (f"; did you mean {match}?" if match else ".") + f" Allowed: {', '.join(dict.fromkeys(allowed))}"


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "hydra.cc/docs" not in line]
    return " ".join(lines[:3])


def _is_ours(error: BaseException) -> bool:
    """Whether the innermost frame of the traceback is in this package; an error of a library keeps its traceback."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    return tb is not None and str(tb.tb_frame.f_globals.get("__name__", "")).startswith("hyper_sd.")


def _without(arguments: Sequence[str], removed: Sequence[str]) -> list[str]:
    return [argument for argument in arguments if argument not in removed]
