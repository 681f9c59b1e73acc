"""A training run from its flags to its last checkpoint."""

import contextlib
import functools
import os
import signal

from accelerate import Accelerator
from accelerate.utils import gather_object

from openclip_ext import upstream
from openclip_ext.data.listing import ShardListing
from openclip_ext.errors import counted
from openclip_ext.evaluation.during_training import Evaluator
from openclip_ext.files import keep_rows
from openclip_ext.losses import ObjectivePlan
from openclip_ext.state.recent_pairs import describe_recent
from openclip_ext.state.table import describe_parts
from openclip_ext.training.accelerator import choose_precision, make_accelerator
from openclip_ext.training.build import build_trainer, seed_all
from openclip_ext.training.checkpoint import Checkpoint
from openclip_ext.training.config import RunConfig
from openclip_ext.training.data import TrainingData, require_sizes, training_data
from openclip_ext.training.evaluator import evaluate, evaluate_only, make_evaluator
from openclip_ext.training.folder import choose_name, entries, make_run_folder, remove_new_entries, run_folder
from openclip_ext.training.fusion import Fusion, read_fusion
from openclip_ext.training.keep import Keeper, require_metric
from openclip_ext.training.learning_rates import describe
from openclip_ext.training.log import EpochLog, RowFiles, logger, report_skips, start_logging, stop_logging
from openclip_ext.training.loop import Trainer
from openclip_ext.training.objective import plan_objective
from openclip_ext.training.profile import StepProfile
from openclip_ext.training.record import Record
from openclip_ext.training.resume import find_resumed, new_record
from openclip_ext.training.stopping import GO_ON, Stop
from openclip_ext.training.stopping import describe as describe_stop
from openclip_ext.training.tracking import Tracking
from openclip_ext.training.warm_start import warm_start_pass
from openclip_ext.training.watch import awaited, watched

METRICS, RESULTS, SKIPPED = "metrics.jsonl", os.path.join("checkpoints", "results.jsonl"), "skipped.jsonl"


def train(config: RunConfig) -> dict[str, float]:
    """Run what the flags say; returns the metrics of the last evaluation.

    Raises:
        UserError: see each flag. Nothing has been written then, unless it came up during training.
        KeyboardInterrupt: SIGINT ended it, after a checkpoint was kept.
    """
    require_metric(config)
    fusion = read_fusion(config) if config.fusion else None
    if fusion:
        config = config.decided(**fusion.flags)
    plan = plan_objective(config)
    data = training_data(config, plan, fusion.table if fusion else None)
    if config.model_config:
        upstream.register_model_config(config.model_config)
    config = config.decided(precision=choose_precision(config))
    with awaited(config.rank_timeout):
        accelerator = make_accelerator(config)
    with watched(accelerator.process_index, accelerator.num_processes, config.rank_timeout):
        metrics, stop_reason = _train(config, plan, data, accelerator, fusion)
    if stop_reason == signal.SIGINT:
        raise KeyboardInterrupt
    return metrics


def _train(
    config: RunConfig,
    plan: ObjectivePlan,
    data: TrainingData | None,
    accelerator: Accelerator,
    fusion: Fusion | None = None,
) -> tuple[dict[str, float], int]:
    """The same, once processes know of each other; beside the metrics why the run has stopped, or `GO_ON`."""
    stop = Stop(config.max_minutes)
    config = config.decided(name=choose_name(config, accelerator))
    folder = run_folder(config, accelerator)
    resumed = find_resumed(config, folder, accelerator)
    if resumed and data is not None:
        resumed = resumed.with_loss(config)
    if resumed and fusion:
        fusion.require_same(resumed.checkpoint.content, f"--resume {config.resume}")
    if config.check_shards and data and isinstance(data.source, ShardListing):
        require_sizes(data.source, accelerator.is_main_process)
    seed_all(config.seed)
    model, train_transform, eval_transform, tokenizer = upstream.create_model(
        config.flags, accelerator.device, logit_bias="logit_bias" in plan.needs
    )
    # Into the record: a checkpoint does not know its tag's, and no flag tells how many processes there are.
    config = config.decided(**upstream.preprocessing(model), world_size=accelerator.num_processes)
    evaluator = make_evaluator(config, accelerator, tokenizer, eval_transform)
    checkpoint = resumed.checkpoint if resumed else None
    if data is None:
        return evaluate_only(config, accelerator, model, evaluator, checkpoint), GO_ON
    trainer, remarks = build_trainer(
        config, accelerator, plan, data, model, train_transform, tokenizer, checkpoint, fusion
    )
    new_memory = not (resumed and resumed.has_loss_state)
    record = new_record(config, resumed, trainer.clock.step, remarks)
    remarks += [*(resumed.remarks if resumed else ()), *(fusion.remarks if fusion else ())]
    best = checkpoint.content.get("best") if checkpoint else None
    keeper = Keeper(config, trainer, folder, best, fusion.notes if fusion else {}) if folder else None
    if checkpoint:
        checkpoint.content.clear()  # it is as large as the model and its optimizer
    elif config.resume:
        remarks.append(f"--resume {config.resume}: no checkpoint of this run yet: it starts from the beginning")
    with stop, _Run(config, trainer, folder, record) as run, StepProfile(run.folder, config.profile) as run.profile:
        trainer.stop = stop
        run.say_start(data, checkpoint, remarks)
        if config.warm_start_pass and new_memory and trainer.clock.epoch < config.epochs:
            run.warm_start()
        metrics = run.epochs(evaluator, keeper)
    return metrics, trainer.stop_reason


class _Run:
    """A run with its folder, logs, trackers and remote copy open."""

    def __init__(self, config: RunConfig, trainer: Trainer, folder: str | None, record: Record) -> None:
        self.record = record
        self.config, self.trainer, self.accelerator = config, trainer, trainer.accelerator
        self.clock, self.main = trainer.clock, self.accelerator.is_main_process
        self.run_folder = folder
        self.folder = folder if self.main else None  # where this rank writes
        self.profile = StepProfile(None, 0)
        self._finish_sync, self._began = None, False
        self._before: set[str] | None = None
        self._tracking: Tracking | None = None
        self._files = RowFiles(self.folder) if self.folder else None
        if self._files:
            trainer.faults.write = functools.partial(self._files.append, SKIPPED)

    def __enter__(self) -> "_Run":
        try:
            self._open()
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def _open(self) -> None:
        config = self.config
        if self.folder:
            self._before = entries(self.folder)
            make_run_folder(config, self.folder, self.record)
            self._drop_rows_to_come()
        start_logging(self._log_path(), console=self.main, debug=config.debug)
        if self.folder and config.remote_sync:
            assert config.name is not None  # where there is a folder
            remote = os.path.join(config.remote_sync, config.name)
            self._finish_sync = upstream.start_remote_sync(
                self.folder, remote, config.remote_sync_protocol, config.remote_sync_frequency
            )
        if config.report_to and self.folder:
            self._tracking = Tracking(config, self.accelerator, self.folder, self.clock.step)

    def __exit__(self, kind, *exception) -> None:
        if self._finish_sync:
            self._finish_sync()
        if self._tracking:
            self._tracking.close()
        stop_logging()
        if kind is not None and self.folder and not self._began:  # else it would block the corrected command
            remove_new_entries(self.folder, self._before)
        if kind is None:  # ends trackers and the process group; after an error other ranks may not come here
            self.accelerator.end_training()

    def _drop_rows_to_come(self) -> None:
        """Of a run that went on from here before: so each step has one row."""

        def before(row: dict) -> bool:
            done = row.get("epoch", 0) <= self.clock.epoch  # of evaluations, completed epochs
            return row["step"] < self.clock.step if "kind" not in row and "step" in row else done

        assert self.folder is not None
        for name in (METRICS, RESULTS, SKIPPED):
            keep_rows(os.path.join(self.folder, name), before)

    def _log_path(self) -> str | None:
        """One file for the run, or with `--log-local` one per machine."""
        if not self.run_folder:
            return None
        if self.config.log_local and self.accelerator.is_local_main_process:
            os.makedirs(self.run_folder, exist_ok=True)
            return os.path.join(self.run_folder, f"out-{self.accelerator.process_index}.log")
        return os.path.join(self.run_folder, "out.log") if self.main else None

    def say_start(self, data: TrainingData, checkpoint: Checkpoint | None, remarks: list[str]) -> None:
        config, trainer = self.config, self.trainer
        millions = sum(p.numel() for p in trainer.module.parameters()) / 1e6
        processes = counted(self.accelerator.num_processes, "process")
        logger.info("%s, %.1f M parameters; %s on %s, precision %s",
                    config.model, millions, processes, self.accelerator.device.type, config.precision)  # fmt: skip
        if trainer.adapters is not None:
            logger.info(trainer.adapters.describe())
        if levels := describe(trainer.optimizer):
            logger.info(levels)
        if self.accelerator.is_fsdp2:
            logger.info("parameters, gradients and the optimizer's state are sharded (FSDP)")
        logger.info("loss %s over %s; %s of %s per epoch, %s",
                    config.loss, counted(data.size, "sample"), counted(self.clock.steps_per_epoch, "step"),
                    counted(self._pairs_per_step, "pair"), counted(config.epochs, "epoch"))  # fmt: skip
        if spread := describe_parts(trainer.loss):
            logger.info(spread)
        if checkpoint:
            within = f" and {counted(self.clock.index, 'step')}" if self.clock.index else ""
            logger.info("resumed from %s after epoch %d%s", checkpoint.path, checkpoint.epoch, within)
        for remark in remarks:
            logger.warning(remark)

    @property
    def _pairs_per_step(self) -> int:
        return self.config.batch_size * self.config.accum_freq * self.accelerator.num_processes

    def warm_start(self) -> None:
        """`--warm-start-pass`; a loss that keeps nothing between steps is left as it is."""
        if not self.trainer.loss.wants_warm_start:
            logger.warning("--warm-start-pass: loss %s keeps no memory of samples: there is nothing to fill",
                           self.config.loss)  # fmt: skip
            return
        self._report_skips(warm_start_pass(self.trainer, epoch=self.config.epochs), "warm start")
        logger.info("warm start: loss %s has seen one epoch of the data", self.config.loss)

    def _report_skips(self, skipped: list[tuple[str, str, int]], when: str) -> None:
        report_skips(gather_object(skipped) if self.accelerator.num_processes > 1 else skipped, when)

    def epochs(self, evaluator: Evaluator, keeper: Keeper | None) -> dict[str, float]:
        """Train to the last epoch, or until it is to stop; the metrics of the last evaluation."""
        metrics: dict[str, float] = {}
        clock = self.clock
        if clock.epoch >= self.config.epochs:
            logger.warning("nothing to train: the checkpoint has %s and --epochs is %d",
                           counted(clock.epoch, "epoch"), self.config.epochs)  # fmt: skip
        while clock.epoch < self.config.epochs:
            if self._steps(keeper):
                self._say_stop(keeper)
                break
            done, last = clock.epoch + 1, clock.epoch + 1 == self.config.epochs
            measured = self._evaluate(evaluator, done, last) if evaluator.due(done, last) else {}
            metrics = measured or metrics
            clock.end_epoch()
            if keeper:
                keeper.keep(done, last, measured)
            self.accelerator.wait_for_everyone()
        return metrics

    def _say_stop(self, keeper: Keeper | None) -> None:
        """Keep a checkpoint and say how to go on."""
        if keeper:
            go_on = f"kept as {keeper.keep_step(last=True)}; to go on, give the same command with --resume latest"
        else:
            go_on = "nothing is kept, with --logs none"
        logger.warning("stopped by %s after step %d of %d; %s", describe_stop(self.trainer.stop_reason),
                       self.clock.scheduled_step, self.clock.total_steps, go_on)  # fmt: skip

    def _evaluate(self, evaluator: Evaluator, epoch: int, last: bool) -> dict[str, float]:
        """Metrics after `epoch` completed epochs; they go to the logs too."""
        metrics = evaluate(evaluator, self.trainer.paired, epoch, last, self.trainer.average)
        if self._files:
            self._files.append(RESULTS, {"epoch": epoch, **metrics})
            self._files.append(METRICS, {"kind": "validation", "step": self.clock.step, "epoch": epoch, **metrics})
        self._track("val", metrics, self.clock.step)
        return metrics

    def _steps(self, keeper: Keeper | None) -> bool:
        """Those that are left of the epoch; whether the run is to stop before they are taken, or what comes after."""
        clock, every = self.clock, self.config.save_every_steps
        log = EpochLog(
            epoch=clock.epoch,
            steps=clock.steps_per_epoch,
            done=clock.index,
            samples_per_step=self._pairs_per_step,
            epochs=self.config.epochs,
            every=self.config.log_every_n_steps,
            write=self._write_row if self.folder else None,
            show=self.main,
        )
        with contextlib.closing(log), contextlib.closing(self.trainer.steps(log)) as steps:
            for _ in steps:
                self.profile.step()
                if self.trainer.stop_reason != GO_ON:
                    return True
                if keeper and every and clock.step % every == 0:
                    keeper.keep_step()
        self._report_skips(clock.skipped, f"epoch {clock.epoch + 1}")
        for remark in describe_recent(self.trainer.loss):
            logger.info(remark)
        if self.trainer.hash_ids and self.trainer.hash_ids.collisions:
            visits = counted(self.trainer.hash_ids.collisions, "visit")
            logger.warning(
                "%s so far of samples beyond the %d that there is room for, which share ids; raise --sample-id-table",
                visits, self.trainer.hash_ids.num_ids,
            )  # fmt: skip
        return False

    def _write_row(self, row: dict) -> None:
        self._began = True
        assert self._files is not None  # of a rank that writes
        self._files.append(METRICS, row)
        self._track("train", row, row["step"])

    def _track(self, prefix: str, values: dict, step: int) -> None:
        if self._tracking:
            self._tracking.log({f"{prefix}/{name}": value for name, value in values.items()}, step)
