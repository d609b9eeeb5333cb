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

Options override the configuration's values, any of which can be given by its key (--rnn-dropout 0);
a schedule of the phoneme weight becomes its last value. Contenders take turns; a figure is the
median over rounds of the time with everything that was started also finished. Trials are noise: a
step's time does not depend on what is in it. float32 is float32 in both contenders unless --tf32
is given.
"""

# ruff: noqa: E402  (the library's folder comes first on the path)

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "code"), str(HERE.parent), str(HERE)]

from bench_evaluation import Trials, compare
from brain_to_text.config import TrainingConfig
from brain_to_text.config_reader import load_config, resolve_key, split_overrides
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
from brain_to_text.launch.pricing import instance_types, prices
from brain_to_text.model.augmentations import step_generator
from brain_to_text.model.classifier import frame_logits
from brain_to_text.model.device import allow_tf32, autocast_dtype, peak_flops
from brain_to_text.model.optimizer import apply_update, clip_and_check
from brain_to_text.model.rnn_model import GRUDecoder
from brain_to_text.model.train_step import TrainStep
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

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model = GRUDecoder(config, N_SESSIONS, for_training=True).to(device)
        self.step = TrainStep(self.model, config, device)
        self.objective, self.optimizer = self.step.objective, self.step.optimizer

    def whole(self, batch: Batch, k: int) -> None:
        self.step(batch, k)

    def phases(self, batch: Batch, k: int, mark: Callable[[str], None]) -> None:
        model = self.model.train()
        generator = step_generator(self.device, self.config.seed, k)
        mark("")
        x, n = self.step.augmentation(batch.features, batch.n_time_steps, generator)
        mark("augment")
        with self.step.autocast():
            frames, packing = model.input_frames(x, batch.day_indices, n)
            mark("day layer, patches")
            hidden, _ = model.recurrent_frames(frames, packing)
            mark("GRU")
            logits = frame_logits(model.out, hidden)
        mark("classifier")
        terms = self.objective(logits, packing, batch, k)
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
            beside = phonemes if diphones else None
            place = (f"trial_{i:04d}", session, 1, i)
            trials.append(TrialContents(*place, features, labels, beside, "noise"))
        (folder / session).mkdir()
        (folder / session / "data_train.hdf5").write_bytes(data_file_bytes(trials))


def with_data(config: TrainingConfig, args: argparse.Namespace, device: torch.device) -> float:
    """Steps as a run makes them, from `next` on the dataset to the update; returns their seconds.

    Trials lie in a folder and, from the warm-up on, in the cache in RAM. Nothing waits for
    the device between two steps, so that preparing and copying batches may overlap computing.
    """
    days = min(config.dataset.days_per_batch, N_SESSIONS)
    changes = {"dataset.days_per_batch": days, "dataset.must_include_days": None}
    config = varied(config, changes)
    ours, steps, B = Ours(config, device), args.rounds, config.dataset.batch_size
    with tempfile.TemporaryDirectory() as folder:
        write_sessions(Path(folder), config, args)
        store = open_store(folder)
        manifest = index_dataset(store)
        everything = sum(trial.length for trial in manifest.trials)
        config.dataset.cache_gb = 2 * everything / 1e9
        stream = TrialStream.from_config(store, manifest, config.dataset)
        by_session = [np.array(manifest.select("train", [s])) for s in manifest.sessions]
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
                waited = traffic.wait_seconds / (seconds[-1] * steps)
                rows.append(["streamed", f"{seconds[-1] * 1e3:.1f}", f"{B / seconds[-1]:.1f}"])
                rows[-1] += [f"{100 * waited:.1f}", f"{100 * traffic.hit_rate:.0f}"]
            kept = [next(batches) for _ in range(3)]
        alone = timed(loop(iter(kept * steps), steps), device) / steps
        rows.append(["in memory", f"{alone * 1e3:.1f}", f"{B / alone:.1f}", "-", "-"])
        dataset.close()
    table(
        f"Steps with their data, means over {steps} steps after {warm_up}",
        ["batches", "ms", "trials/s", "% waiting for data", "% of trials in the cache"],
        rows,
    )
    return statistics.median(seconds)


def compare_variants(
    title: str,
    variants: dict[str, TrainingConfig],
    args: argparse.Namespace,
    device: torch.device,
    lengthen: int = 0,
) -> None:
    """Our step in several configurations; each of its batches is `lengthen` bins longer."""
    contenders = {}
    for name, variant in variants.items():
        batches = [
            synthetic_batch(variant, args.bins + lengthen * i, args.lengths, i, device)
            for i in range(args.rounds + 1 if lengthen else 1)
        ]
        ours = Ours(variant, device)
        contenders[name] = lambda k, o=ours, b=batches: o.whole(b[k % len(b)], k)
    times = alternate(contenders, args.rounds, device)
    least = min(times.values())
    rows = [[name, f"{t * 1e3:.1f}", f"{t / least:.3f}"] for name, t in times.items()]
    table(title, ["ours", "ms", "ratio"], rows)


def varied(config: TrainingConfig, changes: dict[str, Any]) -> TrainingConfig:
    """A copy with values changed by dotted key."""
    variant = copy.deepcopy(config)
    for path, value in changes.items():
        *parents, last = path.split(".")
        setattr(functools.reduce(getattr, parents, variant), last, value)
    return variant


def compare_classes(config: TrainingConfig, args: argparse.Namespace, device) -> None:
    variants = {}
    for n in map(int, args.classes.split(",")):
        weight = config.objective.phoneme_weight if n == 1681 else 0.0
        changes = {"dataset.n_classes": n, "objective.phoneme_weight": weight}
        variants[f"{n} classes"] = varied(config, changes)
    compare_variants("Cost of classes", variants, args, device)


def compare_compile(config: TrainingConfig, args: argparse.Namespace, device) -> None:
    """torch.compile on and off, with a new length at every step."""
    variants = {f"compile: {on}": varied(config, {"compile": on}) for on in ("false", "true")}
    compare_variants("Compiled or not", variants, args, device, lengthen=7)


def sweep(config: TrainingConfig, args: argparse.Namespace, device) -> None:
    rows, on_gpu = [], device.type == "cuda"
    for batch_size in (args.batch_size,) if args.batch_size else (8, 16, 32, 64):
        for bins in (args.bins,) if args.given_bins else (400, 850, 1800):
            variant = varied(config, {"dataset.batch_size": batch_size})
            batch = synthetic_batch(variant, bins, args.lengths, 0, device)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            kinds = {"ours": Ours} | ({} if args.ours_only else {"plain": Plain})
            made = {name: kind(variant, device) for name, kind in kinds.items()}
            contenders = {
                name: lambda k, m=maker, b=batch: m.whole(b, k) for name, maker in made.items()
            }
            times = alternate(contenders, args.rounds, device)
            ours, plain = times["ours"], times.get("plain", float("nan"))
            memory = f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f}" if on_gpu else "-"
            rows.append([f"{batch_size} x {bins}", f"{plain * 1e3:.1f}", f"{ours * 1e3:.1f}"])
            rows[-1] += [f"{plain / ours:.2f}", f"{batch_size / ours:.1f}", memory]
    table(
        "Batch size x bins",
        ["batch", "plain ms", "ours ms", "plain / ours", "trials/s (ours)", "peak GB"],
        rows,
    )


def compare_validation(config: TrainingConfig, args: argparse.Namespace, device) -> None:
    """Decoding `--validation` trials: batched against one at a time, the same weights."""
    model = GRUDecoder(config, N_SESSIONS)
    trials = Trials(config.width, args.bins, 0.3 * args.bins, args.validation)
    dtype = autocast_dtype(config, device)
    compare(config, model, trials, device, dtype, config.dataset.batch_size)


def project(config: TrainingConfig, measured: dict[str, float]) -> None:
    """Hours and cost of 150,000 steps on one GPU of every instance type that the image supports.

    From `gpus.step_time`, an estimate; where the step was `measured` in this run (seconds by the
    name of the GPU), from that.
    """
    rows = []
    for name, row in instance_types().items():
        if row.gpu is None or GPUS[row.gpu].capability < OLDEST_CAPABILITY:
            continue
        parts = step_time(config, GPUS[row.gpu])
        seconds = measured.get(row.gpu, parts.total)
        hours = STEPS_OF_A_RUN * seconds / 3600
        cost = "-" if row.usd_per_hour is None else f"{hours * row.usd_per_hour:.0f}"
        cells = [f"{part * 1e3:.0f}" for part in (*vars(parts).values(), seconds)]
        basis = "measured in this run" if row.gpu in measured else "estimate"
        gpu = f"1 of {row.gpus} {row.gpu}"
        rows.append([name, gpu, GPUS[row.gpu].half, *cells, f"{hours:.1f}", cost, basis])
    table(
        f"{STEPS_OF_A_RUN} steps: estimated ms of products, recurrence, memory and launches, the "
        f"step; prices of whole instances: {prices()}",
        ["instance", "GPU", "type", "products", "recurrence", "memory", "launches"]
        + ["ms", "hours", "$", "basis"],
        rows,
    )


def count_step(config: TrainingConfig, args: argparse.Namespace, device: torch.device) -> None:
    """What one step asks of the device: launches, waits, copies, memory, and where its time goes.

    Without a GPU, on tensors that stand in for one: operations instead of kernels, and no times.
    """
    if device.type == "cuda":
        count_on_gpu(config, args, device)
        return
    from support.stand_in_gpu import GPU, stand_in_gpu

    config = varied(config, {"compile": "false"})
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


def profiled(work: Callable[[], object], device: torch.device) -> tuple[Any, list[Any]]:
    """The profiler after `work`, and its events on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        finish(device)
    return seen, [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def count_on_gpu(config: TrainingConfig, args: argparse.Namespace, device: torch.device) -> None:
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
    seen, events = profiled(lambda: ours.whole(batches[0], 99), device)
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


def configured(args: argparse.Namespace, extra: list[str]) -> TrainingConfig:
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
        "model.bidirectional": args.bidirectional,
        "model.n_input_features": args.features,
    }
    if args.batch_size and args.batch_size < N_SESSIONS:
        options["dataset.days_per_batch"] = args.batch_size
    if args.amp_dtype:
        options["use_amp"] = args.amp_dtype != "off"
        options["amp_dtype"] = args.amp_dtype if args.amp_dtype != "off" else "auto"
    given |= {name: value for name, value in options.items() if value is not None}
    given |= {resolve_key(name): text for name, text in split_overrides(extra).items()}
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
    args, extra = build_parser().parse_known_args(words)
    args.given_bins = args.bins is not None
    args.bins = args.bins or MEAN_BINS

    global CLOCK
    if args.cpu_time:
        CLOCK = time.process_time
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    config = configured(args, extra)
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
    modes = {
        "with_data": with_data,
        "classes": compare_classes,
        "sweep": sweep,
        "validation": compare_validation,
        "counts": count_step,
        "compile": compare_compile,
    }
    chosen = next((mode for option, mode in modes.items() if getattr(args, option)), None)
    seconds = None
    if chosen is not None or on_gpu or not args.project:
        seconds = (chosen or compare_step)(config, args, device)
    if args.project:
        gpu = known_as(name)
        project(config, {} if gpu is None or seconds is None else {gpu: seconds})


if __name__ == "__main__":
    main()
