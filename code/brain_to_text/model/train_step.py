"""One training step: augment, forward, loss, backward, clip, update.

No value that was computed is read back in it, so nothing here makes the host wait for the device;
torch's own CTC on a GPU would (see `gpu_ctc`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
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


@dataclass(frozen=True)
class Health:
    """Updates refused because the loss or its gradient was not finite."""

    refused_total: int
    refused_in_a_row: int  # the longest run of them since this was asked before
    last_refused_step: int  # -1: none


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
        self.amp_dtype = autocast_dtype(config, self.device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._state: dict[str, torch.Tensor] = {
            "refused": self._count(0),
            "refused_in_a_row": self._count(0),
            "longest_in_a_row": self._count(0),  # since `health` was asked
            "last_refused_step": self._count(-1),
        }
        if self.amp_dtype == torch.float16:
            self._state["scale"] = torch.tensor(INITIAL_SCALE, device=self.device)
            self._state["good_steps"] = self._count(0)
        self.average: list[torch.Tensor] | None = None  # begins with the first step

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
        if batch.features.device != self.device:
            batch = batch.to(self.device)
        self.begin_average()
        self.model.train()
        generator = step_generator(self.device, self.config.seed, step, self.rank)
        torch.manual_seed(generator.initial_seed())  # dropout
        features, n_time_steps = self.augmentation(batch.features, batch.n_time_steps, generator)
        scale = self._state.get("scale")
        self.optimizer.zero_grad(set_to_none=True)
        with explained_cudnn_errors():
            with self.autocast():
                logits, packing, _ = self.model.packed_logits(
                    features, batch.day_indices, n_time_steps
                )
            terms = self.objective(logits, packing, batch, step, global_batch_size)
            (terms.total if scale is None else terms.total * scale).backward()
        # An infinite loss can have a finite gradient (a trial without frames): let it show there,
        # before gradients are summed over ranks, so that every rank refuses the same steps.
        *_, classifier_bias = self.model.out.parameters()
        if classifier_bias.grad is not None:
            classifier_bias.grad.add_(terms.total.detach() * 0)
        if self.after_backward is not None:
            self.after_backward(batch)
        norm, finite, divisor = clip_and_check(
            self.parameters,
            self.config.grad_norm_clip_value * bins_over_mean,
            1.0 if scale is None else scale,
        )
        set_learning_rates(self.optimizer, self.config, step)
        apply_update(self.optimizer, divisor, ~finite)
        terms.total = terms.total.detach()  # lets go of the graph
        self._count_refusals(finite, terms.total, step)
        self._update_average(step)
        return StepResult(
            terms=terms,
            grad_norm=norm,
            finite=finite,
            n_frames=int(packing.frame_lengths.sum()),
            learning_rate=self.optimizer.param_groups[-1]["lr"],
        )

    def autocast(self) -> torch.autocast:
        """The forward pass's precision, for training and validation alike."""
        return torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        )

    def health(self) -> Health:
        """Refused updates so far; waits for the device, so do not ask at every step."""
        state = self._state
        names = ("refused", "longest_in_a_row", "last_refused_step")
        health = Health(*torch.stack([state[name] for name in names]).tolist())
        state["longest_in_a_row"].zero_()
        return health

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within it the model has the averaged weights; its own where there are none."""
        if self.average is None:
            yield
            return
        own = [p.detach().clone() for p in self.parameters]
        values = [p.data for p in self.parameters]
        torch._foreach_copy_(values, self.average)
        try:
            yield
        finally:
            torch._foreach_copy_(values, own)

    def state_dict(self) -> dict[str, Any]:
        """Counters, loss scale and averaged weights; model and optimiser have theirs."""
        state: dict[str, Any] = {name: value.clone() for name, value in self._state.items()}
        if self.average is not None:
            state["average"] = [value.clone() for value in self.average]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; what this configuration does not use is left out."""
        for name, value in self._state.items():
            if name in state:
                value.copy_(state[name])
        if self.config.ema_decay > 0 and "average" in state:
            self.average = [
                saved.to(parameter.device, copy=True)
                for parameter, saved in zip(self.parameters, state["average"], strict=True)
            ]

    def _count(self, value: int) -> torch.Tensor:
        return torch.tensor(value, device=self.device)

    def _count_refusals(self, finite: torch.Tensor, loss: torch.Tensor, step: int) -> None:
        """Count a refused update, unless the loss scale alone is to blame; adapt the scale."""
        state, refused = self._state, ~finite
        overflow = torch.zeros_like(refused)
        if "scale" in state:
            # no scale makes a finite loss of one that is not: that is the batch's or the model's
            too_large = refused & self.on_every_rank(torch.isfinite(loss))
            overflow = too_large & (state["scale"] > 1)
            good = torch.where(finite, state["good_steps"] + 1, 0)
            grown = good == GROWTH_INTERVAL
            factor = torch.where(too_large, 0.5, torch.where(grown, 2.0, 1.0))
            state["scale"].mul_(factor).clamp_(min=2.0**-14)
            state["good_steps"].copy_(torch.where(grown, 0, good))
        counted = refused & ~overflow
        last = state["last_refused_step"]
        last.copy_(torch.where(counted, step, last))
        state["refused"].add_(counted)
        in_a_row = state["refused_in_a_row"].add_(1).mul_(counted)
        torch.maximum(state["longest_in_a_row"], in_a_row, out=state["longest_in_a_row"])

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


@contextmanager
def explained_cudnn_errors() -> Iterator[None]:
    """Within it an error of cuDNN names the settings that may avoid it.

    Raises:
        TrainingError: cuDNN refused or failed.
    """
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        if "cudnn" not in text.lower():
            raise
        raise TrainingError(
            f"cuDNN failed in a training step ({text}): start again with another precision, "
            "--amp_dtype float16 or --use_amp false."
        ) from error


def largest_batch(step: TrainStep, batch_size: int, n_bins: int, n_labels: int) -> int:
    """The largest batch of trials this long that fits the memory, found by trying.

    Runs forward and backward on zeros at the costliest step of the objective's schedule, beside all
    that a real step finds in memory, halving the batch while memory runs out; weights, optimizer
    and counters are left as they were.

    Returns:
        `batch_size` if it fits, else the first smaller size (by halves) that does; 0 if none.
    """
    fits = batch_size
    while fits > 0:
        try:
            _forward_and_backward(step, fits, n_bins, n_labels)
            break
        except torch.OutOfMemoryError:
            fits //= 2
        finally:
            step.optimizer.zero_grad(set_to_none=True)
    if step.device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


def _forward_and_backward(step: TrainStep, batch_size: int, n_bins: int, n_labels: int) -> None:
    model, device = step.model, step.device
    n_time_steps = torch.full((batch_size,), n_bins)
    n_labels = min(n_labels, max(int(model.frame_lengths(n_time_steps)[0]) // 2, 1))
    labels = torch.ones(batch_size, n_labels, dtype=torch.int64, device=device)
    lengths = torch.full((batch_size,), n_labels)
    batch = SimpleNamespace(
        labels=labels, label_lengths=lengths, phoneme_labels=labels, phoneme_lengths=lengths
    )
    step.begin_average()
    features = torch.zeros(batch_size, n_bins, model.neural_dim, device=device)
    held = [*_moments_to_come(step), torch.empty_like(features)]  # the next batch travels
    days = torch.arange(batch_size) * model.n_days // batch_size
    model.train()
    generator = step_generator(device, step.config.seed, 0, step.rank)
    features, n_time_steps = step.augmentation(features, n_time_steps, generator)
    with step.autocast():
        logits, packing, _ = model.packed_logits(features, days, n_time_steps)
    costliest = step.objective.costliest_step(step.config.num_training_batches)
    terms = step.objective(logits, packing, batch, costliest)
    terms.total.backward()
    del held


def _moments_to_come(step: TrainStep) -> list[torch.Tensor]:
    """Room for AdamW's two moments of every parameter that has none yet."""
    new = [p for p in step.parameters if p not in step.optimizer.state]
    return [torch.empty_like(p) for p in new for _ in range(2)]
