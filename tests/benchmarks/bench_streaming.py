"""How fast trials become batches: the obvious design, better ones, ours, and a local disk.

    python tests/benchmarks/bench_streaming.py                       everything, 20 minutes or more
    python tests/benchmarks/bench_streaming.py --skip naive          without the slowest contender
    python tests/benchmarks/bench_streaming.py --only clients        or trainer, start-up

A real S3 server (rclone) stands behind a proxy process with 30 ms to the first byte and 80 MB/s per
connection, over HTTP and over TLS. Every contender makes the same batches (48 trials of about
1.7 MB from 4 sessions) in a process of its own; contenders take turns, several rounds in one run.
GETs and bytes are counted by the proxy, CPU and peak memory by the contender's process.
"""

# ruff: noqa: E402 (the path to the code comes first)

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import resource
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2] / "code"), str(HERE.parents[1])]

import numpy as np
import torch
from brain_to_text.dataset.indexing import index_dataset
from brain_to_text.dataset.manifest import TrialManifest, write_manifest
from brain_to_text.dataset.trial_record import TrialRecord
from brain_to_text.labels.diphones import encode_diphones
from brain_to_text.storage.store import LocalStore, open_store
from brain_to_text.streaming.batch import pad_features
from brain_to_text.streaming.batch_plan import BatchPlan
from brain_to_text.streaming.trial_cache import TrialCache
from brain_to_text.streaming.trial_stream import TrialStream
from support.local_s3 import make_certificate, serve_s3
from support.manifests import manifest_of, uploaded
from support.processes import stop
from support.tiny_data import write_dataset

BUCKET_URL = "s3://bench/data"
FULL_URL = "s3://bench/full"
SESSIONS = ("t15.2023.08.11", "t15.2023.08.13", "t15.2023.08.18", "t15.2023.08.20")
TRIALS_PER_SESSION = 150
BATCH_SIZE = 48
READS_AT_ONCE = 48  # dataset.max_concurrent_reads
LATENCY_SECONDS = 0.030
BYTES_PER_SECOND = 80e6


# --- contenders: each makes a function from trial indices to a padded batch -----------------------

Load = Callable[[np.ndarray], torch.Tensor]


def naive(manifest: TrialManifest) -> Load:
    """h5py over s3fs, opened per trial, default settings."""
    import h5py
    import s3fs

    file_system = s3fs.S3FileSystem()

    def load(indices: np.ndarray) -> torch.Tensor:
        arrays = []
        for index in indices:
            trial = manifest.trials[index]
            with file_system.open(f"{BUCKET_URL}/{trial.key}") as remote:
                with h5py.File(remote, "r") as file:
                    arrays.append(file[trial.trial]["input_features"][:])
        return pad_features(arrays)

    return load


def obstore_by_index(manifest: TrialManifest) -> Load:
    """The manifest and obstore (Rust), 48 threads, nothing verified."""
    import concurrent.futures

    import obstore
    from obstore.store import S3Store

    tls = os.environ["AWS_ENDPOINT_URL_S3"].startswith("https")  # it reads no AWS_CA_BUNDLE
    store = S3Store(
        "bench",
        prefix="data",
        endpoint=os.environ["AWS_ENDPOINT_URL_S3"],
        virtual_hosted_style_request=False,
        client_options={"allow_invalid_certificates": True} if tls else {"allow_http": True},
    )
    threads = concurrent.futures.ThreadPoolExecutor(READS_AT_ONCE)

    def load(indices: np.ndarray) -> torch.Tensor:
        distinct = [int(i) for i in dict.fromkeys(indices.tolist())]

        def read(index: int) -> np.ndarray:
            t = manifest.trials[index]
            span = obstore.get_range(store, t.key, start=t.offset, length=t.length)
            return t.decode(memoryview(span))

        arrays = dict(zip(distinct, threads.map(read, distinct), strict=True))
        return pad_features([arrays[int(i)] for i in indices])

    return load


def ours(manifest: TrialManifest, cache_bytes: int = 0) -> Load:
    """TrialStream without a cache: verified, retried, counted."""
    cache = TrialCache(cache_bytes)
    stream = TrialStream(open_store(BUCKET_URL), manifest, concurrency=READS_AT_ONCE, cache=cache)
    return lambda indices: pad_features(stream.fetch(indices))


def ours_s3fs(manifest: TrialManifest) -> Load:
    """The same through s3fs instead of obstore."""
    from brain_to_text.storage import s3_clients

    s3_clients._obstore_will_do = lambda bucket: False
    return ours(manifest)


def ours_warm(manifest: TrialManifest) -> Load:
    """TrialStream with every trial of the batches in RAM."""
    return ours(manifest, cache_bytes=2 << 30)


def local_h5py(manifest: TrialManifest) -> Load:
    """h5py on the local file system (page cache), handles kept open."""
    import h5py

    folder = Path(os.environ["BENCH_FOLDER"])
    files = {key: h5py.File(folder / key, "r") for key in manifest.files}

    def load(indices: np.ndarray) -> torch.Tensor:
        trials = [manifest.trials[i] for i in indices]
        return pad_features([files[t.key][t.trial]["input_features"][:] for t in trials])

    return load


CONTENDERS: dict[str, Callable[[TrialManifest], Load]] = {
    "naive": naive,
    "obstore_by_index": obstore_by_index,
    "ours": ours,
    "ours_s3fs": ours_s3fs,
    "ours_warm": ours_warm,
    "local_h5py": local_h5py,
}
WARM = ("ours_warm", "local_h5py")


# --- one contender in its own process -------------------------------------------------------------


def plan_for(manifest: TrialManifest) -> BatchPlan:
    trials = [np.array(manifest.select("train", [s])) for s in manifest.sessions]
    return BatchPlan(trials, BATCH_SIZE, 4, seed=1)


def run_contender(name: str, n_batches: int, first: int) -> dict[str, float]:
    """Batches `first` … of the plan; times, counts, CPU and memory of this process."""
    manifest = TrialManifest.from_bytes(Path(os.environ["BENCH_MANIFEST"]).read_bytes(), "data")
    plan = plan_for(manifest)
    load = CONTENDERS[name](manifest)
    batches = [plan.trials(first + i) for i in range(n_batches)]
    share = 1
    if name == "naive":  # a sixth of a batch, scaled up below: it works trial by trial
        share = 6
        batches = [batch[::share] for batch in batches]
    if name in WARM:
        for batch in batches:
            load(batch)
    else:
        load(batches[0][:1])  # imports and connections: not what is compared here
    gc.collect()
    request_counts(reset=True)
    before = resident_bytes()
    cpu, seconds, needed = time.process_time(), [], 0
    for batch in batches:
        started = time.perf_counter()
        features = load(batch)
        seconds.append(time.perf_counter() - started)
        needed += sum(manifest.trials[i].length for i in np.unique(batch))
        del features
    counts = request_counts()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": statistics.median(seconds) * share,
        "gets": counts["requests"] / n_batches * share,
        "distinct": sum(len(np.unique(b)) for b in batches) / n_batches * share,
        "bytes_ratio": counts["body_bytes"] / needed,
        "cpu": (time.process_time() - cpu) / n_batches * share,
        "peak_mb": (peak - before) / 1e6,
        "mb_needed": needed / n_batches / 1e6,
    }


def resident_bytes() -> int:
    text = Path("/proc/self/statm").read_text().split()
    return int(text[1]) * os.sysconf("SC_PAGE_SIZE")


def request_counts(
    environment: Mapping[str, str] = os.environ, reset: bool = False
) -> dict[str, Any]:
    """What the proxy counted, or everything to zero; not counted itself."""
    url = environment["BENCH_CONTROL"] + f"/_proxy/{'reset' if reset else 'counts'}"
    context = None
    if url.startswith("https"):
        context = ssl.create_default_context(cafile=environment["AWS_CA_BUNDLE"])
    with urllib.request.urlopen(url, context=context) as answer:
        return json.loads(answer.read())


def in_subprocess(function: str, environment: dict[str, str], **arguments: Any) -> Any:
    """What one of this file's functions returns in a process of its own."""
    result = subprocess.run(
        [sys.executable, str(HERE), "--call", function, json.dumps(arguments)],
        env={**os.environ, **environment, "OMP_NUM_THREADS": "2", "THP_MEM_ALLOC_ENABLE": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"{function} {arguments}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


# --- the stage ------------------------------------------------------------------------------------


@contextlib.contextmanager
def proxy_process(
    upstream: str, certificate: tuple[Path, Path] | None, latency: float, rate: float
) -> Iterator[str]:
    command = [sys.executable, str(HERE.parents[1] / "support/fault_proxy.py")]
    command += ["--upstream", upstream, "--latency", str(latency), "--rate", str(rate)]
    if certificate:
        command += ["--certificate", str(certificate[0]), str(certificate[1])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        stop(process, 10)


@dataclasses.dataclass
class Stage:
    """What the server holds; `environments["tls"]` sends a process to the TLS proxy."""

    manifest: TrialManifest
    environments: dict[str, dict[str, str]]


@contextlib.contextmanager
def stage() -> Iterator[Stage]:
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        folder = root / "s3" / "bench" / "data"
        print(f"Writing {len(SESSIONS)} x {TRIALS_PER_SESSION} trials to {root}", flush=True)
        splits = {"train": TRIALS_PER_SESSION, "val": 2}
        write_dataset(folder, SESSIONS, splits, n_features=512, bins=(500, 1200))
        for session, split, _ in full_size_files():
            path = folder.parent / "full" / session / f"data_{split}.hdf5"
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / SESSIONS[0] / path.name, path)
        server = stack.enter_context(serve_s3(root / "s3", cached=True))
        certificate = make_certificate(root, "127.0.0.1")
        base = {
            **server.environment(),
            "BENCH_FOLDER": str(folder),
            "BENCH_MANIFEST": str(root / "manifest"),
        }
        os.environ.update(base)
        manifest = published(BUCKET_URL, folder)
        (root / "manifest").write_bytes(manifest.to_bytes())
        environments = {}
        for name, cert in (("http", None), ("tls", certificate)):
            url = stack.enter_context(
                proxy_process(server.endpoint_url, cert, LATENCY_SECONDS, BYTES_PER_SECOND)
            )
            environments[name] = {
                **base,
                "AWS_ENDPOINT_URL_S3": url,
                "AWS_ENDPOINT_URL": url,
                "BENCH_CONTROL": url,
                **({"AWS_CA_BUNDLE": str(certificate[0])} if cert else {}),
            }
        yield Stage(manifest, environments)


def published(url: str, folder: Path) -> TrialManifest:
    """The manifest of what lies in `folder` and is served as `url`, kept there."""
    manifest = uploaded(index_dataset(open_store(folder)), open_store(url).list())
    write_manifest(open_store(url), manifest)
    return manifest


# --- parts ----------------------------------------------------------------------------------------


def compare_clients(on: Stage, networks: list[str], rounds: int, skip: list[str]) -> None:
    """Table 1: every contender, in turns."""
    for network in [n for n in networks if n != "model"]:
        results: dict[str, list[dict[str, float]]] = {}
        for turn in range(rounds):
            for name in CONTENDERS:
                if name in skip or (name == "naive" and turn > 0):
                    continue
                n_batches = 1 if name == "naive" else 5
                arguments = {"name": name, "n_batches": n_batches, "first": turn * 5}
                results.setdefault(name, []).append(
                    in_subprocess("run_contender", on.environments[network], **arguments)
                )
        print(f"\n### {network}: 30 ms to first byte, 80 MB/s per connection\n")
        print("| contender | GETs/batch | per distinct trial | bytes/needed | s/batch | ", end="")
        print("ours is faster by | CPU s/batch | peak memory MB |")
        print("|---|---|---|---|---|---|---|---|")
        mine = statistics.median(r["seconds"] for r in results["ours"])
        for name, runs in results.items():
            middle = {k: statistics.median(r[k] for r in runs) for k in runs[0]}
            print(
                f"| {name} | {middle['gets']:.0f} | {middle['gets'] / middle['distinct']:.2f} "
                f"| {middle['bytes_ratio']:.3f} | {middle['seconds']:.3f} "
                f"| {middle['seconds'] / mine:.2f}x | {middle['cpu']:.3f} "
                f"| {middle['peak_mb']:.0f} |",
                flush=True,
            )
        if "local_h5py" in results:
            pairs = [
                a["seconds"] / b["seconds"]
                for a, b in zip(results["ours_warm"], results["local_h5py"], strict=True)
            ]
            print(f"\nwarm cache / local h5py: {statistics.median(pairs):.2f}")


class ModelledStore(LocalStore):
    """A folder that takes as long as the modelled network and costs no CPU for transport."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._files = {
            path.relative_to(folder).as_posix(): np.memmap(path, np.uint8, mode="r")
            for path in folder.rglob("*.hdf5")
        }

    def read_range(self, key: str, offset: int, length: int, etag: str) -> memoryview:
        time.sleep(LATENCY_SECONDS + length / BYTES_PER_SECOND)
        return memoryview(self._files[key])[offset : offset + length]


def run_trainer(
    network: str, step_seconds: float, warm: bool, client: str, busy: bool
) -> dict[str, float]:
    """The real trainer with a pause as its step; shares of the time after the first interval.

    With `busy` the step computes in Python instead of sleeping, as one that launches kernels does.
    """
    from brain_to_text.config_reader import load_config
    from brain_to_text.model.losses import LossTerms
    from brain_to_text.model.train_step import StepResult, TrainStep
    from brain_to_text.storage import s3_clients
    from brain_to_text.training import build_run
    from brain_to_text.training.rnn_trainer_s3 import BrainToTextDecoder_Trainer_S3, RunPaths

    class PausingStep(TrainStep):
        def __call__(self, *_: Any) -> StepResult:
            end = time.thread_time() + step_seconds
            while busy and time.thread_time() < end:
                sum(range(50))
            time.sleep(0 if busy else step_seconds)
            zero = torch.zeros(())
            fine = torch.ones((), dtype=torch.bool)
            return StepResult(LossTerms(zero, zero, None, 0.0), zero, fine, 1, 0.0)

    def opened(*how: Any) -> TrialStream:
        stream = real(*how)
        if network == "model":
            stream._store = ModelledStore(Path(os.environ["BENCH_FOLDER"]))
        if warm:
            stream.fetch(range(len(stream.manifest.trials)))
        return stream

    real = TrialStream.from_config
    TrialStream.from_config, build_run.TrainStep = opened, PausingStep
    if client == "s3fs":
        s3_clients._obstore_will_do = lambda bucket: False
    log_every = 10
    n_steps = log_every * (1 + max(4, int(20 / step_seconds) // log_every))
    settings = {
        "dataset.batch_size": BATCH_SIZE,
        "dataset.cache_gb": 2 if warm else 0,
        "dataset.prefetch_mb": 2048,
        "num_training_batches": n_steps + 1,
        "batches_per_train_log": log_every,
        "batches_per_val_step": 10 * n_steps,
        "save_best_checkpoint": False,
    }
    config = load_config(
        HERE.parents[2] / "code" / "rnn_args_smoke.yaml",
        {name: json.dumps(value) for name, value in settings.items()},
    )
    root = Path(tempfile.mkdtemp(dir=Path(os.environ["BENCH_FOLDER"]).parents[2]))
    paths = RunPaths(root / "model", root / "output", root / "state")
    BrainToTextDecoder_Trainer_S3(config, BUCKET_URL, paths).train()
    lines = map(json.loads, (root / "output" / "metrics.jsonl").read_text().splitlines())
    rows = [line for line in lines if "data_wait_share" in line and line["step"] > log_every]
    elapsed = sum(row["seconds_per_step"] for row in rows) * log_every
    return {
        "wait": statistics.fmean(row["data_wait_share"] for row in rows),
        "step": statistics.fmean(row["seconds_per_step"] for row in rows),
        "mb_per_s": sum(row["bytes_fetched"] for row in rows) / elapsed / 1e6,
    }


def simulate_steps(on: Stage, networks: list[str]) -> None:
    """Table 2: share of the trainer's time that is waiting for data."""
    print("\n### The real trainer with a pause as its step\n")
    print("| network | client | cache | step does | step s | waiting for data | MB/s read |")
    print("|---|---|---|---|---|---|---|")
    names = ("network", "warm", "step_seconds", "client", "busy")
    cases = [
        (n, w, p, "obstore", False) for n in networks for w in (False, True) for p in (0.1, 0.5)
    ]
    for network in [n for n in networks if n != "model"]:
        cases += [(network, False, 0.1, client, True) for client in ("obstore", "s3fs") * 2]
    for case in cases:
        network, warm, pause, client, busy = case
        environment = on.environments["tls" if network == "tls" else "http"]
        result = in_subprocess("run_trainer", environment, **dict(zip(names, case, strict=True)))
        print(
            f"| {network} | {'-' if network == 'model' else client} "
            f"| {'warm' if warm else 'cold'} "
            f"| {pause} s {'of Python' if busy else 'pause'} | {result['step']:.3f} "
            f"| {100 * result['wait']:.1f} % | {result['mb_per_s']:.0f} |",
            flush=True,
        )


def start_up(on: Stage) -> None:
    """Table 3: the real program with a dataset of full size, from its start to its first batch."""
    manifest = full_size_manifest(on)
    write_manifest(open_store(FULL_URL), manifest)
    size = len(manifest.to_bytes()) / 1e6
    print(f"\n### Start-up: manifest of {len(manifest.trials):,} trials, {size:.2f} MB, TLS\n")
    runs = [start_once({**os.environ, **on.environments["tls"]}) for _ in range(5)]
    print("| until | seconds, median | every run |\n|---|---|---|")
    for name in runs[0]:
        values = [run[name] for run in runs]
        every = ", ".join(f"{value:.2f}" for value in values)
        print(f"| {name} | {statistics.median(values):.2f} | {every} |", flush=True)


def full_size_files() -> Iterator[tuple[str, str, int]]:
    """(session, split, trials) of 75 sessions and 11,177 trials; no two share bytes."""
    for number in range(75):
        session = f"t15.2025.{1 + number // 28:02d}.{1 + number % 28:02d}"
        yield session, "train", 149
        if number == 0:
            yield session, "val", 2


def full_size_manifest(on: Stage) -> TrialManifest:
    """Of s3://bench/full, where every file is one of the bench's by another name.

    Sentences are drawn for each trial, so that the manifest is as large as a real one.
    """
    rng = np.random.default_rng(0)
    trials = []
    for session, split, count in full_size_files():
        own = on.manifest.select(split, SESSIONS[:1])
        for number in range(count):
            trial = on.manifest.trials[own[number % len(own)]]
            trials.append(spoken(trial, session, number, rng))
    return manifest_of(trials, open_store(FULL_URL).list(), on.manifest.n_features)


def spoken(trial: TrialRecord, session: str, number: int, rng: np.random.Generator) -> TrialRecord:
    """A trial with the bytes of another and a sentence of its own."""
    phonemes = rng.integers(1, 41, size=rng.integers(15, 45)).astype(np.int32)
    return dataclasses.replace(
        trial,
        session=session,
        key=f"{session}/data_{trial.split}.hdf5",
        trial=f"trial_{number:04d}",
        phoneme_ids=phonemes,
        class_ids=encode_diphones(phonemes),
        sentence_label=" ".join("".join(map(chr, rng.integers(97, 123, 5))) for _ in phonemes[::4]),
        trial_num=number,
    )


def start_once(environment: dict[str, str]) -> dict[str, float]:
    """Seconds from starting `train_model_sagemaker.py` to what its log says; then it is ended."""
    marks = {
        "Python, torch and our code are imported": "Loading data from",
        "listing and manifest are read": "Successfully initialized",
        "the model is built, and the first step begins": "First batch",
    }
    request_counts(environment, reset=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE.parents[2] / "code" / "train_model_sagemaker.py")]
        command += ["--s3-bucket", "bench", "--s3-data-prefix", "full"]
        for name in ("model", "output-data", "checkpoint"):
            command += [f"--{name}-dir", f"{folder}/{name}"]
        started, seen, lines = time.perf_counter(), {}, []
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            seen |= {
                name: time.perf_counter() - started for name, text in marks.items() if text in line
            }
            if len(seen) == len(marks):
                seen["the first batch is read"] = float(line.split("read after ")[1].split()[0])
                break
        process.kill()
        process.wait()
        process.stdout.close()
    if len(seen) <= len(marks):
        raise RuntimeError("".join(lines[-20:]))
    counts = request_counts(environment)
    return seen | {
        "requests that are no trial's (count)": counts["requests"] - counts["ranged_gets"]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=["clients", "trainer", "start-up"])
    parser.add_argument("--skip", nargs="*", default=[], help="contenders to leave out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", nargs="*", default=["model", "http", "tls"])
    parser.add_argument("--call", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        function, arguments = options.call
        print(json.dumps(globals()[function](**json.loads(arguments))), flush=True)
        os._exit(0)  # do not wait for contenders' leftovers

    def wanted(part: str) -> bool:
        return options.only in (None, part)

    with stage() as on:
        if wanted("start-up"):
            start_up(on)
        if wanted("trainer"):
            simulate_steps(on, options.networks)
        if wanted("clients"):
            compare_clients(on, options.networks, options.rounds, options.skip)


if __name__ == "__main__":
    main()
