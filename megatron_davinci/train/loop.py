"""The training run: start or resume, take steps, evaluate, save, until the curriculum ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_davinci.config import Layout, RunConfig, check_layout
from megatron_davinci.data.batches import Batches
from megatron_davinci.data.source import Source
from megatron_davinci.data.transforms import stage_transforms
from megatron_davinci.errors import DavinciError
from megatron_davinci.model.build import DTYPES, build_model
from megatron_davinci.optim.build import build_optimizer, set_hyperparameters
from megatron_davinci.optim.schedule import Schedule, StepPlan
from megatron_davinci.platform import distributed
from megatron_davinci.platform.deterministic import be_deterministic
from megatron_davinci.platform.device import Platform
from megatron_davinci.platform.peak import measure_matmul_peak
from megatron_davinci.platform.stopwatch import stopwatch
from megatron_davinci.train import boundary, checkpoint
from megatron_davinci.train.agreement import check_agreement
from megatron_davinci.train.background_export import BackgroundExport
from megatron_davinci.train.checkpoint_files import Checkpoint
from megatron_davinci.train.controller import Controller
from megatron_davinci.train.documents import document_masks, uses_documents
from megatron_davinci.train.export_check import check_export
from megatron_davinci.train.feed import Feed, Samples
from megatron_davinci.train.health import Health, RollBack
from megatron_davinci.train.health_records import turned_back
from megatron_davinci.train.integrity import Integrity
from megatron_davinci.train.introduction import introduction
from megatron_davinci.train.last_words import LAST_WORDS
from megatron_davinci.train.left import ended_unevaluated, ends_stage, last_taken, steps_left
from megatron_davinci.train.order import DataOrder, verified_sources
from megatron_davinci.train.outlook import widened
from megatron_davinci.train.phases import PhaseTimers
from megatron_davinci.train.position import facts_of, position, start_of
from megatron_davinci.train.profile import StepProfiler, check_profile
from megatron_davinci.train.progress import RunProgress, Timer, format_seconds
from megatron_davinci.train.records import Records
from megatron_davinci.train.run_directory import RunDirectory
from megatron_davinci.train.run_lock import one_trainer
from megatron_davinci.train.saver import told
from megatron_davinci.train.saves import saver_of
from megatron_davinci.train.seams import Evaluator
from megatron_davinci.train.signals import WATCH
from megatron_davinci.train.snapshots import Snapshots
from megatron_davinci.train.source_losses import source_records
from megatron_davinci.train.step import Stepper, StepResult, wrap_model
from megatron_davinci.train.watchdog import Watchdog

EvaluatorFactory = Callable[[RunConfig], Evaluator | None]


class TrainingRun:
    """One run on this rank, after the process groups are up.

    Args:
        config: The run configuration.
        platform: What to compute on.
        evaluator: Measures held-out loss; None for none.
    """

    def __init__(self, config: RunConfig, platform: Platform, evaluator: Evaluator | None = None) -> None:
        self.config, self.platform, self.evaluator = config, platform, evaluator
        self.layout: Layout = check_layout(config, dist.get_world_size())
        self.schedule = Schedule(config.curriculum, config.data.sequence_length)
        check_profile(config.profile, self.layout.world, self.schedule.total_steps)
        check_export(config)
        self.directory = RunDirectory(config.run.directory)
        self.is_main = dist.get_rank() == 0
        self.sources: dict[str, Source] = verified_sources(config)
        self.order = DataOrder(config, self.schedule, self.sources, self.directory)
        self.document_masks = document_masks(wide := widened(config, self.order.records), self.sources)
        self.transforms = stage_transforms(wide, self.sources)
        self.controller = Controller(config, self.order, self.directory)
        self.chunks = build_model(config, platform)
        self.snapshots = Snapshots(config, self.layout, self.directory, platform)
        found, self.passed_over = self.snapshots.newest(self.order, turned_back(self.order.journal))
        self.begins_with: Checkpoint | None = None
        if found is None and (given := config.checkpoint.initial_weights) is not None:
            # Before the optimizer copies them.
            model = config.model.model_dump(mode="json")
            self.begins_with = checkpoint.load_weights(given, self.chunks, model)
        wrapped = wrap_model(self.chunks, config)
        self.optimizer = build_optimizer(config, wrapped)
        self.timers = PhaseTimers(stopwatch(platform) if config.logging.phases else None)
        self.stepper = Stepper(wrapped, self.optimizer, config, platform, self.timers)
        self.health = Health(config, self.order, self.directory, self.stepper)
        self.integrity = Integrity(config, self.stepper, platform)
        self.watchdog = Watchdog(
            self.directory.path, config.health.hang, dist.get_rank(), self.layout.world, self.timers
        )
        self.profiler = StepProfiler(
            config.profile, self.directory.path / "profile", dist.get_rank(), platform, self.timers
        )
        self.exports = BackgroundExport(config, self.directory, self.last_step, is_main=self.is_main)
        self.saver = saver_of(config, self.directory, found, self.exports)
        self.consumed_samples = 0
        self.step = 0
        if found is not None:
            self._resume(found)

    def train(self, progress: RunProgress | None = None) -> int:
        """Take every step that is left.

        Returns:
            Steps taken since the run's beginning.

        Raises:
            DavinciError: Training is in trouble, a checkpoint could not be written, or the run was asked to end.
        """
        mode = self.config.logging.progress if self.is_main else "none"
        progress = progress or RunProgress(
            self.schedule,
            mode,
            self.config.logging.every_steps,
            domains={name: self.config.data.domain(name) for name in self.sources},
        )
        # Measured before every start, so that utilization is against this machine as it is now.
        peak = measure_matmul_peak(self.platform, DTYPES[self.config.train.precision])
        self.order.seal()
        start = distributed.on_rank_zero(self._record_start)
        LAST_WORDS.begin(self.directory.path, start)
        self.watchdog.begin()
        records = self._records(peak)
        feed = Feed(
            Batches(self.order.curriculum, self.sources),
            self.config.data.loader,
            self.config.train.micro_batch_size,
            self.platform,
            every_stage_reads=uses_documents(self.config),
            transforms=self.transforms,
            digests=self.config.logging.token_digest,
        )
        self.snapshots.prepare(self.stepper.wrapped, self.optimizer)
        self.exports.begin(self.step)
        said = introduction(
            self.config,
            self.platform,
            self.layout,
            self.order,
            (self.step, self.consumed_samples, self.last_step),
            self.begins_with,
            self.passed_over,
        )
        for message in (*self.snapshots.told(), *said):
            progress.message(message)
        try:
            with self.snapshots, self.exports, progress:
                self._decide_again(progress)
                while True:
                    self.health.begin()
                    try:
                        self._steps(feed, progress, records)
                        break
                    except RollBack as back:
                        records.close()
                        self._turn_back(back, feed, progress)
                        records = self._records(peak)
        finally:
            parts: tuple[Any, ...] = (self.saver, records, feed, self.profiler, self.watchdog)
            with ExitStack() as closing:  # the last one first, and each whatever befalls another
                for part in parts:
                    closing.callback(part.close)
        return self.step

    def _records(self, peak: float) -> Records:
        """Where the steps from here on are written."""
        return Records(
            self.directory,
            self.config,
            self.platform,
            peak=peak * self.layout.world,
            first_step=self.step + 1,
            timers=self.timers,
        )

    def _turn_back(self, back: RollBack, feed: Feed, progress: RunProgress) -> None:
        """Go on from the newest good checkpoint at or before a sample, as another start would."""
        self.watchdog.beat("going back", self.step)
        for message in self.health.messages():
            progress.message(message)
        feed.discard()
        self.saver.finish()
        self.snapshots.settle()
        found, passed_over = checkpoint.find(self.directory.checkpoints, turned_back(self.order.journal))
        if found is None:
            raise back.without_checkpoint()
        checkpoint.load(found, self.chunks, self.optimizer)
        self.step, self.consumed_samples, self.saver.newest = found.step, found.consumed_samples, found.folder
        if self.is_main:
            self.directory.truncate_after(self.step)
        for problem in passed_over:
            progress.message(f"A checkpoint was passed over. {problem}")
        progress.message(f"Going back to step {self.step} ({found.folder}).")

    @property
    def last_step(self) -> int:
        """The step after which this start ends."""
        stop = self.config.train.stop_after_steps
        return min(self.schedule.total_steps, stop) if stop else self.schedule.total_steps

    def save(self) -> None:
        """Save a checkpoint of the present step. It is on the disk when `saver.finish` has returned."""
        self.stepper.gather_weights()
        self.saver.save(self.chunks, self.optimizer, self._position())

    def _position(self) -> dict[str, Any]:
        return position(self.config, self.layout, self.order, self.step, self.consumed_samples)

    def _steps(self, feed: Feed, progress: RunProgress, records: Records) -> None:
        schedule, journal, ahead = self.schedule, self.order.journal, deque[StepPlan]()
        plans = steps_left(schedule, journal, self.step, self.consumed_samples, self.last_step)

        def read_ahead(steps: Iterable[StepPlan]) -> None:
            for plan in steps:
                self.order.prepare(plan)
                feed.request(plan.first_sample, plan.batch)

        def request(count: int) -> None:
            steps = list(islice(plans, count))
            read_ahead(steps)
            ahead.extend(steps)

        request(self.config.data.loader.prefetch_steps)
        timer = Timer()
        self.timers.begin()
        WATCH.begin(self.config.health.grace_seconds)
        self._evaluate_late(progress, records)  # what a start before this one has left undone
        while ahead:
            self.watchdog.beat("step", ahead[0].step)
            agreed = boundary.meet(self.order.edited())
            if agreed.signal:
                self.watchdog.beat("checkpoint", self.step)
                records.flush()
                where = self._save_once()
                raise boundary.stopped(agreed, self.step, self.consumed_samples, where)
            if self.order.revise(ahead[0], feed.discard, edited=agreed.edited):
                read_ahead(ahead)
            plan = ahead.popleft()
            self.order.commit(plan)
            news = (*self.order.messages(), *self.snapshots.told(), *self._saves_told(), *records.told())
            for message in news:
                progress.message(message)
            self.profiler.before(plan.step)
            with self.timers.phase("data"):
                samples = feed.take(plan.first_sample, plan.batch, plan.stage)
                request(1)
            self.integrity.before(plan)
            numbers = feed.numbers(plan.first_sample, plan.batch)
            result = self.health.take(
                plan,
                samples,
                numbers,
                partial(self._step, plan, samples, numbers, feed.micro_batches(plan.batch)),
            )
            for message in self.health.messages():
                progress.message(message)
            if result is None:  # the clock runs through it, as it does when the journal is replayed
                self.profiler.after(plan.step)
                timer.lap()
                self.timers.begin()
                self._evaluate_late(progress, records)
                continue
            self.step, self.consumed_samples = plan.step, plan.first_sample + plan.batch
            self.snapshots.settle()
            seconds = timer.lap()
            self.timers.end_step()
            sources = source_records(
                self.order.curriculum,
                plan.first_sample,
                plan.batch,
                self.config.data.sequence_length,
                result.sources,
            )
            progress.step(records.step(plan, result, seconds, sources, samples.tokens_cut, samples.digest))
            if (trace := self.profiler.after(plan.step)) is not None:
                progress.message(f"Profiled: {trace}")
                timer.lap()
                self.timers.begin()
            self.integrity.after(plan)
            if self._is_due(plan, self.config.evaluate_every_steps(plan.stage)) or ends_stage(
                schedule, journal, plan
            ):
                self._evaluate(plan, progress, records)
                timer.lap()
            if self.snapshots.is_due(plan.step):
                self.watchdog.beat("checkpoint", plan.step)
                records.flush()
                with self.timers.phase("checkpoint"):
                    self.snapshots.take(self._position())
                timer.lap()
            if self._is_due(plan, self.config.checkpoint.every_steps) or not ahead:
                self.watchdog.beat("checkpoint", plan.step)
                records.flush()
                with self.timers.phase("checkpoint"):
                    self.save()
                timer.lap()
        records.flush()
        try:
            self._save_once()  # where the last steps were not applied, it was not due
            self.exports.ends(self.step)
        finally:
            for message in (*self._saves_told(), *records.told()):
                progress.message(message)
        WATCH.end()

    def _save_once(self) -> Path | None:
        """Have the present step on the disk, and say where; None before the first step: nothing is to be saved."""
        if self.step and not self.saver.has(self.step):
            self.save()
        self.saver.finish()
        return self.saver.newest

    def _saves_told(self) -> list[str]:
        saved = [told(outcome, self.config.checkpoint) for outcome in self.saver.news()]
        return [*saved, *self.exports.told()]

    def _step(self, plan: StepPlan, samples: Samples, numbers: np.ndarray, micro_batches: int) -> StepResult:
        if self.config.model.dropout:
            # Dropout too is a function of the clock, so no generator state needs saving.
            distributed.seed_ranks(self.config.run.seed + plan.first_sample)
        low, left = self.stepper.low_precision, self.schedule.total_samples - plan.first_sample
        watch = low is not None and low.begin_step(plan.step, left * self.config.data.sequence_length)
        set_hyperparameters(
            self.optimizer,
            learning_rate=plan.learning_rate,
            weight_decay=self.config.weight_decay(plan.stage),
        )
        return self.stepper.train(
            samples.tokens,
            micro_batches,
            samples.loss_mask,
            self.document_masks[plan.stage],
            samples.source,
            len(self.sources),
            numbers,
            watch=watch,
            sharpness=self._is_due(plan, self.config.logging.sharpness_every_steps),
        )

    def _is_due(self, plan: StepPlan, every: int | None) -> bool:
        return every is not None and plan.step % every == 0

    def _evaluate(self, plan: StepPlan, progress: RunProgress, records: Records) -> None:
        self.watchdog.beat("evaluation", plan.step)
        records.flush()
        if self.evaluator is None:
            return
        timer = Timer()
        with self.timers.phase("evaluation"):
            heldout = self.evaluator.evaluate(self.stepper.loss)
            tasks = self.evaluator.ask(self.chunks)
        records.evaluation(plan, heldout, tasks, timer.lap())
        progress.heldout(plan.step, heldout.loss)
        if said := self.controller.after_evaluation(plan):
            progress.message(said)

    def _evaluate_late(self, progress: RunProgress, records: Records) -> None:
        records.flush()
        past = self.order.journal, self.consumed_samples, self.directory.evaluations
        if plan := distributed.on_rank_zero(lambda: ended_unevaluated(self.schedule, *past)):
            self._evaluate(plan, progress, records)

    def _decide_again(self, progress: RunProgress) -> None:
        """What the evaluation at the checkpoint decided, in case it never reached the journal."""
        plan = last_taken(self.schedule, self.consumed_samples)
        due = plan is not None and self._is_due(plan, self.config.evaluate_every_steps(plan.stage))
        if plan and due and (said := self.controller.after_evaluation(plan)):
            progress.message(said)

    def _resume(self, found: Checkpoint) -> None:
        model, sharded = self.config.model.model_dump(mode="json"), self.config.parallel.distributed_optimizer
        checkpoint.check_same_model(found, model, sharded, self.config.optimizer.kind)
        checkpoint.check_same_recipe(found, self.config.train.low_precision.description)
        if found.consumed_samples < self.schedule.total_samples:
            try:
                expected = self.schedule.at(found.consumed_samples).step - 1
            except ValueError:
                expected = -1
            if expected != found.step:
                raise DavinciError(
                    "The curriculum that the checkpoint was trained with had other batches or stages.",
                    where=found.folder,
                    found=f"step {found.step} at {found.consumed_samples} samples",
                    expected="a step boundary of this configuration's schedule with the same number",
                    do="leave the stages that are over as they were; only what lies ahead may change",
                )
        self.order.check_extends(found.manifest.get("journal"), found.folder)
        if not self.snapshots.load(found, self.stepper.wrapped, self.optimizer):
            checkpoint.load(found, self.chunks, self.optimizer)
        self.step, self.consumed_samples = found.step, found.consumed_samples

    def _record_start(self) -> int:
        """Write what this start is, and take away what an earlier one has left; returns the start's number."""
        number = self.directory.record_start(
            self.config,
            facts_of(self.config, self.sources),
            start_of(self.config, self.layout, self.platform, self.step),
        )
        self.directory.truncate_after(self.step)
        self.watchdog.clear()
        return number


def run(config: RunConfig, platform: Platform, make_evaluator: EvaluatorFactory) -> int:
    """Start or resume a run on this rank, from process groups to the last checkpoint.

    Args:
        config: The run configuration.
        platform: What to compute on.
        make_evaluator: Builds the in-loop evaluator once the groups are up.

    Returns:
        Steps taken since the run's beginning.
    """
    if config.train.deterministic:
        be_deterministic()
    distributed.start(
        platform,
        **config.parallel.groups,
        timeout_seconds=config.parallel.timeout_seconds,
        seed=config.run.seed,
        joined=lambda: check_agreement(config),
    )
    if config.train.cuda_graphs and platform.device.type == "cuda":  # others refuse it, with words
        distributed.seed_ranks(config.run.seed, cuda_graphs=True)
    timer = Timer()
    with one_trainer(config.run.directory):
        training = TrainingRun(config, platform, make_evaluator(config))
        taken = training.train()
        say = print if training.is_main and config.logging.progress != "none" else (lambda line: None)
        say(f"Done: step {taken} after {format_seconds(timer.lap())}. Results in {config.run.directory}")
        # Only after success: taking NCCL's groups down can wait for ranks that are still in a collective, and the
        # rank that failed has something to say first.
        distributed.stop()
        training.exports.finish(say)
    return taken
