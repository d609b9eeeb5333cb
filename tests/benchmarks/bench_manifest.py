"""What a dataset of many trials costs before the first step: time and memory, by simulation.

    python tests/benchmarks/bench_manifest.py [--trials 11162 1000000 | --copies]

The manifest is made up (300 sessions, 45 for the size of the real recordings; labels, sentences and
offsets as plausible as they need to be). Two processes then start as torchrun starts them: the
first reads the manifest and shares it, both choose their trials and plan batches.
"""

# ruff: noqa: E402 (the path to the code comes first)

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2] / "code"), str(HERE.parents[1])]

import numpy as np
from brain_to_text.config_reader import load_config
from brain_to_text.dataset.hdf5_writer import TrialContents, data_file_bytes
from brain_to_text.dataset.indexing import index_dataset, load_or_build_manifest
from brain_to_text.dataset.manifest import TrialManifest, write_manifest
from brain_to_text.dataset.selection import select_trials
from brain_to_text.dataset.trial_record import TrialRecord
from brain_to_text.labels.diphones import encode_diphones
from brain_to_text.storage.locations import ObjectInfo
from brain_to_text.storage.store import open_store
from brain_to_text.streaming.batch_plan import BatchPlan
from brain_to_text.training.distributed import World
from support.local_s3 import serve_s3
from support.manifests import manifest_of

SPLITS = ("train", "train", "train", "train", "train", "train", "train", "val", "test", "train")
SETTINGS = {"n_classes": 1681, "batch_size": 64}


def made_up_manifest(n_trials: int, n_sessions: int) -> TrialManifest:
    """`n_trials` trials of 512 features, evenly over sessions; 8 in 10 are for training."""
    rng = np.random.default_rng(0)
    trials, ends = [], {}
    lengths = rng.integers(15, 46, n_trials)
    spoken = np.split(rng.integers(1, 41, lengths.sum(), np.int32), np.cumsum(lengths))
    for number in range(n_trials):
        session = f"t15.{2000 + number % n_sessions:04d}.01.01"
        within = number // n_sessions
        split = SPLITS[within % len(SPLITS)]
        key = f"{session}/data_{split}.hdf5"
        phonemes = spoken[number]
        bins = 20 * len(phonemes) + 40
        offset = ends.get(key, 4016)
        ends[key] = offset + bins * 2048 + 6000
        trials.append(
            TrialRecord(
                session=session,
                split=split,
                key=key,
                trial=f"trial_{within:04d}",
                n_time_steps=bins,
                n_features=512,
                dtype="<f4",
                offset=offset,
                length=bins * 2048,
                crc32=number * 2_654_435_761 % 2**32,
                class_ids=None if split == "test" else encode_diphones(phonemes),
                phoneme_ids=None if split == "test" else phonemes,
                sentence_label=f"sentence {number:08d} of about thirty letters",
                block_num=within // 50,
                trial_num=within,
                corpus="Switchboard",
            )
        )
    files = {key: ObjectInfo(key, end, f"{rng.bytes(16).hex()}-9") for key, end in ends.items()}
    return manifest_of(trials, files, 512)


def as_a_rank(path: Path) -> None:
    """Prints what one process needed, as JSON."""
    world = World.join()
    before = resident_bytes()
    seconds = [time.process_time()]
    manifest = world.from_main(lambda: TrialManifest.from_bytes(path.read_bytes(), "data"))
    seconds.append(time.process_time())
    selection = select_trials(manifest, load_config(None, SETTINGS))
    seconds.append(time.process_time())
    plan = BatchPlan(selection.train, 64, 4, 0)
    batches = [plan.trials(step) for step in range(100)]
    seconds.append(time.process_time())
    assert len(batches) == 100
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    world.meet()
    print(
        json.dumps(
            {
                "seconds": np.diff(seconds).tolist(),
                "resident": resident_bytes() - before,
                "peak": peak - before,
            }
        )
    )
    world.leave()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(path: Path) -> list[dict[str, object]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(os.environ, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    shared |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE), "--rank-of", str(path)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]


def measure_copies(n_files: int = 135, n_trials: int = 83) -> None:
    """The start of a job on data that was copied since it was indexed; trials of 40 bins."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place, serve_s3(Path(place), cached=True) as server:
        os.environ.update(server.environment())
        server.make_bucket("bench")
        folder, copy = Path(place, "bench", "data"), Path(place, "copy")
        for number in range(n_files):
            session, split = f"t15.{2000 + number // 3}.01.01", ("train", "val", "test")[number % 3]
            phonemes = rng.integers(1, 41, 30).astype(np.int32)
            labels = () if split == "test" else (encode_diphones(phonemes), phonemes, "a sentence")
            trials = [
                TrialContents(
                    *(f"trial_{t:04d}", session, 1, t),
                    rng.standard_normal((40, 512)).astype(np.float32),
                    *labels,
                )
                for t in range(n_trials)
            ]
            (folder / session).mkdir(parents=True, exist_ok=True)
            (folder / session / f"data_{split}.hdf5").write_bytes(data_file_bytes(trials))
        manifest = index_dataset(open_store(folder))
        write_manifest(open_store(folder), manifest)
        shutil.copytree(folder, copy)
        print(f"\n| {n_files} files, {len(manifest.trials):,} trials | start, s |\n|---|---|")
        for what, url in (
            ("folder as indexed", folder),
            ("copy of the folder", copy),
            ("the copy again", copy),
            ("uploaded, S3 can tell", "s3://bench/data"),
            ("uploaded, S3 cannot tell", "s3://bench/data"),
            ("the same again", "s3://bench/data"),
        ):
            if what == "uploaded, S3 cannot tell":
                unknown = {
                    key: replace(file, content=replace(file.content, s3_etag=None))
                    for key, file in manifest.files.items()
                }
                write_manifest(open_store(folder), replace(manifest, files=unknown))
            started = time.monotonic()
            load_or_build_manifest(open_store(url), lambda line: None)
            print(f"| {what} | {time.monotonic() - started:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="*", default=[11_162, 100_000, 1_000_000])
    parser.add_argument("--copies", action="store_true", help="only: data that was copied")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        as_a_rank(options.rank_of)
        return
    if options.copies:
        measure_copies()
        return
    print("CPU seconds of the first rank; memory beyond what Python and torch take:\n")
    columns = ["trials", "manifest", "write", "load", "select", "plan 100 batches"]
    columns += ["first rank", "its peak", "further rank", "its peak"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for n_trials in options.trials:
        with tempfile.TemporaryDirectory() as folder:
            manifest = made_up_manifest(n_trials, 300 if n_trials > 50_000 else 45)
            started = time.process_time()
            data = manifest.to_bytes()
            written = time.process_time() - started
            del manifest
            path = Path(folder, "manifest")
            path.write_bytes(data)
            first, further = measure(path)
            cells = [f"{n_trials:,}", f"{len(data) / 1e6:.2f} MB", f"{written:.2f}"]
            cells += [f"{seconds:.2f}" for seconds in first["seconds"]]
            for rank in (first, further):
                cells += [f"{rank[name] / 1e6:,.0f} MB" for name in ("resident", "peak")]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
