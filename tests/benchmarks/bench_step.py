"""Time a training step: a plain eager rendering of the recipe against this library, in one run.

    python tests/benchmarks/bench_step.py                          # phases and whole step
    python tests/benchmarks/bench_step.py --config code/rnn_args_diphone_sagemaker.yaml
    python tests/benchmarks/bench_step.py --device cuda --units 1024 --batch-size 48
    python tests/benchmarks/bench_step.py --with-data              # trials streamed, cache warm
    python tests/benchmarks/bench_step.py --sweep                  # batch sizes x lengths
    python tests/benchmarks/bench_step.py --classes 41,1681        # cost of 1681 classes
    python tests/benchmarks/bench_step.py --validation 1426        # against the per-trial loop
    python tests/benchmarks/bench_step.py --compile                # eager against torch.compile
    python tests/benchmarks/bench_step.py --counts                 # launches, waits, copies, memory
    python tests/benchmarks/bench_step.py --project                # hours and cost per instance

Options override the configuration's values; a schedule of the phoneme weight becomes its last
value. Contenders take turns; a figure is the median over rounds of the time with everything that
was started also finished. Trials are noise: a step's time does not depend on what is in it.
float32 is float32 in both contenders unless --tf32 is given.
"""

# ruff: noqa: E402  (the library's folder comes first on the path)

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "code"), str(HERE.parent), str(HERE)]

from brain_to_text.config import TrainingConfig
from brain_to_text.config_reader import load_config
from brain_to_text.dataset.hdf5_writer import TrialContents, data_file_bytes
from brain_to_text.dataset.indexing import index_dataset
from brain_to_text.gpus import (
    GPUS,
    OLDEST_CAPABILITY,
    known_as,
    n_frames,
    step_time,
    training_flops,
)
from brain_to_text.labels.diphones import encode_diphones
from brain_to_text.launch.pricing import table as instance_table
from brain_to_text.model.augmentations import Augmentation, step_generator
from brain_to_text.model.device import allow_tf32, autocast_dtype, peak_flops
from brain_to_text.model.losses import JointObjective
from brain_to_text.model.optimizer import (
    apply_update,
    build_optimizer,
    clip_and_check,
)
from brain_to_text.model.rnn_model import GRUDecoder, load_public_state_dict
from brain_to_text.model.train_step import TrainStep
from brain_to_text.scoring.decoding import evaluate
from brain_to_text.storage.store import open_store
from brain_to_text.streaming.batch import Batch
from brain_to_text.streaming.dataset_s3 import BrainToTextDatasetS3
from brain_to_text.streaming.trial_stream import TrialStream
from plain_recipe import PlainDecoder, PlainStep

STEPS_OF_A_RUN = 150_000
MEAN_BINS, LABELS_PER_BIN = 850, 58 / 850  # mean trial of the public dataset, self-loop labels
N_SESSIONS = 4
CLOCK = time.perf_counter  # --cpu-time: this process's CPU seconds, for machines that are shared


def trial_lengths(
    config: TrainingConfig, count: int, bins: int, lengths: str, random: np.random.Generator
) -> np.ndarray:
    """Bins of each trial: all equal, or lognormal around the mean `bins`."""
    if lengths == "equal":
        return np.full(count, bins)
    sigma = 0.35  # 5th to 95th percentile: 0.53 to 1.67 of the mean
    drawn = bins * random.lognormal(-(sigma**2) / 2, sigma, count)
    return np.clip(drawn, config.model.patch_size * 4, None).astype(np.int64)


def synthetic_batch(
    config: TrainingConfig, bins: int, lengths: str, seed: int, device: torch.device
) -> Batch:
    """Trials of `bins` bins each ('equal'), or lognormal with that mean ('spread')."""
    random = np.random.default_rng(seed)
    B, C = config.dataset.batch_size, config.width
    n = trial_lengths(config, B, bins, lengths, random)
    n_labels = np.maximum(1, (n * LABELS_PER_BIN).astype(np.int64))
    features = torch.zeros(B, int(n.max()), C)
    labels = torch.zeros(B, int(n_labels.max()), dtype=torch.int64)
    phonemes = labels.clone()
    for trial in range(B):
        features[trial, : n[trial]] = torch.from_numpy(
            random.standard_normal((n[trial], C), dtype=np.float32)
        )
        length = n_labels[trial]
        labels[trial, :length] = torch.from_numpy(
            random.integers(1, config.dataset.n_classes, length)
        )
        phonemes[trial, : max(length // 2, 1)] = torch.from_numpy(
            random.integers(1, 41, max(length // 2, 1))
        )
    return Batch(
        step=seed,
        features=features,
        n_time_steps=torch.from_numpy(n),
        labels=labels,
        label_lengths=torch.from_numpy(n_labels),
        phoneme_labels=phonemes,
        phoneme_lengths=torch.from_numpy(np.maximum(n_labels // 2, 1)),
        day_indices=torch.arange(B) * N_SESSIONS // B,
        trial_indices=torch.arange(B),
    ).to(device)


class Ours:
    """This library's step, whole (`TrainStep`) and in phases."""

    def __init__(self, config: TrainingConfig, device: torch.device, weights=None) -> None:
        self.config, self.device = config, device
        self.model = GRUDecoder.from_config(config, N_SESSIONS, for_training=True).to(device)
        if weights is not None:
            load_public_state_dict(self.model, weights)
        self.augmentation = Augmentation(config.dataset.data_transforms)
        self.objective = JointObjective.from_config(config)
        self.optimizer = build_optimizer(self.model, config, device)
        self.step = TrainStep(
            self.model,
            self.augmentation,
            self.objective,
            self.optimizer,
            config,
            device,
        )
        self.augmentation = self.step.augmentation

    def whole(self, batch: Batch, k: int) -> None:
        self.step(batch, k)

    def phases(self, batch: Batch, k: int, mark: Callable[[str], None]) -> None:
        model = self.model.train()
        generator = step_generator(self.device, self.config.seed, k)
        mark("")
        x, n = self.augmentation(
            batch.features, batch.n_time_steps, training=True, generator=generator
        )
        mark("augment")
        with self.step.autocast():
            frames, packing = model.input_frames(x, batch.day_indices, n)
            mark("day layer, patches")
            hidden = model.recurrent_frames(frames, packing)
            mark("GRU")
            logits = model.out(hidden)
        mark("classifier")
        terms = self.objective(logits, batch, model.frame_lengths(n), k)
        mark("loss")
        self.optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        mark("backward")
        _, finite, divisor = clip_and_check(self.step.parameters, 10.0)
        apply_update(self.optimizer, divisor, ~finite)
        mark("clip, optimiser")


class Plain:
    """The plain rendering, whole and in the same phases."""

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self.device = device
        self.model = PlainDecoder(config, N_SESSIONS).to(device)
        self.step = PlainStep(self.model, config, device)
        self.dtype = autocast_dtype(config, device)

    def whole(self, batch: Batch, k: int) -> None:
        self.step.training_step(batch, self.dtype)

    def phases(self, batch: Batch, k: int, mark: Callable[[str], None]) -> None:
        step, model = self.step, self.model.train()
        mark("")
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            x, n = step.augment(batch.features, batch.n_time_steps)
            mark("augment")
            frames = model.patches(model.day_layer(x, batch.day_indices))
            mark("day layer, patches")
            hidden = model.recurrent(frames)
            mark("GRU")
            logits = model.out(hidden)
            mark("classifier")
            loss = step.loss(logits, batch, step.frames(n))
            mark("loss")
        step.optimizer.zero_grad()
        loss.backward()
        mark("backward")
        step.update()
        mark("clip, optimiser")


class InMemory:
    """Batches that are already there, as a dataset gives them."""

    manifest = SimpleNamespace(label_form="self_loop")

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches

    def batches(self) -> AbstractContextManager[list[Batch]]:
        return nullcontext(self._batches)


class Stopwatch:
    """Seconds per phase, by name, over rounds; waits for the device at every mark."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, {}
        self.last = 0.0

    def __call__(self, name: str) -> None:
        finish(self.device)
        now = CLOCK()
        if name:
            self.times.setdefault(name, []).append(now - self.last)
        self.last = now


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    finish(device)
    started = CLOCK()
    work()
    finish(device)
    return CLOCK() - started


def alternate(
    contenders: dict[str, Callable[[int], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each contender, taking turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for k in range(rounds + 1):
        for name, work in contenders.items():
            seconds = timed(lambda: work(k), device)  # noqa: B023
            if k:
                times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, ["-" * w for w in widths], *rows]:
        print(
            "  ".join(
                cell.rjust(w) if i else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def compare_step(config: TrainingConfig, args: argparse.Namespace, device: torch.device) -> float:
    """Both contenders' phases and whole step; returns the seconds of ours."""
    plain, ours = Plain(config, device), Ours(config, device)
    batches = [synthetic_batch(config, args.bins, args.lengths, seed, device) for seed in range(3)]
    whole = alternate(
        {
            "plain": lambda k: plain.whole(batches[k % 3], k),
            "ours": lambda k: ours.whole(batches[k % 3], k),
        },
        args.rounds,
        device,
    )
    watches = {"plain": Stopwatch(device), "ours": Stopwatch(device)}
    for k in range(args.rounds + 1):
        if k == 1:
            for watch in watches.values():
                watch.times.clear()
        plain.phases(batches[k % 3], k, watches["plain"])
        ours.phases(batches[k % 3], k, watches["ours"])
    rows = []
    for name in watches["ours"].times:
        p, o = (statistics.median(watches[w].times[name]) for w in ("plain", "ours"))
        rows.append([name, f"{p * 1e3:.1f}", f"{o * 1e3:.1f}", f"{p / o:.2f}"])
    p, o = whole["plain"], whole["ours"]
    rows.append(["whole step", f"{p * 1e3:.1f}", f"{o * 1e3:.1f}", f"{p / o:.2f}"])
    table("Step, ms", ["phase", "plain", "ours", "plain / ours"], rows)
    bins = [b.n_time_steps.tolist() for b in batches]
    frames = [sum(n_frames(config, n) for n in batch) for batch in bins]
    flops = statistics.mean(
        training_flops(config, sum(b), f) for b, f in zip(bins, frames, strict=True)
    )
    print(f"{flops / 1e12:.3f} TFLOP per step; ours {flops / o / 1e12:.3f} TFLOP/s", end="")
    peak = peak_flops(device, config)
    print(f", MFU {100 * flops / o / peak:.1f} %" if peak else "")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB (both)")
    return o


def write_sessions(folder: Path, config: TrainingConfig, args: argparse.Namespace) -> None:
    """SESSION/data_train.hdf5 for `N_SESSIONS` sessions, two batches of trials in all."""
    random = np.random.default_rng(0)
    per_session = -(-2 * config.dataset.batch_size // N_SESSIONS)
    for number in range(N_SESSIONS):
        session = f"t15.2023.08.{10 + number}"
        trials = []
        for i, n in enumerate(trial_lengths(config, per_session, args.bins, args.lengths, random)):
            phonemes = random.integers(1, 40, max(int(n * LABELS_PER_BIN) // 2, 1)).astype(np.int32)
            diphones = config.dataset.n_classes == 1681
            features = random.standard_normal((n, config.width), dtype=np.float32)
            labels = encode_diphones(phonemes) if diphones else phonemes
            trials.append(
                TrialContents(
                    f"trial_{i:04d}",
                    session,
                    1,
                    i,
                    features,
                    labels,
                    phonemes if diphones else None,
                    "noise",
                )
            )
        (folder / session).mkdir()
        (folder / session / "data_train.hdf5").write_bytes(data_file_bytes(trials))


def with_data(config: TrainingConfig, args: argparse.Namespace, device: torch.device) -> float:
    """Steps as a run makes them, from `next` on the dataset to the update; returns their seconds.

    Trials lie in a folder and, from the warm-up on, in the cache in RAM. Nothing waits for
    the device between two steps, so that preparing and copying batches may overlap computing.
    """
    config = copy.deepcopy(config)
    config.dataset.days_per_batch = min(config.dataset.days_per_batch, N_SESSIONS)
    config.dataset.must_include_days = None
    ours, steps = Ours(config, device), args.rounds
    with tempfile.TemporaryDirectory() as folder:
        write_sessions(Path(folder), config, args)
        store = open_store(folder)
        manifest = index_dataset(store)
        everything = sum(trial.length for trial in manifest.trials)
        config.dataset.cache_gb = 2 * everything / 1e9
        stream = TrialStream.from_config(store, manifest, config.dataset)
        sessions = sorted({trial.session for trial in manifest.trials})
        by_session = [
            np.array([i for i, trial in enumerate(manifest.trials) if trial.session == session])
            for session in sessions
        ]
        dataset = BrainToTextDatasetS3.from_config(stream, by_session, config, device=device)
        warm_up = max(steps // 4, 8)  # most trials have come up by then

        def loop(batches: Iterator[Batch], n: int) -> Callable[[], None]:
            def run() -> None:
                for k in range(n):
                    ours.whole(next(batches), k)

            return run

        rows: list[list[str]] = []
        seconds: list[float] = []
        with dataset.batches() as batches:
            loop(batches, warm_up)()
            for _ in range(3):
                before = stream.stats.snapshot()
                seconds.append(timed(loop(batches, steps), device) / steps)
                traffic = stream.stats.snapshot() - before
                rows.append(
                    [
                        "streamed",
                        f"{seconds[-1] * 1e3:.1f}",
                        f"{config.dataset.batch_size / seconds[-1]:.1f}",
                        f"{100 * traffic.wait_seconds / (seconds[-1] * steps):.1f}",
                        f"{100 * traffic.hit_rate:.0f}",
                    ]
                )
            kept = [next(batches) for _ in range(3)]
        alone = timed(loop(iter(kept * steps), steps), device) / steps
        rows.append(["in memory", f"{alone * 1e3:.1f}", f"{config.dataset.batch_size / alone:.1f}"])
        rows[-1] += ["-", "-"]
        dataset.close()
    table(
        f"Steps with their data, means over {steps} steps after {warm_up}",
        ["batches", "ms", "trials/s", "% waiting for data", "% of trials in the cache"],
        rows,
    )
    return statistics.median(seconds)


def compare_classes(config: TrainingConfig, args: argparse.Namespace, device) -> None:
    contenders = {}
    for n_classes in (int(c) for c in args.classes.split(",")):
        variant = copy.deepcopy(config)
        variant.dataset.n_classes = n_classes
        if n_classes != 1681:
            variant.objective.phoneme_weight = 0.0
        ours = Ours(variant, device)
        batch = synthetic_batch(variant, args.bins, args.lengths, 0, device)
        contenders[f"{n_classes} classes"] = lambda k, o=ours, b=batch: o.whole(b, k)
    times = alternate(contenders, args.rounds, device)
    least = min(times.values())
    table(
        "Cost of classes (ours)",
        ["classes", "ms", "ratio"],
        [[name, f"{t * 1e3:.1f}", f"{t / least:.3f}"] for name, t in times.items()],
    )


def sweep(config: TrainingConfig, args: argparse.Namespace, device) -> None:
    rows = []
    for batch_size in (args.batch_size,) if args.batch_size else (8, 16, 32, 64):
        for bins in (args.bins,) if args.given_bins else (400, 850, 1800):
            variant = copy.deepcopy(config)
            variant.dataset.batch_size = batch_size
            batch = synthetic_batch(variant, bins, args.lengths, 0, device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            contenders = {}
            ours = Ours(variant, device)
            contenders["ours"] = lambda k, o=ours, b=batch: o.whole(b, k)
            if not args.ours_only:
                plain = Plain(variant, device)
                contenders["plain"] = lambda k, p=plain, b=batch: p.whole(b, k)
            times = alternate(contenders, args.rounds, device)
            seconds = times["ours"]
            memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0
            rows.append(
                [
                    f"{batch_size} x {bins}",
                    f"{times.get('plain', float('nan')) * 1e3:.1f}",
                    f"{seconds * 1e3:.1f}",
                    f"{times.get('plain', float('nan')) / seconds:.2f}",
                    f"{batch_size / seconds:.1f}",
                    f"{memory:.2f}" if memory else "-",
                ]
            )
    table(
        "Batch size x bins",
        ["batch", "plain ms", "ours ms", "plain / ours", "trials/s (ours)", "peak GB"],
        rows,
    )


def compare_validation(config: TrainingConfig, args: argparse.Namespace, device) -> None:
    """Scoring `--validation` trials: batched against one trial at a time, same weights."""
    ours, plain = Ours(config, device), Plain(config, device)
    plain.model.load_state_dict(ours.model.state_dict())
    n, size = args.validation, config.dataset.batch_size
    batches, trials = [], []
    lengths_first = copy.deepcopy(config)
    lengths_first.dataset.batch_size = n
    everything = synthetic_batch(lengths_first, args.bins, args.lengths, 0, torch.device("cpu"))
    order = torch.argsort(everything.n_time_steps)
    for rows in order.split(size):
        batches.append(take(everything, rows, device))
    for row in order.split(1):
        trials.append(take(everything, row, device))

    def batched() -> float:
        sessions = [str(i) for i in range(N_SESSIONS)]
        result = evaluate(
            ours.model,
            ours.augmentation,
            InMemory(batches),  # type: ignore[arg-type]
            sessions,
            autocast=ours.step.autocast,
        )
        assert result is not None
        return result.der

    def one_by_one() -> float:
        plain.model.eval()
        edits = labels = 0
        step = plain.step
        with torch.no_grad():
            for trial in trials:
                x, n_time_steps = step.augment(trial.features, trial.n_time_steps, training=False)
                logits = plain.model(x, trial.day_indices)
                frames = step.frames(n_time_steps)
                step.loss(logits, trial, frames).item()
                best = torch.unique_consecutive(logits[0, : frames[0]].argmax(-1))
                decoded = [c for c in best.tolist() if c != 0]
                reference = trial.labels[0, : trial.label_lengths[0]].tolist()
                edits += levenshtein(reference, decoded)
                labels += len(reference)
                if config.dataset.n_classes == 1681:
                    probs = logits.float().softmax(-1)
                    marginal = torch.stack([probs[..., c::41].sum(-1) for c in range(41)], -1)
                    best = torch.unique_consecutive(marginal[0, : frames[0]].argmax(-1))
                    reference = trial.phoneme_labels[0, : trial.phoneme_lengths[0]].tolist()
                    levenshtein(reference, [c for c in best.tolist() if c != 0])
        return edits / labels

    ders = {}

    def one() -> None:
        ders["one"] = one_by_one()

    def all_together() -> None:
        ders["batched"] = batched()

    everything_once = batches, trials  # compiling and choosing kernels is not scoring
    batches, trials = batches[:1], trials[:3]
    one()
    all_together()
    batches, trials = everything_once
    slow, fast = timed(one, device), timed(all_together, device)
    table(
        f"Validation of {n} trials",
        ["way", "s", "DER"],
        [
            ["one trial at a time", f"{slow:.2f}", f"{ders['one']:.4f}"],
            ["batched", f"{fast:.2f}", f"{ders['batched']:.4f}"],
            ["ratio", f"{slow / fast:.2f}", ""],
        ],
    )


def levenshtein(reference: list[int], decoded: list[int]) -> int:
    """Edit distance as one writes it in Python."""
    row = list(range(len(decoded) + 1))
    for i, a in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(decoded, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def take(batch: Batch, rows: torch.Tensor, device: torch.device) -> Batch:
    """The trials `rows` of a CPU batch, cut to their own longest."""
    bins = int(batch.n_time_steps[rows].max())
    return Batch(
        step=0,
        features=batch.features[rows, :bins],
        n_time_steps=batch.n_time_steps[rows],
        labels=batch.labels[rows],
        label_lengths=batch.label_lengths[rows],
        phoneme_labels=batch.phoneme_labels[rows],
        phoneme_lengths=batch.phoneme_lengths[rows],
        day_indices=batch.day_indices[rows],
        trial_indices=batch.trial_indices[rows],
    ).to(device)


def project(
    config: TrainingConfig, args: argparse.Namespace, measured: tuple[str, float] | None
) -> None:
    """Hours and cost of 150,000 steps on one GPU of every instance type that the image supports.

    From `gpus.step_time`, an estimate; where the step was `measured` (GPU, seconds) in this run,
    from that too, on the types that have this GPU.
    """
    tables = instance_table()
    rows = []
    for instance, row in tables["types"].items():
        gpu, price = row["gpu"], row["usd_per_hour"]
        if gpu is None or GPUS[gpu].capability < OLDEST_CAPABILITY:
            continue
        parts = step_time(config, GPUS[gpu])
        cells = [instance, f"1 of {row['gpus']} {gpu}", GPUS[gpu].half]
        cells += [f"{seconds * 1e3:.0f}" for seconds in vars(parts).values()]
        steps: list[float | None] = [parts.total]
        if measured is not None:
            steps.append(measured[1] if measured[0] == gpu else None)
        for seconds in steps:
            if seconds is None:
                cells += ["-", "-", "-"]
                continue
            hours = STEPS_OF_A_RUN * seconds / 3600
            cost = "-" if price is None else f"{hours * price:.0f}"
            cells += [f"{seconds * 1e3:.0f}", f"{hours:.1f}", cost]
        rows.append(cells)
    columns = ["ms", "hours", "$"]
    table(
        f"{STEPS_OF_A_RUN} steps: estimated ms of products, recurrence, memory and launches, "
        "together"
        + ("" if measured is None else f", and as measured in this run on {measured[0]}")
        + f"; prices of whole instances from {tables['prices_collected']}, not verified",
        ["instance", "GPU", "type", "products", "recurrence", "memory", "launches", *columns]
        + (columns if measured else []),
        rows,
    )


def compare_compile(config: TrainingConfig, args: argparse.Namespace, device) -> None:
    """torch.compile around the GRU: on, off; with a new length at every step."""
    contenders = {}
    for choice in ("false", "true"):
        variant = copy.deepcopy(config)
        variant.compile = choice
        ours = Ours(variant, device)
        batches = [
            synthetic_batch(variant, args.bins + 7 * i, args.lengths, i, device)
            for i in range(args.rounds + 1)
        ]
        contenders[f"compile: {choice}"] = lambda k, o=ours, b=batches: o.whole(b[k], k)
    for name, seconds in alternate(contenders, args.rounds, device).items():
        print(f"{name}: {seconds * 1e3:.1f} ms")


def count_step(config: TrainingConfig, args: argparse.Namespace, device: torch.device) -> None:
    """What one step asks of the device: launches, waits, copies, memory, and where its time goes.

    Without a GPU, on tensors that stand in for one: operations instead of kernels, and no times.
    """
    if device.type == "cuda":
        count_on_gpu(config, args, device)
        return
    from support.stand_in_gpu import GPU, stand_in_gpu

    config.compile = "false"
    with stand_in_gpu() as gpu:
        ours = Ours(config, GPU)
        batch = synthetic_batch(config, args.bins, args.lengths, 0, GPU)
        ours.whole(batch, 0)
        gpu.reset()
        ours.whole(batch, 1)
        print(f"no GPU: {sum(gpu.operations.values())} operations on a stand-in for one")
        rows = [[name, str(n)] for name, n in gpu.operations.most_common(12)]
        rows += [[n, str(gpu.operations[n])] for n in ("_cudnn_rnn", "_cudnn_rnn_backward")]
        rows += [["bytes copied to the device", str(gpu.bytes_sent)]]
        rows += [["waits of the host", str(sum(gpu.waits.values()))]]
        rows += [[f"  {what} at {where}", str(n)] for (what, where), n in gpu.waits.items()]
    table("One step", ["of", "count"], rows)


def count_on_gpu(config: TrainingConfig, args: argparse.Namespace, device: torch.device) -> None:
    from torch.profiler import ProfilerActivity, profile

    ours = Ours(config, device)
    batches = [synthetic_batch(config, args.bins, args.lengths, seed, device) for seed in range(3)]
    for k in range(8):
        ours.whole(batches[k % 3], k)
    finish(device)
    started = time.perf_counter()
    for k in range(args.rounds):
        ours.whole(batches[k % 3], k)
    launched = time.perf_counter() - started
    finish(device)
    whole = time.perf_counter() - started
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        ours.whole(batches[0], 98)
    torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        ours.whole(batches[0], 99)
        finish(device)
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = [event for event in events if event.name.startswith(("Memcpy", "Memset"))]
    if not events:
        raise SystemExit("The profiler saw nothing on the GPU: is CUPTI usable there?")
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    busy = sum(event.self_device_time_total for event in events)
    rows = [
        ["ms per step, back to back", f"{1e3 * whole / args.rounds:.1f}"],
        ["ms until the host has launched it", f"{1e3 * launched / args.rounds:.1f}"],
        ["kernels", str(len(events) - len(copies))],
        ["copies and fills", str(len(copies))],
        ["busy, % of the step", f"{100 * busy / span:.0f}"],
        ["waits of the host", str(sum("synchroniz" in str(w.message) for w in waits))],
        ["peak memory, GB", f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f}"],
        ["reserved, GB", f"{torch.cuda.max_memory_reserved(device) / 1e9:.2f}"],
    ]
    table("One step", ["of", "count"], rows)
    print(seen.key_averages().table(sort_by="self_device_time_total", row_limit=25))


def configured(args: argparse.Namespace) -> TrainingConfig:
    """The configuration file, or the recipe sized for a CPU, with what was given beside it."""
    given: dict[str, Any] = {}
    if args.config is None:
        full = args.project
        given = {
            "dataset.n_classes": 1681,
            "model.n_units": 1024 if full else 512,
            "model.n_layers": 5 if full else 3,
            "dataset.batch_size": 48 if full else 16,
        }
    options = {
        "dataset.batch_size": args.batch_size,
        "model.n_units": args.units,
        "model.n_layers": args.layers,
        "model.rnn_dropout": args.rnn_dropout,
        "model.bidirectional": args.bidirectional,
        "objective.ctc_kernel": args.ctc_kernel,
        "objective.phoneme_weight": args.phoneme_weight,
    }
    if args.features:
        options |= {
            "model.n_input_features": args.features,
            "dataset.neural_dim": args.features,
            "model.input_network.input_layer_sizes": [args.features],
        }
    if args.batch_size and args.batch_size < N_SESSIONS:
        options["dataset.days_per_batch"] = args.batch_size
    if args.amp_dtype:
        options["use_amp"] = args.amp_dtype != "off"
        options["amp_dtype"] = args.amp_dtype if args.amp_dtype != "off" else "auto"
    given |= {name: value for name, value in options.items() if value is not None}
    if "objective.phoneme_weight" in given:
        given["objective.schedule"] = None
    config = load_config(args.config, given)
    if config.objective.schedule is not None:  # contenders are to compute the same at every step
        config.objective.phoneme_weight = config.objective.schedule[-1][1]
        config.objective.schedule = None
    if not config.use_amp:
        config.allow_tf32 = args.tf32
    return config


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config", type=Path, help="YAML; default: the recipe, sized for a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU seconds, where other work shares the machine"
    )
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--units", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--features", type=int)
    parser.add_argument("--bins", type=int, help=f"mean trial length; default {MEAN_BINS}")
    parser.add_argument("--lengths", choices=["equal", "spread"], default="spread")
    parser.add_argument("--bidirectional", action=argparse.BooleanOptionalAction)
    parser.add_argument("--rnn-dropout", type=float)
    parser.add_argument("--ctc-kernel", choices=["auto", "torch", "triton"])
    parser.add_argument("--phoneme-weight", type=float)
    parser.add_argument("--amp-dtype", choices=["off", "auto", "bfloat16", "float16"])
    parser.add_argument("--tf32", action="store_true", help="TF32 where --amp-dtype is off")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--with-data", action="store_true", help="batches through the dataset")
    parser.add_argument("--classes", help="compare numbers of classes, e.g. 41,1681")
    parser.add_argument("--sweep", action="store_true", help="of what is not given")
    parser.add_argument(
        "--ours-only", action="store_true", help="leave the plain one out of --sweep"
    )
    parser.add_argument("--validation", type=int, metavar="TRIALS")
    parser.add_argument("--counts", action="store_true", help="launches, waits, copies, memory")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--project", action="store_true", help="on a GPU, or with --with-data, measured too"
    )
    return parser


def main(words: list[str] | None = None) -> None:
    args = build_parser().parse_args(words)
    args.given_bins = args.bins is not None
    args.bins = args.bins or MEAN_BINS

    global CLOCK
    if args.cpu_time:
        CLOCK = time.process_time
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    config = configured(args)
    allow_tf32(config.allow_tf32)
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    clock = "CPU" if args.cpu_time else "wall"
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    precision = autocast_dtype(config, device) or (
        "TF32" if on_gpu and config.allow_tf32 else torch.float32
    )
    print(
        f"{name}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads, "
        f"{clock} time, precision {precision}; "
        f"{config.model.n_layers} x {config.model.n_units} units, {config.dataset.n_classes} "
        f"classes, batch {config.dataset.batch_size}, {args.bins} bins ({args.lengths})"
    )
    seconds = None
    if args.with_data:
        seconds = with_data(config, args, device)
    elif args.classes:
        compare_classes(config, args, device)
    elif args.sweep:
        sweep(config, args, device)
    elif args.validation:
        compare_validation(config, args, device)
    elif args.counts:
        count_step(config, args, device)
    elif args.compile:
        compare_compile(config, args, device)
    elif on_gpu or not args.project:
        seconds = compare_step(config, args, device)
    if args.project:
        gpu = known_as(name)
        project(config, args, None if gpu is None or seconds is None else (gpu, seconds))


if __name__ == "__main__":
    main()
