"""The training loop: one global batch a step, on however many ranks and micro batches.

A step's loss is the sum over the counted targets of the global batch divided by their number, which every rank knows
beforehand from the data order; so micro batches and ranks simply add up.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from modeling.some import KeyStore, update_key_stores
from modeling.some.keys import key_store_hashes
from trainer.checkpoint import RunState
from trainer.config import Experiment
from trainer.console import Console
from trainer.data import Batch, Dataset, TrainOrder, micro_batches
from trainer.distributed import Layout
from trainer.engine import Engine, StepResult
from trainer.evaluate import evaluate
from trainer.faults import Faults
from trainer.memory import FreedMemory
from trainer.metrics import RunLog, accumulate_statistics
from trainer.placement import begin_placement, replan_if_due
from trainer.saver import Saver
from trainer.schedule import learning_rate


@dataclass
class Trainer:
    """One run in progress.

    `state` moves with every step; `log` is None on every rank but 0.
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
    freed_memory: FreedMemory = field(default_factory=FreedMemory)

    def __post_init__(self) -> None:
        self._faults = Faults(self.experiment.faults, dist.get_rank())
        self._saver = Saver(self.output_dir, self.experiment.checkpoint, self._faults, self.log)

    @property
    def stores(self) -> list[KeyStore]:
        """The key store of every SoME layer."""
        return [layer.store for layer in self.engine.model.some_layers]

    @property
    def _eval_every(self) -> int:
        every = self.experiment.train.eval_every
        return self.order.steps_per_epoch if every == "epoch" else every

    def run(self, stop: int) -> None:
        """Train up to step `stop`, evaluating and saving on the way and at the end."""
        checkpoint = self.experiment.checkpoint
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
            self._evaluate()
        while self.state.step < stop:
            self._step()
            self._report_plan(replan_if_due(self.engine.model.some_layers, self.experiment.parallel, self.state))
            step, is_last = self.state.step, self.state.step == stop
            if step % self.experiment.parallel.check_every == 0 or is_last:
                check_key_stores(self.stores, step)
            is_best = (step % self._eval_every == 0 or is_last) and self._evaluate()
            if step % checkpoint.every == 0 or is_last or is_best:
                self._save()
        self._saver.wait()
        self.console.end()
        self._record("end", step=self.state.step, finished=self.state.step >= self.state.total_steps)

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

        loss, result, statistics = torch.zeros((), device=self.engine.device), None, [None] * len(self.stores)
        batches = micro_batches(
            self.dataset.train, sequence_ids, dist.get_rank(), dist.get_world_size(), self.layout.micro_batch
        )
        for number, batch in enumerate(batches):
            spoiled = number == 0 and self._faults.spoils_loss(step + 1)
            micro_loss, routing = self._forward_backward(batch, targets, temperature, spoiled)
            loss += micro_loss
            routed_BS = batch.attention_mask_BS
            real_T, token_ids_T = batch.is_real_BS[routed_BS], batch.token_ids_BS[routed_BS]
            statistics = accumulate_statistics(
                statistics, routing, self.stores, real_T.to(self.engine.device), token_ids_T.to(self.engine.device)
            )
            result = self.engine.end_micro_batch(rate)
        assert result is not None, "the last micro batch of a step is its accumulation boundary"
        if result.applied:
            update_key_stores(self.stores, statistics, dist.group.WORLD)

        # Beside the loss: whether a checkpoint could not be written while training went on. All ranks learn it in one step.
        totals_2 = torch.stack([loss, loss.new_tensor(float(self._saver.failed()))])
        dist.all_reduce(totals_2)
        loss, failed = totals_2.tolist()
        self.freed_memory.release()
        self.state.step += 1
        self.state.tokens += tokens
        self.state.skipped += not result.applied
        self._report_step(loss, result, rate, tokens, time.perf_counter() - began)
        if failed:
            self._saver.wait()

    def _temperature(self, epoch: int) -> float | None:
        """The gates' temperature in an epoch (from 0); None = the model's own."""
        train, start = self.experiment.train, self.experiment.model.some.temperature
        if train.temperature_end is None:
            return None
        # `steps` may make a run longer than `epochs`.
        return start - (start - train.temperature_end) * min(1.0, epoch / train.epochs)

    def _forward_backward(
        self, batch: Batch, targets: int, temperature: float | None, spoiled: bool
    ) -> tuple[torch.Tensor, list]:
        """This micro batch's share of the step's loss over `targets` targets, NaN if it is `spoiled`, and its routing."""
        device = self.engine.device
        mask_BS = batch.routing_mask
        out = self.engine.forward(
            batch.input_ids_BS.to(device),
            None if mask_BS is None else mask_BS.to(device),
            temperature=temperature,
            targets_BS=batch.targets_BS.to(device),
        )
        loss = out.losses_T.sum() / targets
        if spoiled:
            loss = loss * torch.nan
        self.engine.backward(loss)
        return loss.detach(), out.routing

    def _report_step(self, loss: float, result: StepResult, rate: float, tokens: int, seconds: float) -> None:
        step, rate_of_tokens = self.state.step, tokens / seconds
        self.console.step(step, loss, rate_of_tokens)
        if not result.applied:
            self.console.say(f"step {step}: gradients are not finite; the step and its key update are skipped")
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
        """Measure on the validation split; whether it is the best so far."""
        began = time.perf_counter()
        measured = evaluate(
            self.engine.model, self.dataset.validation, self.experiment, self.layout.micro_batch, self.engine.device
        )
        step, loss = self.state.step, measured["val_loss"]
        self.state.val_loss = loss
        is_best = self.state.best is None or loss < self.state.best["val_loss"]
        if is_best:
            self.state.best = {"step": step, "val_loss": loss}
        self._record(
            "eval", step=step, epoch=step / self.order.steps_per_epoch, **measured, seconds=time.perf_counter() - began
        )
        experts = [layer["effective_experts"] for layer in measured["layers"]]
        routed = f"; effective experts {min(experts):.1f} to {max(experts):.1f}" if experts else ""
        self.console.say(
            f"step {step}: validation loss {loss:.4f} nats/token (ppl {measured['val_ppl']:,.2f}, "
            f"{measured['bits_per_byte']:.3f} bits/byte){routed}"
        )
        return is_best

    def _save(self) -> None:
        self._saver.save(self.state, self.engine, self.stores)

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
