"""The training loop: one global batch a step, on however many ranks and micro batches.

A step's loss is the sum over the counted targets of the global batch divided by their number, which every rank knows
beforehand from the data order; so micro batches and ranks simply add up.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from modeling.some import KeyStatistics, KeyStore, KeyStoreUpdate
from modeling.some.keys import key_store_hashes
from trainer.checkpoint import RunState, checkpoint_folder, read_state
from trainer.config import Experiment
from trainer.console import Console
from trainer.data import Batch, Dataset, TrainOrder, micro_batches
from trainer.diagnose import find_suspects
from trainer.distributed import broadcast_text, gather_texts
from trainer.engine import Engine, StepResult
from trainer.evaluate import evaluate
from trainer.exit_codes import NumericalFault
from trainer.faults import Faults
from trainer.layout import Layout
from trainer.memory import FreedMemory
from trainer.metrics import RunLog, accumulate_statistics
from trainer.placement import begin_placement, replan_if_due
from trainer.saver import Saver
from trainer.schedule import learning_rate
from trainer.served import describe
from trainer.snapshot import load_checkpoint
from trainer.stopping import StopSignals
from trainer.storage import StorageError
from trainer.watchdog import Progress

FEW = 4
"""How many of a batch's sequences a message names."""


@dataclass
class Trainer:
    """One run in progress.

    `state` moves with every step; `log` is None on every rank but 0; `key_group` is a process group of all ranks that nobody
    else uses; `origin` has the checkpoints of the run that this one was resumed from, where that is another. `stopped_by`
    says which signal on which rank ends the run, once the ranks know of one.
    """

    experiment: Experiment
    layout: Layout
    engine: Engine
    dataset: Dataset
    order: TrainOrder
    state: RunState
    output_dir: Path
    log: RunLog | None
    console: Console
    key_group: dist.ProcessGroup
    origin: Path | None = None
    signals: StopSignals = field(default_factory=StopSignals)
    progress: Progress = field(default_factory=Progress)
    freed_memory: FreedMemory = field(default_factory=FreedMemory)
    stopped_by: str | None = None

    def __post_init__(self) -> None:
        self._faults = Faults(self.experiment.faults, dist.get_rank())
        self._saver = Saver(self.output_dir, self.experiment.checkpoint, self._faults, self.log, self.progress.alive)

    @property
    def stores(self) -> list[KeyStore]:
        """The key store of every SoME layer."""
        return [layer.store for layer in self.engine.model.some_layers]

    @property
    def _eval_every(self) -> int:
        every = self.experiment.train.eval_every
        return self.order.steps_per_epoch if every == "epoch" else every

    def run(self, stop: int) -> bool:
        """Train up to step `stop`, evaluating and saving on the way and at the end.

        A signal on any rank ends it at the next boundary of all ranks (a step, a batch of an evaluation, a save) with a
        checkpoint; what was due there and is missing is made first when the run goes on.

        Returns:
            Whether it came that far.

        Raises:
            NumericalFault: on every rank, where more steps are skipped than may be and there is no way back.
        """
        self._record(
            "start",
            step=self.state.step,
            total_steps=self.state.total_steps,
            world_size=dist.get_world_size(),
            ep_size=self.layout.ep_size,
            micro_batch=self.layout.micro_batch,
            accumulation=self.layout.accumulation,
            precision=self.state.precision,
        )
        self._report_plan(begin_placement(self.engine.model.some_layers, self.experiment.parallel, self.state))
        self.console.begin(self.state.step, stop)
        if self.state.step == 0:
            self.state.evaluation_due = True
        if self.state.evaluation_due:
            self._evaluate_and_save(stop)
        while self.state.step < stop and self.stopped_by is None:
            self._step()
            if self.state.skipped_in_row > self.experiment.train.max_skipped:
                self._mend()
            self.progress.mark("placing experts", self.state.step)
            self._report_plan(replan_if_due(self.engine.model.some_layers, self.experiment.parallel, self.state))
            step, is_last = self.state.step, self.state.step == stop
            if step % self.experiment.parallel.check_every == 0 or is_last:
                check_key_stores(self.stores, step)
            self.state.evaluation_due = step % self._eval_every == 0 or is_last
            self._evaluate_and_save(stop)
        self._saver.wait()
        self.console.end()
        state, stopped = self.state, {} if self.stopped_by is None else {"stopped_by": self.stopped_by}
        finished = state.step >= state.total_steps and not state.evaluation_due
        self._record("end", step=state.step, finished=finished, **stopped)
        self._agree()
        return state.step >= stop and not state.evaluation_due

    def _evaluate_and_save(self, stop: int) -> None:
        """What is due after a step."""
        state = self.state
        is_best = state.evaluation_due and self.stopped_by is None and self._evaluate()
        is_complete = state.step > 0 and not state.evaluation_due
        is_regular = state.step % self.experiment.checkpoint.every == 0
        is_due = is_complete and (is_regular or is_best or state.rolled_back == state.step)
        if is_due or (is_complete and state.step >= stop) or self.stopped_by is not None:
            self._save(is_due)

    def _step(self) -> None:
        """One optimizer step, and the key stores' step after it."""
        began = time.perf_counter()
        step, train = self.state.step, self.experiment.train
        self._faults.at("step", step + 1)
        sequence_ids = self.order.sequence_ids(step)
        tokens = int(self.dataset.train.lengths[sequence_ids].sum())
        # A batch of rows of one token has no target; its loss is 0.
        targets = max(1, int(self.dataset.train.targets_per_row[sequence_ids].sum()))
        temperature = self._temperature(step // self.order.steps_per_epoch)
        rate = learning_rate(step, self.state.total_steps, train)

        loss, statistics = torch.zeros((), device=self.engine.device), [None] * len(self.stores)
        self.progress.mark("loading data", step + 1)
        batches = self._micro_batches(sequence_ids)
        for number, batch in enumerate(batches, start=1):
            self.progress.mark("forward and backward", step + 1)
            micro_loss, statistics = self._forward(batch, targets, temperature, statistics)
            if number == 1 and self._faults.spoils_loss(step + 1):
                micro_loss = micro_loss * torch.nan
            loss += micro_loss.detach()
            if number == len(batches):
                # The sums over tokens are complete: they travel behind this backward, then behind the optimizer.
                update = KeyStoreUpdate(self.stores, statistics, self.key_group)
            # A loss may be infinite and its gradients finite: make them NaN, which the engine finds on every rank.
            self.engine.backward(micro_loss * torch.where(micro_loss.detach().isfinite(), 1.0, torch.nan))
            if number == len(batches):
                update.fold()
            result = self.engine.end_micro_batch(rate)
        assert result is not None, "the last micro batch of a step is its accumulation boundary"
        self.progress.mark("key update", step + 1)
        update.finish(apply=result.applied)

        loss = self._agree(loss)
        self.freed_memory.release()
        self.state.step += 1
        self.state.tokens += tokens
        self.state.skipped += not result.applied
        self.state.skipped_in_row = 0 if result.applied else self.state.skipped_in_row + 1
        self._report_step(loss, result, rate, tokens, time.perf_counter() - began)

    def _micro_batches(self, sequence_ids: np.ndarray) -> list[Batch]:
        """This rank's share of a global batch."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return micro_batches(self.dataset.train, sequence_ids, rank, world_size, self.layout.micro_batch)

    def _agree(self, value: torch.Tensor | float = 0.0) -> float:
        """The sum of `value` over the ranks, who learn in the same collective whether one of them got a signal.

        Raises:
            StorageError: on every rank, where rank 0 could not write its records, or a checkpoint while training went on.
        """
        received = self.signals.received
        has_failed = self._saver.failed() or (self.log is not None and self.log.error is not None)
        sums_3 = torch.tensor([0.0, received is not None, has_failed], device=self.engine.device)
        sums_3[0] = value
        dist.all_reduce(sums_3)
        total, signalled, failed = sums_3.tolist()
        if failed:
            message = broadcast_text("" if self.log is None or self.log.error is None else str(self.log.error))
            if message:
                raise StorageError(message)
            self._saver.wait()
        if signalled and self.stopped_by is None:
            names = gather_texts("" if received is None else received.name)
            rank, name = next((rank, name) for rank, name in enumerate(names) if name)
            self.stopped_by = f"{name} on rank {rank}"
        return total

    def _mend(self) -> None:
        """Go back to the last checkpoint that was due, if the settings say so and it has not just been done; else stop."""
        state, train = self.state, self.experiment.train
        self.progress.mark("looking for non-finite numbers", state.step)
        ids = self.order.sequence_ids(state.step - 1)
        temperature = self._temperature((state.step - 1) // self.order.steps_per_epoch)
        suspects = find_suspects(self.engine.model, self._micro_batches(ids), temperature, self.engine.device)
        documents = np.cumsum(self.dataset.train.starts_document)[ids[:FEW]] - 1
        fault = (
            f"step {state.step}: the loss or the gradients of {state.skipped_in_row} steps in a row are not finite "
            f"(train.max_skipped = {train.max_skipped}); first seen in {suspects}; the batch has sequences "
            f"{', '.join(map(str, ids[:FEW]))}, ... of documents {', '.join(map(str, documents))}, ..."
        )
        if train.on_nan == "stop":
            raise NumericalFault(f"{fault}; --set train.on_nan=rollback goes back to a checkpoint and leaves this data out")
        if state.rolled_back is not None:
            raise NumericalFault(f"{fault}; no checkpoint was due since the run went back at step {state.rolled_back}")
        if state.rollback_to is None:
            raise NumericalFault(f"{fault}; there is no checkpoint to go back to")
        self._saver.wait()
        folder = checkpoint_folder(self.output_dir, state.rollback_to)
        if self.origin is not None and not folder.exists():
            folder = self.origin / folder.name
        try:
            saved = read_state(folder)
            self.engine.load_core_state(load_checkpoint(folder, saved, self.stores))
        except ValueError as error:
            raise NumericalFault(f"{fault}; going back failed: {error}") from None
        state.skipped, state.skipped_in_row = saved.skipped + state.step - saved.step, 0
        state.rolled_back = state.step
        self.console.say(f"{fault}; going on from the weights of step {saved.step}")
        self._record("rollback", step=state.step, to=saved.step, suspects=suspects)

    def _temperature(self, epoch: int) -> float | None:
        """The gates' temperature in an epoch (from 0); None = the model's own."""
        train, start = self.experiment.train, self.experiment.model.some.temperature
        if train.temperature_end is None:
            return None
        # `steps` may make a run longer than `epochs`.
        return start - (start - train.temperature_end) * min(1.0, epoch / train.epochs)

    def _forward(
        self, batch: Batch, targets: int, temperature: float | None, statistics: list[KeyStatistics | None]
    ) -> tuple[torch.Tensor, list[KeyStatistics]]:
        """This micro batch's share of the step's loss over `targets` targets, and its tokens added to the statistics.

        They are added before the backward, which then need not keep the routing beside everything else.
        """
        device, mask_BS = self.engine.device, batch.routing_mask
        out = self.engine.forward(
            batch.input_ids_BS.to(device),
            None if mask_BS is None else mask_BS.to(device),
            temperature=temperature,
            targets_BS=batch.targets_BS.to(device),
        )
        routed_BS = batch.attention_mask_BS
        real_T, token_ids_T = batch.is_real_BS[routed_BS].to(device), batch.token_ids_BS[routed_BS].to(device)
        statistics = accumulate_statistics(statistics, out.routing, self.stores, real_T, token_ids_T)
        return out.losses_T.sum() / targets, statistics

    def _report_step(self, loss: float, result: StepResult, rate: float, tokens: int, seconds: float) -> None:
        step, rate_of_tokens = self.state.step, tokens / seconds
        self.console.step(step, loss, rate_of_tokens)
        if not result.applied:
            self.console.say(f"step {step}: loss or gradients are not finite; the step and its key update are skipped")
        if step % self.experiment.log.every == 0:
            self._record(
                "train",
                step=step,
                epoch=step / self.order.steps_per_epoch,
                loss=loss,
                lr=rate,
                grad_norm=result.grad_norm,
                tokens=self.state.tokens,
                tokens_per_second=rate_of_tokens,
                seconds=seconds,
                skipped=self.state.skipped,
                key_movement=[float(store.moved) if result.applied else 0.0 for store in self.stores],
            )

    def _report_plan(self, plan: dict | None) -> None:
        if plan is None:
            return
        step, layers = self.state.step, plan["layers"]
        self._record("placement", step=step, **plan)
        before, after = (max(layer[f"load_{when}"] for layer in layers) for when in ("before", "after"))
        self.console.say(
            f"step {step}: {plan['moved']} experts moved in {plan['seconds']:.1f} s; busiest rank of any layer has "
            f"{after:.2f} of the mean load instead of {before:.2f}"
        )

    def _evaluate(self) -> bool:
        """Measure on the validation split, unless a signal comes; whether it is the best so far of those that the settings
        ask for. One that is made because the run is asked to stop here is none of them, so that a stop changes nothing."""
        began, engine = time.perf_counter(), self.engine
        measured = evaluate(
            engine.model, self.dataset.validation, self.experiment, self.layout.micro_batch, engine.device, self._gives_up
        )
        if measured is None:
            return False
        self.state.evaluation_due = False
        step, record = self.state.step, measured.record
        loss = record["val_loss"]
        self.state.val_loss = loss
        is_asked_for = step % self._eval_every == 0 or step == self.state.total_steps
        is_best = is_asked_for and (self.state.best is None or loss < self.state.best["val_loss"])
        if is_best:
            self.state.best = {"step": step, "val_loss": loss}
        self._record(
            "eval", step=step, epoch=step / self.order.steps_per_epoch, **record, seconds=time.perf_counter() - began
        )
        if self.log is not None:
            self.log.write_experts(step, describe(measured.served, measured.pairs, self.dataset.tokenizer))
            self.log.show_stores(step, self.stores)
        experts = [layer["effective_experts"] for layer in record["layers"]]
        routed = f"; effective experts {min(experts):.1f} to {max(experts):.1f}" if experts else ""
        self.console.say(
            f"step {step}: validation loss {loss:.4f} nats/token (ppl {record['val_ppl']:,.2f}, "
            f"{record['bits_per_byte']:.3f} bits/byte){routed}"
        )
        return is_best

    def _gives_up(self) -> bool:
        self.progress.mark("evaluation", self.state.step)
        self._agree()
        return self.stopped_by is not None

    def _save(self, is_due: bool = True) -> None:
        """Every rank gathers the core and rank 0 writes it.

        Numbers that are not finite are never written: the last good checkpoint stays the newest.
        """
        began, state = time.perf_counter(), self.state
        self.progress.mark("gathering a checkpoint", state.step)
        self._saver.wait()
        # The whole core is about to come on top of what the process holds.
        self.freed_memory.release(slack_bytes=0)
        core = self.engine.core_state()
        if not core.is_finite() or not all(bool(store.keys.isfinite().all()) for store in self.stores):
            self.console.say(f"step {state.step}: no checkpoint, since weights or keys are not finite")
            return
        # Not amid skipped steps: what spoils them may lie in these weights.
        if is_due and not state.skipped_in_row:
            state.rollback_to = state.step
            state.rolled_back = state.rolled_back if state.rolled_back == state.step else None
        self.progress.mark("writing a checkpoint", state.step)
        if self.log is not None:
            self.log.sync()  # a checkpoint must not outlive the records of its steps
        self._agree()
        self._saver.save(state, core, self.stores, began)
        self._agree()

    def _record(self, event: str, **values) -> None:
        if self.log is not None:
            self.log.write(event, **values)


def check_key_stores(stores: list[KeyStore], step: int) -> None:
    """Compare the exact bytes of every key store over all ranks.

    Raises:
        RuntimeError: on every rank, naming the layers that differ.
    """
    if not stores:
        return
    hashes_L = key_store_hashes(stores)
    extremes_2L = torch.cat([hashes_L, -hashes_L])
    dist.all_reduce(extremes_2L, op=dist.ReduceOp.MAX)
    largest_L, smallest_L = extremes_2L.chunk(2)
    differing = (largest_L != -smallest_L).nonzero().flatten().tolist()
    if differing:
        raise RuntimeError(
            f"step {step}: the key stores of layers {differing} differ between ranks, which would route tokens differently; "
            "resume from the last checkpoint, and check for faulty memory or mixed library versions"
        )
