"""How fast are trials decoded, and how long does a real-time step take?

    python tests/benchmarks/bench_evaluation.py [--size smoke|full] [--trials 1426]

Decoding: this project's pass over trials against the public evaluation's loop (one trial at a
time: its smoothing kernel, its day matrix gathered, its logits copied out, its classes merged) on
the same trials, weights and threads, taking turns. Real time: steps of 80 ms (4 bins) through the
exported decoder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

import numpy as np
import torch
from brain_to_text.config_reader import load_config
from brain_to_text.dataset.trial_record import TrialRecord
from brain_to_text.model.augmentations import Augmentation, gaussian_kernel
from brain_to_text.model.realtime import export_streaming
from brain_to_text.model.rnn_model import GRUDecoder
from brain_to_text.model.trained_model import ModelArtefact
from brain_to_text.scoring.decoding import Inference, greedy_decode
from brain_to_text.streaming.batch import collate, pad_features
from brain_to_text.streaming.batch_plan import evaluation_batches

SESSIONS = ("t15.2023.08.11", "t15.2023.08.13")
SIZES = {  # units, layers, features, mean bins and their deviation
    "smoke": (128, 2, 96, 320, 80),
    "full": (1024, 5, 512, 850, 250),
}
BATCH_SIZE, ROUNDS = 128, 2
Decoded = list[list[int]]


class Trials:
    """Random trials with lengths like the recordings', of one width."""

    def __init__(self, width: int, mean: float, deviation: float, count: int) -> None:
        random = np.random.default_rng(0)
        lengths = random.normal(mean, deviation, count).clip(0.25 * mean, 1.9 * mean)
        self.lengths = lengths.astype(int)
        self.days = random.integers(0, len(SESSIONS), count)
        # one long recording, cut anywhere, so that 1,426 trials need not lie in memory
        shape = (4 * int(self.lengths.max()), width)
        self.recording = random.standard_normal(shape, dtype=np.float32)
        self.starts = random.integers(0, len(self.recording) - self.lengths.max(), count)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.recording[self.starts[index] :][: self.lengths[index]]


def one_at_a_time(
    model: GRUDecoder, trials: Trials, device: torch.device, cast: Callable
) -> Decoded:
    """The public script's loop in plain PyTorch."""
    found = []
    for index in range(len(trials.lengths)):
        x = torch.tensor(trials[index][None], device=device)
        taps = gaussian_kernel(2.0, 100).to(device)
        kernel = taps.view(1, 1, -1).repeat(x.shape[2], 1, 1)
        with cast():
            x = torch.nn.functional.conv1d(
                x.permute(0, 2, 1), kernel, padding="same", groups=x.shape[2]
            ).permute(0, 2, 1)
            day = torch.tensor([trials.days[index]], device=device)
            weight = torch.stack([model.day_weights[d] for d in day])
            bias = torch.cat([model.day_biases[d] for d in day]).unsqueeze(1)
            x = torch.nn.functional.softsign(torch.einsum("btd,bdk->btk", x, weight) + bias)
            windows = x.unfold(1, model.patch_size, model.patch_stride)
            patches = windows.permute(0, 1, 3, 2).flatten(2)
            start = model.h0.expand(model.n_layers, 1, model.n_units).contiguous()
            logits = model.out(model.gru(patches, start)[0])
        best = [int(c) for c in logits.float().cpu().numpy()[0].argmax(-1) if c]
        found.append([c for i, c in enumerate(best) if i == 0 or c != best[i - 1]])
    return found


def in_batches(
    model: GRUDecoder, smooth: Augmentation, trials: Trials, device: torch.device, cast: Callable
) -> Decoded:
    """This project's pass."""
    found: Decoded = [[] for _ in trials.lengths]
    for chosen in evaluation_batches(np.arange(len(found)), trials.lengths, BATCH_SIZE):
        own = [trials[i] for i in chosen]
        records = [TrialRecord("s", "test", "k", "t", len(x), x.shape[1], "<f4", 0, 0) for x in own]
        features = pad_features(own, pin=device.type == "cuda")
        batch = collate(0, chosen, records, trials.days[chosen], features).to(device)
        logits = Inference(model, smooth, cast).logits(batch)
        frames = model.frame_lengths(batch.n_time_steps).numpy()
        merged = greedy_decode(logits.argmax(-1).cpu().numpy(), frames)
        for index, labels in zip(chosen, merged, strict=True):
            found[index] = labels
    return found


def compare(contenders: dict[str, Callable[[], Decoded]]) -> None:
    """The contenders in turns, the best round of each; prints a table."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    found: dict[str, Decoded] = {}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for name, decode in contenders.items():
                started = time.perf_counter(), time.process_time()
                found[name] = decode()
                ended = time.perf_counter(), time.process_time()
                times[name].append((ended[0] - started[0], ended[1] - started[1]))
    print(f"{'':22} {'trials/s':>9} {'ratio':>6} {'per CPU s':>10} {'ratio':>6} {'labels':>8}")
    slow = [min(column) for column in zip(*next(iter(times.values())), strict=True)]
    for name, rows in times.items():
        count = len(found[name])
        wall, cpu = (min(column) for column in zip(*rows, strict=True))
        print(
            f"{name:22} {count / wall:9.2f} {slow[0] / wall:6.2f} "
            f"{count / cpu:10.2f} {slow[1] / cpu:6.2f} {sum(map(len, found[name])):8d}"
        )
    one, other = found.values()
    print(f"trials with equal labels: {sum(a == b for a, b in zip(one, other, strict=True))}")


def real_time(artefact: ModelArtefact, trials: Trials) -> None:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "decoder.pt"
        export_streaming(artefact, path)
        decoder = torch.jit.load(str(path))
        state, busy = decoder.start(), []
        bins = torch.from_numpy(trials.recording[: 4 * 130])[None]
        for chunk in bins.split(4, dim=1):
            started = time.process_time()
            _, state = decoder(chunk, 0, state)
            busy.append(1000 * (time.process_time() - started))
    median, high, slowest = np.percentile(busy[30:], (50, 90, 100))
    print(
        f"\nreal time, one step of 4 bins (80 ms), TorchScript on the CPU: {median:.2f} ms of CPU "
        f"time (90 %: {high:.2f}, slowest {slowest:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("--size", choices=SIZES, default="smoke")
    option("--trials", type=int, default=1426)
    option("--device", default="cpu")
    option("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    cast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    units, layers, features, mean, deviation = SIZES[options.size]
    settings = {"n_units": units, "n_layers": layers, "n_input_features": features}
    settings |= {"n_classes": 1681, "days_per_batch": 1, "sessions": list(SESSIONS)}
    config = load_config(None, settings)
    torch.manual_seed(0)
    model = GRUDecoder(config, n_days=len(SESSIONS)).eval()
    artefact = ModelArtefact("benchmark", config, SESSIONS, model.state_dict(), None, {})
    trials = Trials(config.width, mean, deviation, options.trials)
    smooth = Augmentation(config.dataset.data_transforms)
    model.to(device)
    print(f"{options.trials} trials, {layers} x {units} units, {features} features, {dtype}")
    compare(
        {
            "one trial at a time": lambda: one_at_a_time(model, trials, device, cast),
            f"batches of {BATCH_SIZE}": lambda: in_batches(model, smooth, trials, device, cast),
        }
    )
    if device.type == "cpu":
        real_time(artefact, trials)


if __name__ == "__main__":
    main()
