"""A run: the stages of the plan one after the other, the adapter handed on from each to the next, then the report."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from hyper_sd.checkpoint import CheckpointError
from hyper_sd.config import RunConfig, StagePlan
from hyper_sd.data import BadSamples, Source, build_source
from hyper_sd.denoiser import Denoiser
from hyper_sd.engine import Engine
from hyper_sd.engines import start_engine
from hyper_sd.evaluate import check_shares, evaluate_run
from hyper_sd.export import export_lora, fixed_inputs, lora_info, save_parts
from hyper_sd.files import replace_file
from hyper_sd.guard import GUARD_DRAW, HeldOutGuard
from hyper_sd.job import BEST, Feed, Job
from hyper_sd.loop import check_checkpoint, fit
from hyper_sd.lora_file import read_lora
from hyper_sd.measure import NUM_GRID, make_draw
from hyper_sd.merge import merge_role
from hyper_sd.objective import Context, Feedback, Stage
from hyper_sd.observe import Recorder
from hyper_sd.plan_checks import check_groups, check_plan, check_work, notices
from hyper_sd.report import table
from hyper_sd.report import write as write_report
from hyper_sd.rewards import Rewards, build_rewards
from hyper_sd.rewards.segmenter import build_segmenter, check_segmenter
from hyper_sd.rewards.tiny_decoder import load_tiny_decoder
from hyper_sd.roles import LoraSpec, Role, Roles
from hyper_sd.run_folder import RunFolder
from hyper_sd.sample import Recipe, own_samples, recipe_to_json, stage_recipe
from hyper_sd.stop import Stop
from hyper_sd.teachers import Teacher, TeacherFacts, base_dtype, inspect_teacher, load_pipeline, load_teacher
from hyper_sd.teachers.base import Clamp
from hyper_sd.watchdog import Watchdog, is_of_a_connection

LORA = "lora.safetensors"
_NEXT_SIGNAL_S = 10.0  # so much later than another process this one may be told to stop


def run_plan(config: RunConfig) -> None:
    """Train every stage that is not finished, export each, evaluate. Everything that can be refused is refused before weights load."""
    engine = start_engine(config.engine)
    with open_run(config, engine) as run:
        if run.train_or_stop() and run.evaluate_or_stop() and engine.is_main:
            run.folder.write_status("finished", engine=engine.facts)
    engine.close()


def train_plan(config: RunConfig, engine: Engine) -> bool:
    """Whether every stage is finished; False if the run was told to stop before, after everything was saved."""
    with open_run(config, engine) as run:
        finished = run.train_or_stop()
        if finished and engine.is_main:
            run.folder.write_status("finished", engine=engine.facts)
        return finished


@contextmanager
def open_run(config: RunConfig, engine: Engine) -> "Iterator[Run]":
    """A checked plan in its directory, which no other run may use meanwhile. What ends it by an error is noted in run.json."""
    facts = inspect_teacher(config.teacher)
    stages = check_plan(config, facts)
    for name, plan in config.selected.items():
        check_work(engine, plan, stages[name])
    check_shares(config.eval, config.judges, engine.world_size)
    instances = any(stage.uses_instances for stage in stages.values())
    source = build_source(config.data, seed=config.seed, image_size=facts.image_size, fingerprint=facts.fingerprint, instances=instances)
    check_groups(config, source)
    if config.segmenter is not None and instances:
        check_segmenter(config.segmenter, source.categories)
    folder = RunFolder(config, facts.fingerprint)
    for name, plan in config.selected.items():
        if not (folder.path / name / LORA).exists():
            check_checkpoint(folder.path / name, plan, stages[name])
    engine.barrier()  # every process has looked at the directory before one writes to it
    if engine.is_main:
        folder.create(config)
    stop = Stop(config.engine.max_seconds, since=engine.started)
    run = Run(config, facts, stages, engine, source, folder, stop)
    try:
        with stop.caught():
            yield run
    except Exception as error:
        if engine.is_main or not isinstance(error, CheckpointError):  # the main process saves, and knows why it could not
            run.note_failure(str(error))
        raise
    finally:
        folder.release()


@dataclass(frozen=True)
class Run:
    """A checked plan with its engine, data and directory, and what may end it early."""

    config: RunConfig
    facts: TeacherFacts
    stages: Mapping[str, Stage]
    engine: Engine
    source: Source
    folder: RunFolder
    stop: Stop

    @cached_property
    def unfinished(self) -> list[str]:
        """The stages that had to be trained when all processes looked first. Raises ValueError if they do not see the same ones."""
        names = [name for name in self.config.selected if not (self.folder.path / name / LORA).exists()]
        if not self.engine.same([torch.full((), float(len(names)), device=self.engine.device)]):
            raise ValueError(f"run.dir={self.folder.path}: the processes find different stages finished; it must be a directory they share")
        return names

    @cached_property
    def spec(self) -> LoraSpec:
        lora = self.config.lora
        return LoraSpec(rank=lora.rank, alpha=lora.alpha, targets=lora.targets)

    @cached_property
    def teacher(self) -> Teacher:
        return load_teacher(self.config.teacher, self.engine.device, base_dtype(self.config.teacher, self.engine.device))

    @cached_property
    def context(self) -> Context:
        """The teacher's network with every adapter that any stage needs."""
        adapters = dict.fromkeys(adapter for stage in self.stages.values() for adapter in stage.adapters)
        if any(plan.guard is not None for plan in self.config.selected.values()):
            adapters[BEST] = None
        encoder_only = {adapter for stage in self.stages.values() for adapter in stage.encoder_only}
        with self.engine.sharding(self.teacher.net):
            roles = Roles(self.teacher.net, self.spec, tuple(adapters), encoder_only=tuple(encoder_only), seed=self.config.seed)
        if self.config.engine.gradient_checkpointing:
            roles.enable_gradient_checkpointing()
        denoiser = Denoiser(self.teacher.forward, roles, self.teacher.schedule, self.teacher.prediction)
        return Context(denoiser, roles, self._feedback)

    @cached_property
    def rewards(self) -> Rewards:
        """The models that stages are trained on, with what guards look at where there are some."""
        guarded = any(self.config.stages[name].guard is not None for name in self.unfinished)
        return build_rewards(self.config.judges if guarded else self.config.rewards, self.engine.device)

    @property
    def _feedback(self) -> Feedback | None:
        """What judges the images of the stages that are still to be trained; None if nothing does."""
        stages = [self.stages[name] for name in self.unfinished]
        rewards = self.rewards.weighted(self.config.rewards) if any(stage.uses_rewards for stage in stages) else {}
        segment = None
        if self.config.segmenter is not None and any(stage.uses_instances for stage in stages):
            segment = build_segmenter(self.config.segmenter, self.source.categories, self.engine.device).loss
        return Feedback(self._decoder(), rewards, self.config.decode.slice, segment) if rewards or segment else None

    def _decoder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Images in [0, 1] of clean latents, for feedback."""
        config, device = self.config.decode, self.engine.device
        if self.config.engine.gradient_checkpointing:
            self.teacher.pipeline.vae.enable_gradient_checkpointing()
        tiny = None if config.tiny is None else load_tiny_decoder(config.tiny, device, key="decode.tiny")

        def images(x0: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bf16"):
                return (self.teacher.decode(x0) if tiny is None else Clamp.apply(tiny.decode(x0))).float()

        return images

    def _guard(self, name: str, plan: StagePlan) -> HeldOutGuard | None:
        if plan.guard is None:
            return None
        weights = {name: reward.weight for name, reward in self.config.rewards.items()}
        draw = make_draw(self.config.eval, GUARD_DRAW, plan.guard.prompts, self.source)
        return HeldOutGuard(plan.guard, self.config.eval, self.rewards, weights, self.teacher, self.sampler(name), draw, self.engine)

    def train_or_stop(self) -> bool:
        """Returns False, with everything saved, if the run was told to stop before the last stage was finished."""
        with Watchdog(self.engine, self.config.engine.timeout_seconds, self.note_failure) as watchdog:
            if self.train(watchdog):
                return True
        self._note_stop("everything is saved")
        return False

    def evaluate_or_stop(self) -> bool:
        """Returns False if a signal ended it; a run that goes on evaluates from the beginning."""
        if self.engine.is_main:
            self.folder.write_status("evaluating", engine=self.engine.facts)
        try:
            with self.stop.at_once():
                self.evaluate()
                return True
        except BaseException as error:  # also what became of this process because another had ended before
            if not self.stop.comes(_NEXT_SIGNAL_S if is_of_a_connection(error) else 0.0):
                raise
        self._note_stop("all stages are trained, but not evaluated")
        return False

    def _note_stop(self, state: str) -> None:
        if self.engine.is_main:
            reason = self.stop.received or "a signal to another process"
            self.folder.write_status("interrupted", stopped_by=reason, engine=self.engine.facts)
            print(f"\nstopped by {reason}; {state}. {self.folder.path / 'run.json'} says what to type to go on", flush=True)

    def note_failure(self, message: str) -> None:
        self.folder.note_failure(message, engine=self.engine.facts)

    def train(self, watchdog: Watchdog) -> bool:
        """Returns False if the run was told to stop before the last stage was finished."""
        handed = Path(self.config.init) if self.config.init is not None else None
        if self.engine.is_main:
            for notice in notices(self.config, self.facts, self.stages):
                print(f"note: {notice}", flush=True)
        self.source.check(self.teacher)
        bad = BadSamples(self.folder.path / "bad_samples.jsonl", self.config.data.max_bad_fraction)
        if self.engine.is_main:
            bad.opened(self.source)
        feed = Feed(self.source, self.teacher, self.config.seed, bad, self._own_samples, self.config.data.prefetch)
        draw = make_draw(self.config.eval, 0, NUM_GRID, self.source)
        recorder = Recorder(self.config, self.engine, self.folder, self.teacher, self.sampler, draw)
        first_step = first_position = 0
        for name, plan in self.config.selected.items():
            folder = self.folder.path / name
            if name in self.unfinished:
                self._start_from(handed, self.stages[name])
                job = Job(self.stages[name], plan, self.context, feed, folder, first_step, first_position, self._guard(name, plan))
                if not fit(job, self.engine, self.stop, recorder, watchdog):
                    return False
                self._export(name)
                self.engine.barrier()
            handed = folder / LORA
            first_step += plan.max_steps
            first_position += plan.max_steps * plan.batch_size
        recorder.close()
        assert handed is not None
        if self.engine.is_main:
            replace_file(self.folder.path / LORA, handed.read_bytes())
        return True

    def _own_samples(self, prompts: Sequence[str], positions: Sequence[int]) -> torch.Tensor:
        """The undistilled teacher's latents of the prompts: a function of (seed, positions)."""
        with self.context.roles.use(()):
            return own_samples(self.teacher, self.config.teacher, prompts, positions, self.config.data.teacher_steps, self.config.seed)

    def _start_from(self, handed: Path | None, stage: Stage) -> None:
        roles = self.context.roles
        roles.attach({name: build(self.teacher.net, self.config.seed) for name, build in stage.modules.items()})
        for adapter in stage.fresh:
            roles.reset(adapter)
        if handed is None:
            return  # so are all the others
        names = [path for path, _ in self.teacher.net.named_modules()]
        file = read_lora(handed, names, spec=self.spec, fingerprint=self.facts.fingerprint)
        for adapter in set(stage.adapters) - set(stage.fresh):
            roles.load_state_dict(adapter, file.tensors)

    def _export(self, name: str) -> None:
        """The stage's LoRA file. Of a sum of adapters it is the merged one, at the run's rank, and the parts lie beside it."""
        stage, plan, roles = self.stages[name], self.config.stages[name], self.context.roles
        extra = {"ss_steps": str(plan.max_steps), "ss_learning_rate": str(plan.optimizer.lr), "ss_seed": str(self.config.seed)}
        info = lora_info(self.facts, stage=name, recipe=recipe_to_json(self.sampler(name)), extra=extra)
        merged, *others = stage.exports
        if others:
            if self.engine.is_main:
                save_parts(self.folder.path / name, roles, stage.exports, info)
            error = merge_role(roles, stage.exports)
            if self.engine.is_main:
                print(f"{name}: {' + '.join(stage.exports)} merged at rank {self.spec.rank}, relative error {error:.1e}", flush=True)
        if not self.engine.is_main:
            if self.engine.collective_forward:
                self._answer_export(name)
            return
        error = export_lora(
            self.folder.path / name / LORA,
            roles.state_dict(merged),
            self.spec,
            info,
            pipeline=load_pipeline(self.config.teacher),
            trained=self._network(stage.exports),
            untrained=self._network(()) if self._in_half_precision else None,
        )
        print(f"{name}: exported and checked in a stock pipeline, relative error {error:.1e}", flush=True)

    def _answer_export(self, name: str) -> None:
        """The calls of the training network that the main process makes while it checks its file."""
        inputs = fixed_inputs(self.teacher.net, self.facts.schedule.num_steps)
        for role in (self.stages[name].exports, *([()] if self._in_half_precision else [])):
            self._network(role)(*inputs)

    @property
    def _in_half_precision(self) -> bool:
        return self.teacher.dtype != torch.float32

    def _network(self, role: Role) -> Callable[..., torch.Tensor]:
        """The training network under a role, called with and answering on the CPU."""
        teacher = self.teacher

        def forward(x_t: torch.Tensor, t: torch.Tensor, cond: tuple[torch.Tensor, ...]) -> torch.Tensor:
            with self.context.roles.use(role):
                moved = tuple(part.to(teacher.device) for part in cond)
                return teacher.forward(x_t.to(teacher.device), t.to(teacher.device), moved).cpu()

        return forward

    def sampler(self, name: str) -> Recipe:
        """How the adapter of a stage is sampled."""
        stage, cfg = self.stages[name], self.config.eval
        return stage_recipe(
            self.teacher.pipeline.scheduler.config,
            stage.step_counts,
            solver_steps=stage.solver_steps,
            eta=0.0 if stage.segments > 1 else cfg.eta,
            start=cfg.start if stage.start is None else stage.start,
            guidance=cfg.student_guidance,
        )

    def evaluate(self) -> None:
        """Measure the run's files, every process its share, and write the report."""
        reported = self.engine.any((self.folder.path / "report.json").is_file())
        if self.config.eval.prompts == 0 or (reported and not self.unfinished):
            return
        evaluation = evaluate_run(self.config, self.engine, self.source)
        peak_rss = self.engine.mean(torch.tensor(float(self.folder.peak_rss_bytes))) * self.engine.world_size
        if self.engine.is_main:
            facts = {
                "engine": self.engine.facts,
                "resumed_from": self.folder.resumed_from,
                "wall_s": round(self.folder.wall_s, 1),
                "peak_rss_bytes": int(peak_rss),
            }
            report = write_report(self.folder.path, evaluation.to_json(), evaluation.grids(), facts)
            print(table(report), flush=True)
