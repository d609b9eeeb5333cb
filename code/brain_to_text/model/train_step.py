"""One training step: augment, forward, loss, backward, clip, update.

No value that was computed is read back in it, so nothing here makes the host wait for the device;
torch's own CTC on a GPU would (see `gpu_ctc`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..config import TrainingConfig
from ..errors import TrainingError
from ..streaming.batch import Batch
from .augmentations import Augmentation, step_generator
from .device import autocast_dtype
from .losses import JointObjective, LossTerms
from .optimizer import apply_update, build_optimizer, clip_and_check, set_learning_rates
from .rnn_model import GRUDecoder

# Dynamic loss scaling for float16, torch.amp.GradScaler's rule and constants.
INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000


@dataclass
class StepResult:
    """One step in numbers; tensors are scalars on the device: reading one waits for it."""

    terms: LossTerms  # detached
    grad_norm: torch.Tensor  # before clipping
    finite: torch.Tensor  # False: the update was refused
    n_frames: int  # output frames in the batch
    learning_rate: float  # of this update; day layers have their own


@dataclass
class Health:
    """Updates refused because the loss or its gradient was not finite."""

    refused_total: int = 0
    refused_in_a_row: int = 0  # the longest run of them since this was asked before
    last_refused_step: int = -1  # none


class TrainStep:
    """Everything that changes the weights, and what must survive a restart besides them.

    Args:
        model: on `device`.
        config: augmentation, objective, seeds, precision, rates, clipping, averaging.
        device: where the model is.
        rank: this process among those that share a batch; decides its noise and dropout.
        after_backward: called with the batch between backward and clipping, e.g. to sum
            gradients over ranks and to give absent day layers a zero gradient.
        on_every_rank: whether a bool scalar on the device is true on every rank, as one more such
            scalar; by default there is one rank.
    """

    def __init__(
        self,
        model: GRUDecoder,
        config: TrainingConfig,
        device: torch.device,
        *,
        rank: int = 0,
        after_backward: Callable[[Batch], None] | None = None,
        on_every_rank: Callable[[torch.Tensor], torch.Tensor] = lambda flag: flag,
    ) -> None:
        self.model = model
        self.augmentation = Augmentation(config.dataset.data_transforms)
        self.objective = JointObjective(config)
        self.optimizer = build_optimizer(model, config)
        self.config = config
        self.device = device
        self.rank = rank
        self.after_backward = after_backward
        self.on_every_rank = on_every_rank
        self.amp_dtype = autocast_dtype(config, device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.scale: torch.Tensor | None = None  # of the loss
        self.good_steps = torch.tensor(0, device=device)  # since the scale changed
        if self.amp_dtype == torch.float16:
            self.scale = torch.tensor(INITIAL_SCALE, device=device)
        self.average: list[torch.Tensor] | None = None  # begins with the first step
        self._health, self._refused_up_to_now = Health(), 0
        self._refused: list[tuple[int, torch.Tensor]] = []  # by step, not looked at yet

    def __call__(
        self,
        batch: Batch,
        step: int,
        global_batch_size: int | None = None,
        bins_over_mean: float = 1.0,
    ) -> StepResult:
        """Train on `batch` (features and labels on the device, lengths and days on the CPU).

        Args:
            batch: this rank's share of the batch.
            step: global step; decides the rates and, with seed and rank, noise, cuts, dropout.
            global_batch_size: trials in the batch over all ranks, if there are several.
            bins_over_mean: see `BatchPlan`; the norm at which gradients are clipped follows it.
        """
        self.begin_average()
        terms, n_frames = self.backward(batch, step, self.objective.alpha(step), global_batch_size)
        # An infinite loss can have a finite gradient (a trial without frames): let it show there,
        # before gradients are summed over ranks, so that every rank refuses the same steps.
        *_, classifier_bias = self.model.out.parameters()
        if classifier_bias.grad is not None:
            classifier_bias.grad.add_(terms.total * 0)
        if self.after_backward is not None:
            self.after_backward(batch)
        norm, finite, divisor = clip_and_check(
            self.parameters,
            self.config.grad_norm_clip_value * bins_over_mean,
            1.0 if self.scale is None else self.scale,
        )
        set_learning_rates(self.optimizer, self.config, step)
        apply_update(self.optimizer, divisor, ~finite)
        self._refused.append((step, ~finite & ~self._adapt_scale(finite, terms.total)))
        self._update_average(step)
        rate = self.optimizer.param_groups[-1]["lr"]
        return StepResult(terms, norm, finite, n_frames, rate)

    def backward(
        self, batch: Batch, step: int, alpha: float, global_batch_size: int | None = None
    ) -> tuple[LossTerms, int]:
        """Give the weights a batch's gradients, and nothing else another value.

        Args:
            alpha: weight of the phoneme term.

        Returns:
            (the loss, detached; the batch's output frames).

        Raises:
            TrainingError: cuDNN refused or failed.
        """
        self.model.train()
        generator = step_generator(self.device, self.config.seed, step, self.rank)
        torch.manual_seed(generator.initial_seed())  # dropout
        features, n_time_steps = self.augmentation(batch.features, batch.n_time_steps, generator)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with self.autocast():
                logits, packing, _ = self.model.packed_logits(
                    features, batch.day_indices, n_time_steps
                )
            terms = self.objective(logits, packing, batch, alpha, global_batch_size)
            (terms.total if self.scale is None else terms.total * self.scale).backward()
        except RuntimeError as error:
            text = " ".join(str(error).split())[:300]
            if "cudnn" not in text.lower():
                raise
            raise TrainingError(
                f"cuDNN failed in a training step ({text}): start again with another precision, "
                "--amp_dtype float16 or --use_amp false."
            ) from error
        terms.total = terms.total.detach()  # lets go of the graph
        return terms, int(packing.frame_lengths.sum())

    def autocast(self) -> torch.autocast:
        """The forward pass's precision, for training and validation alike."""
        return torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        )

    def health(self) -> Health:
        """Refused updates so far; waits for the device, so do not ask at every step."""
        self._look_at_refusals()
        asked = self._health
        self._health = replace(asked, refused_in_a_row=0)
        return asked

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within it the model has the averaged weights; its own where there are none."""
        if self.average is None:
            yield
            return
        current = [p.detach().clone() for p in self.parameters]
        values = [p.data for p in self.parameters]
        torch._foreach_copy_(values, self.average)
        try:
            yield
        finally:
            torch._foreach_copy_(values, current)

    def state_dict(self) -> dict[str, Any]:
        """Counters, loss scale and averaged weights; model and optimiser have theirs."""
        self._look_at_refusals()
        state: dict[str, Any] = {"health": asdict(self._health), "refused": self._refused_up_to_now}
        if self.scale is not None:
            state |= {"scale": self.scale.clone(), "good_steps": self.good_steps.clone()}
        if self.average is not None:
            state["average"] = [value.clone() for value in self.average]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; what this configuration does not use is left out."""
        self._health, self._refused_up_to_now = Health(**state["health"]), state["refused"]
        if self.scale is not None and "scale" in state:
            self.scale.copy_(state["scale"])
            self.good_steps.copy_(state["good_steps"])
        if self.config.ema_decay > 0 and "average" in state:
            self.average = [
                saved.to(parameter.device, copy=True)
                for parameter, saved in zip(self.parameters, state["average"], strict=True)
            ]

    def _look_at_refusals(self) -> None:
        flags = torch.stack([flag for _, flag in self._refused]).tolist() if self._refused else []
        health = self._health
        for (step, _), refused in zip(self._refused, flags, strict=True):
            self._refused_up_to_now = self._refused_up_to_now + 1 if refused else 0
            health.refused_in_a_row = max(health.refused_in_a_row, self._refused_up_to_now)
            health.refused_total += refused
            health.last_refused_step = step if refused else health.last_refused_step
        self._refused.clear()

    def _adapt_scale(self, finite: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """Whether a smaller loss scale may cure what is not finite; halves or doubles the scale."""
        if self.scale is None:
            return torch.zeros_like(finite)
        # no scale makes a finite loss of one that is not: that is the batch's or the model's
        too_large = ~finite & self.on_every_rank(torch.isfinite(loss))
        curable = too_large & (self.scale > 1)
        good = torch.where(finite, self.good_steps + 1, 0)
        grown = good == GROWTH_INTERVAL
        factor = torch.where(too_large, 0.5, torch.where(grown, 2.0, 1.0))
        self.scale.mul_(factor).clamp_(min=2.0**-14)
        self.good_steps.copy_(torch.where(grown, 0, good))
        return curable

    def begin_average(self) -> None:
        """From the weights of now: by the first step those of a checkpoint are loaded."""
        if self.average is None and self.config.ema_decay > 0:
            self.average = [p.detach().clone() for p in self.parameters]

    def _update_average(self, step: int) -> None:
        if self.average is None:
            return
        # a young average follows faster, so that it does not remember the initial weights
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)


def largest_batch(step: TrainStep, batch_size: int, n_bins: int, n_labels: int) -> int:
    """The largest batch of trials this long that fits the memory, found by trying.

    Runs forward and backward on zeros, with both loss terms where both take part, beside all that a
    real step finds in memory, halving the batch while memory runs out; weights, optimizer and
    counters are left as they were.

    Returns:
        `batch_size` if it fits, else the first smaller size (by halves) that does; 0 if none.
    """
    fits = batch_size
    while fits > 0:
        try:
            _try(step, fits, n_bins, n_labels)
            break
        except torch.OutOfMemoryError:
            fits //= 2
        finally:
            step.optimizer.zero_grad(set_to_none=True)
    if step.device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


def _try(step: TrainStep, batch_size: int, n_bins: int, n_labels: int) -> None:
    model, n_time_steps = step.model, torch.full((batch_size,), n_bins)
    n_labels = min(n_labels, max(int(model.frame_lengths(n_time_steps)[0]) // 2, 1))
    labels, lengths = torch.ones(batch_size, n_labels).long(), torch.full((batch_size,), n_labels)
    batch = Batch(
        step=0,
        features=torch.zeros(batch_size, n_bins, model.neural_dim),
        n_time_steps=n_time_steps,
        labels=labels,
        label_lengths=lengths,
        phoneme_labels=labels,
        phoneme_lengths=lengths,
        day_indices=torch.arange(batch_size) * model.n_days // batch_size,
        trial_indices=torch.arange(batch_size),
    ).to(step.device)
    step.begin_average()
    beside = [torch.empty_like(batch.features)]  # the next batch travels
    for parameter in step.parameters:
        if parameter not in step.optimizer.state:  # AdamW's moments are still to come
            beside += [torch.empty_like(parameter) for _ in range(2)]
    step.backward(batch, 0, 0.5 if step.objective.is_joint else 0.0)
    del beside
