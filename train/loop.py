"""The training loop of every task: steps, evaluation, checkpoints, the finished model folder."""

import json
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corpus.errors import RunError
from corpus.store import Store
from train.batches import BatchReader, EpochPlan, plan_epoch
from train.checkpoint import Found, open_newest
from train.engine import autocast, full_state, resolve_precision, restore, start_engine
from train.flops import peak_flops
from train.metrics import MetricsLog, Rates, duration, progress_line
from train.output import finished, publish
from train.packing import gene_limit
from train.saver import Saver
from train.schedule import learning_rate
from train.settings import settings_hash
from train.tasks import MicroBatch, Task, loss_scale, token_lengths
from train.world import Ballot, World

Emit = Callable[[str], None]
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Signals:
    """What reaches a run from outside, and what it lets the outside know.

    Parameters
    ----------
    stop
        Set in any one process: all save after the step they are in, and end.
    preempted
        Called by every process equally often: tells what is about to be taken away, or None. All save, and go on.
    """

    stop: threading.Event = field(default_factory=threading.Event)
    preempted: Callable[[], str | None] = lambda: None


_SUMS = ("loss", "weight", "correct", "count", "tokens", "cells")
_NOTICE_S = 5.0  # between two questions whether a machine is about to be taken away


@dataclass
class State:
    """Where training stands; all of it is in a checkpoint.

    Parameters
    ----------
    step, epoch, step_in_epoch
        The step to take next.
    per_step
        Micro-batches of a step over all workers, as the run began with.
    sums
        float64[6]: totals over all ranks since the last record, in the order of `_SUMS`.
    seconds
        Training time so far, over all attempts.
    evaluation
        The last one.
    best
        The evaluation (with its epoch and step) of the weights to keep, where a task chooses.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    per_step: int = 1
    sums: list[float] = field(default_factory=lambda: [0.0] * len(_SUMS))
    seconds: float = 0.0
    total_tokens: float = 0.0
    total_cells: float = 0.0
    evaluation: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)

    def position(self) -> dict[str, int]:
        """Place in the data."""
        return {name: getattr(self, name) for name in ("step", "epoch", "step_in_epoch", "per_step")}


def run(
    task: Task, out: str, world: World, *, emit: Emit, report: Report, signals: Signals | None = None
) -> dict[str, Any]:
    """Train from the newest checkpoint, or from the beginning, to a finished model folder.

    Parameters
    ----------
    out
        URI of the output folder.
    emit
        Takes lines for the user; called by rank 0.
    report
        Takes the figures of each evaluation; called by every rank equally often.

    Returns
    -------
    The content of metrics.json.

    Raises
    ------
    RunError
        If the loss is no longer a number, if checkpoints cannot be written, or if the run was asked to stop.
    """
    with tempfile.TemporaryDirectory(prefix="train-") as scratch:
        going = _Run(task, Store(out), world, Path(scratch), emit, report, signals or Signals())
        try:
            return going.finish()
        finally:
            going.saver.close()


class _Run:
    def __init__(
        self, task: Task, store: Store, world: World, scratch: Path, emit: Emit, report: Report, signals: Signals
    ) -> None:
        self.task, self.store, self.world, self.scratch, self.report = task, store, world, scratch, report
        self.emit: Emit = emit if world.is_first else lambda line: None
        self.signals, self.ballot = signals, Ballot()
        self.settings = task.settings
        self.hash = settings_hash(task.identity())
        self.lengths = token_lengths(task.corpus, task.max_length, task.special_tokens)
        self.precision = resolve_precision(self.settings.engine.precision, world.device)
        self.state = State(per_step=world.size * self.settings.batches.accumulation)
        self.best: dict[str, Tensor] | None = None
        log = b""
        with open_newest(store, world, self.hash) as (found, skipped):
            for line in skipped:
                self.emit(line)
            if found is not None:
                self._take_over(found)
                log = found.log
            self.engine = self._start(found)
        self.log = MetricsLog(store, scratch, log, self.state.step) if world.is_first else None
        self.saver = Saver(store, world, self.hash, self.settings.keep, self.emit)
        self.sums = torch.tensor(self.state.sums, dtype=torch.float64, device=world.device)
        self.rates = Rates(peak=peak_flops(world.device, self.precision, self.settings.keep.peak_tflops))
        self.saved_at = self.shown_at = self.asked_at = time.monotonic()
        self.saved_step = -1
        self.notice: str | None = None

    def _take_over(self, found: Found) -> None:
        manifest, size = found.manifest, self.world.size
        self.state = State(**manifest.state, **{name: getattr(manifest, name) for name in self.state.position()})  # type: ignore[arg-type]
        self.best = found.best
        self.emit(f"resuming from {self.store.uri}/{manifest.folder} (epoch {manifest.epoch}, step {manifest.step})")
        if manifest.world_size != size:
            self.emit(
                f"it was written by {manifest.world_size} worker(s) and goes on with {size}: steps stay the same "
                f"{manifest.per_step} micro-batches, {-(-manifest.per_step // size)} for each worker"
            )

    def _start(self, found: Found | None) -> Any:
        """Make the engine, with the state of a checkpoint if there is one."""
        accumulation = -(-self.state.per_step // self.world.size)
        engine = start_engine(
            self.task.build_model().to(self.world.device),
            self.settings.optimizer,
            self.settings.engine,
            self.settings.batches.model_copy(update={"accumulation": accumulation}),
            self.precision,
            self.world,
            universal=found is not None and found.universal,
        )
        if found is not None:
            restore(engine, found.folder, found.tag)
        return engine

    def finish(self) -> dict[str, Any]:
        """Train what is left, measure, write the model folder."""
        while self.state.epoch < self.settings.epochs:
            self._epoch()
        self.saver.wait()
        self.world.moved("the end of training")
        weights = self.best if self.best is not None else full_state(self.engine.module)
        model = self.task.build_model().to(self.world.device)
        model.load_state_dict(weights)
        model.eval()
        last = self.state.best or self.state.evaluation
        with autocast(self.world.device, self.precision):
            measured = self.task.final_metrics(model, self.world, last)
        state = self.state
        metrics = {
            **measured,
            "command": self.task.command,
            "settings_hash": self.hash,
            "epochs": self.settings.epochs,
            "steps": state.step,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "train_cells": len(self.task.train_cells),
            "workers": self.world.size,
            "device": self.world.device.type,
            "precision": self.precision,
            "zero_stage": self.engine.zero_optimization_stage(),
            "train_seconds": round(state.seconds, 1),
            "tokens_per_s": round(state.total_tokens / max(state.seconds, 1e-9), 1),
            "cells_per_s": round(state.total_cells / max(state.seconds, 1e-9), 2),
        }
        if self.log is not None:
            self.log.close()
            if finished(self.store) is None:
                folder = self.scratch / "model"
                self.task.save(folder, weights, json.loads(json.dumps(metrics)))
                self._add_logs(folder)
                publish(self.store, folder, metrics)
        self.world.barrier()
        return metrics

    def _add_logs(self, folder: Path) -> None:
        """Logs could not be written in place on object storage: they travel with the model."""
        if self.store.is_local:
            return
        for path in [self.scratch / "metrics.jsonl", *(self.scratch / "tensorboard").rglob("*")]:
            if path.is_file():
                target = folder / path.relative_to(self.scratch)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)

    def _plan(self) -> EpochPlan:
        options = self.settings.batches
        return plan_epoch(
            self.lengths,
            self.task.corpus.row_group_offsets,
            self.task.train_cells,
            seed=self.settings.seed,
            epoch=self.state.epoch,
            world_size=self.world.size,
            per_step=self.state.per_step,
            token_budget=options.token_budget,
            window_row_groups=options.window_row_groups,
        )

    def _epoch(self) -> None:
        state, keep = self.state, self.settings.keep
        plan, epoch = self._plan(), self.state.epoch
        evaluate_steps = getattr(self.settings, "evaluate_steps", None)
        for micro_batches in self._timed(self._reader(plan, epoch)):
            began = time.monotonic()
            done = (epoch + (state.step_in_epoch + 1) / plan.num_steps) / self.settings.epochs
            lr = learning_rate(self.settings.optimizer, done)
            self._step(micro_batches, lr)
            state.step += 1
            state.step_in_epoch += 1
            state.seconds += time.monotonic() - began
            self.world.moved(f"step {state.step}")
            due = keep.checkpoint_steps is not None and state.step % keep.checkpoint_steps == 0
            if state.step % keep.log_steps == 0:
                self._record(lr, done, plan)
                waited = time.monotonic() - self.saved_at
                due |= bool(self.world.from_first(waited > 60 * keep.checkpoint_minutes))
            if state.step_in_epoch == plan.num_steps:
                break
            if evaluate_steps and state.step % evaluate_steps == 0:
                self._evaluate()
            if self._heed() or due:
                self._save()
        state.epoch, state.step_in_epoch = epoch + 1, 0
        self._evaluate()
        self._save()
        if state.epoch < self.settings.epochs:
            self._heed()

    def _heed(self) -> bool:
        """Listen to the outside as all ranks have voted in this step; True if it is time to save."""
        _, stop, ask = self.ballot.read() or (0, 0, 0)
        if stop:
            if self.saved_step != self.state.step:
                self._save()
            where = "there" if self.saver.wait() else "the newest checkpoint, for this one could not be written"
            raise RunError(f"stopped by request after step {self.state.step}; the same command goes on from {where}")
        if not ask:
            return False
        notice, before = self.signals.preempted(), self.notice
        self.notice = notice
        if notice is None or notice == before:
            return False
        self.emit(f"{notice}: saving at step {self.state.step}")
        return True

    def _votes(self) -> list[float]:
        """Whether this process was asked to stop; and, from rank 0, whether it is time to ask for preemptions."""
        ask = self.world.is_first and time.monotonic() - self.asked_at > _NOTICE_S
        if ask:
            self.asked_at = time.monotonic()
        return [float(self.signals.stop.is_set()), float(ask)]

    def _reader(self, plan: EpochPlan, epoch: int) -> BatchReader[MicroBatch]:
        return BatchReader(
            self.task.corpus,
            plan,
            lambda cells: self.task.prepare(cells, epoch),
            rank=self.world.rank,
            first_step=self.state.step_in_epoch,
            max_length=gene_limit(self.task.max_length, self.task.special_tokens),
            threads=self.settings.workers.reader_threads,
        )

    def _timed(self, reader: BatchReader[MicroBatch]) -> Iterator[list[MicroBatch]]:
        batches = iter(reader)
        while True:
            began = time.monotonic()
            item = next(batches, None)
            waited = time.monotonic() - began
            self.rates.waited(waited)
            self.state.seconds += waited
            if item is None:
                return
            yield item

    def _step(self, micro_batches: list[MicroBatch], lr: float) -> None:
        # Dropout depends on nothing but this, so a checkpoint needs no generator states.
        seed = np.random.SeedSequence([self.settings.seed, 5, self.state.step, self.world.rank])
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        total = self.world.sum([sum(batch.weight for batch in micro_batches), *self._votes()])
        self.ballot.put(total)
        scale = loss_scale(self.world.size, total[0]).float()
        stats = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.world.device)
        self.engine.train()
        for batch in micro_batches:
            on_device = batch.to(self.world.device)
            loss, correct = self.task.loss(self.engine, on_device)
            real = float(batch.num_cells > 0)
            self.engine.backward(loss * (scale * real), scale_wrt_gas=False)
            self.engine.step()
            if real:
                scored = float(len(batch.labels))
                numbers = stats.new_tensor([batch.weight, 0, scored, batch.num_tokens, batch.num_cells])
                stats += torch.cat([loss.detach().double()[None], numbers])
                stats[2] += correct
        self.sums += self.world.sum(stats)
        self.rates.worked(sum(batch.flops for batch in micro_batches))

    def _record(self, lr: float, done: float, plan: EpochPlan) -> None:
        sums = dict(zip(_SUMS, self.sums.tolist(), strict=True))
        self.sums.zero_()
        loss = sums["loss"] / max(sums["weight"], 1e-12)
        if not math.isfinite(loss):
            raise RunError(f"step {self.state.step}: the loss is {loss}; try a lower --optimizer.learning-rate")
        self.state.total_tokens += sums["tokens"]
        self.state.total_cells += sums["cells"]
        record = {
            "step": self.state.step,
            "epoch": round(done * self.settings.epochs, 6),
            "loss": loss,
            "accuracy": sums["correct"] / max(sums["count"], 1),
            "lr": lr,
            **self.rates.take(sums["tokens"], sums["cells"]),
        }
        if self.log is None:
            return
        self.log.write(record)
        now = time.monotonic()
        if now - self.shown_at >= self.settings.keep.progress_s:
            self.shown_at = now
            left = self.state.seconds * (1 - done) / done
            steps = round(self.state.step / done)
            self.emit(progress_line(record, epochs=self.settings.epochs, steps=steps, seconds_left=left))

    def _evaluate(self) -> None:
        began = time.monotonic()
        self.engine.eval()
        figures = self.task.evaluate(self.engine, self.world)
        state, score = self.state, self.task.score
        state.evaluation = figures
        epoch = state.epoch + (state.step_in_epoch and state.step_in_epoch / self._plan().num_steps)
        record = {"step": state.step, "epoch": epoch, **figures}
        if score is not None and (not state.best or figures[score] > state.best[score]):
            state.best = record
            self.best = full_state(self.engine.module)
        if self.log is not None:
            self.log.write(record)
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
        self.emit(f"step {state.step} | epoch {epoch:.2f}/{self.settings.epochs} | {shown} ({_since(began)})")
        self.report(record if score is None else {**record, f"best_{score}": state.best[score]})
        self.rates.take(0, 0)  # evaluation is no training time

    def _save(self) -> None:
        state = self.state
        state.sums = self.sums.tolist()
        remembered = {
            "sums": state.sums,
            "seconds": state.seconds,
            "total_tokens": state.total_tokens,
            "total_cells": state.total_cells,
            "evaluation": state.evaluation,
            "best": state.best,
        }
        self.saver.save(
            self.engine,
            position=state.position(),
            state=remembered,  # type: ignore[arg-type]
            log=self.log.content() if self.log is not None else b"",
            best=self.best,
        )
        self.saved_at, self.saved_step = time.monotonic(), state.step
        self.rates.take(0, 0)


def _since(began: float) -> str:
    return duration(time.monotonic() - began)
