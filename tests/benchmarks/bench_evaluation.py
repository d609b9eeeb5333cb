"""How fast are trials decoded, and how long does a real-time step take?

    python tests/benchmarks/bench_evaluation.py [--trials 24] [--full-model]

Two tables. Decoding: batches with padding skipped against the public evaluation's loop (one trial
at a time, its day matrix gathered, its features smoothed by a convolution) on the same trials,
weights and threads, taking turns. Real time: steps of 80 ms (4 bins) through the exported decoder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

import numpy as np
import torch
from brain_to_text.augmentations import Augmentation, gaussian_kernel
from brain_to_text.batch import pad_features
from brain_to_text.batch_plan import evaluation_batches
from brain_to_text.config import TrainingConfig, config_from_dict
from brain_to_text.model_artefact import ModelArtefact
from brain_to_text.rnn_model import GRUDecoder
from brain_to_text.streaming_decoder import export_streaming

SESSIONS = ("t15.2023.08.11", "t15.2023.08.13")
MEAN_BINS = 850  # of the real recordings


def configured(full: bool) -> TrainingConfig:
    units, layers = (1024, 5) if full else (256, 3)
    return config_from_dict(
        {
            "model": {"n_units": units, "n_layers": layers},
            "dataset": {"n_classes": 1681, "days_per_batch": 1, "sessions": list(SESSIONS)},
        }
    )


def one_at_a_time(model: GRUDecoder, trials: list[np.ndarray], days: list[int]) -> int:
    """The public script's loop in plain PyTorch; returns decoded labels, so that work is done."""
    taps = gaussian_kernel(2.0, 100)
    labels = 0
    for trial, day in zip(trials, days, strict=True):
        x = torch.from_numpy(trial)[None]
        kernel = taps.view(1, 1, -1).repeat(x.shape[2], 1, 1)
        x = torch.nn.functional.conv1d(
            x.permute(0, 2, 1), kernel, padding="same", groups=x.shape[2]
        ).permute(0, 2, 1)
        weight = torch.stack([model.day_weights[day]])
        x = torch.einsum("btd,bdk->btk", x, weight) + model.day_biases[day]
        x = torch.nn.functional.softsign(x)
        patches = x.unfold(1, 14, 4).permute(0, 1, 3, 2).flatten(2)
        start = model.h0.expand(model.n_layers, 1, model.n_units).contiguous()
        logits = model.out(model.gru(patches, start)[0])
        best = logits.float().cpu().numpy()[0].argmax(-1)
        labels += int(np.count_nonzero(best))
    return labels


def in_batches(
    model: GRUDecoder, smooth: Augmentation, trials: list[np.ndarray], days: list[int], size: int
) -> int:
    labels = 0
    lengths = np.array([len(t) for t in trials])
    for chosen in evaluation_batches(np.arange(len(trials)), lengths, size):
        x = pad_features([trials[i] for i in chosen])
        steps = torch.from_numpy(lengths[chosen])
        x, steps = smooth(x, steps, training=False)
        day = torch.tensor([days[i] for i in chosen])
        best = model(x, day, n_time_steps=steps).argmax(-1).numpy()
        frames = model.frame_lengths(steps).numpy()
        labels += sum(int(np.count_nonzero(b[:f])) for b, f in zip(best, frames, strict=True))
    return labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--full-model", action="store_true", help="5 x 1024 units")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    config = configured(options.full_model)
    torch.manual_seed(0)
    model = GRUDecoder.from_config(config, n_days=len(SESSIONS)).eval()
    smooth = Augmentation(config.dataset.data_transforms)
    lengths = random.normal(MEAN_BINS, 250, options.trials).clip(200, 1600).astype(int)
    trials = [random.standard_normal((n, 512)).astype(np.float32) for n in lengths]
    days = random.integers(0, len(SESSIONS), options.trials).tolist()

    units = f"{config.model.n_layers} x {config.model.n_units} units"
    print(f"{options.trials} trials, {units}, {torch.get_num_threads()} threads, CPU")
    seconds: dict[str, list[float]] = {"one trial at a time": [], "batches": []}
    counts = {}
    with torch.no_grad():
        for _ in range(options.rounds):
            for name in seconds:
                started = time.perf_counter()
                if name == "batches":
                    counts[name] = in_batches(model, smooth, trials, days, options.batch_size)
                else:
                    counts[name] = one_at_a_time(model, trials, days)
                seconds[name].append(time.perf_counter() - started)
    slowest = min(seconds["one trial at a time"])
    print(f"{'reader':22} {'trials/s':>9} {'ratio':>6} {'labels':>7}")
    for name, times in seconds.items():
        rate = options.trials / min(times)
        print(f"{name:22} {rate:9.2f} {slowest / min(times):6.2f} {counts[name]:7d}")

    artefact = ModelArtefact("benchmark", config, SESSIONS, model.state_dict(), None, {})
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "decoder.pt"
        export_streaming(artefact, path)
        decoder = torch.jit.load(str(path))
        state, steps = decoder.start(), []
        bins = torch.from_numpy(trials[0])[None]
        for chunk in bins[:, : 4 * 60].split(4, dim=1):
            started = time.perf_counter()
            _, state = decoder(chunk, 0, state)
            steps.append(time.perf_counter() - started)
    milliseconds = 1000 * np.array(steps[10:])
    print(f"\nreal time, one step of 4 bins (80 ms), {units}, TorchScript on the CPU:")
    for name, share in (("median", 50), ("90th percentile", 90), ("slowest", 100)):
        print(f"{name:22} {np.percentile(milliseconds, share):9.2f} ms")


if __name__ == "__main__":
    main()
