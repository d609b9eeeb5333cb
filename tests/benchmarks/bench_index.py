"""What the trial manifest costs: its size at full scale, and the requests that make and read it.

    python tests/benchmarks/bench_index.py

Full scale: 45 sessions, 11,162 trials with labels, sentences and plausible byte offsets (no data is
needed for that). Indexing: a set of 160 trials of 512 features on a real S3 server behind a
counting proxy.
"""

# ruff: noqa: E402 (the path to the code comes first)

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2] / "code"), str(HERE.parents[1])]

import numpy as np
from brain_to_text.dataset.indexing import index_dataset, load_or_build_manifest
from brain_to_text.dataset.manifest import TrialManifest, load_manifest
from brain_to_text.dataset.synthetic import (
    SyntheticDataset,
    random_sentences,
    sentence_phonemes,
    synthesize,
)
from brain_to_text.dataset.trial_record import ChunkLayout, TrialRecord
from brain_to_text.labels.diphones import encode_diphones
from brain_to_text.labels.recording_blocks import recording_blocks
from brain_to_text.storage.locations import ObjectInfo
from brain_to_text.storage.store import open_store
from support.fault_proxy import run_proxy
from support.local_s3 import serve_s3
from support.manifests import manifest_of


def full_size_manifest(compressed: bool) -> TrialManifest:
    """As `index` would make it for the real recordings, with invented offsets and checksums."""
    rng = np.random.default_rng(0)
    trials, ends = [], {}
    for block in recording_blocks():
        for number, sentence in enumerate(random_sentences(block.sentences, rng)):
            split = ("val", "test")[number % 2] if block.held_out else "train"
            key = f"{block.session}/data_{split}.hdf5"
            phonemes = sentence_phonemes(sentence)
            bins = int(rng.gamma(8.0, 28 / 8, len(phonemes)).sum() + 30)
            offset, length, chunks = ends.get(key, 4016), bins * 2048, None
            if compressed:
                sizes = rng.integers(215_000, 225_000, -(-bins // 128))
                table = np.zeros((len(sizes), 5), np.int64)
                table[:, 0] = 128 * np.arange(len(sizes))
                table[:, 2], table[:, 3] = np.cumsum(sizes) - sizes, sizes
                length, chunks = (
                    int(sizes.sum()),
                    ChunkLayout((128, 512), ("shuffle", "gzip"), table),
                )
            ends[key] = offset + length + 6000
            labelled = split != "test"
            trials.append(
                TrialRecord(
                    session=block.session,
                    split=split,
                    key=key,
                    trial=f"trial_{len(trials):05d}",
                    n_time_steps=bins,
                    n_features=512,
                    dtype="<f4",
                    offset=offset,
                    length=length,
                    chunks=chunks,
                    crc32=int(rng.integers(2**32)),
                    class_ids=encode_diphones(phonemes) if labelled else None,
                    phoneme_ids=phonemes if labelled else None,
                    sentence_label=sentence if labelled else None,
                    block_num=block.block,
                    trial_num=number,
                    corpus=block.corpus,
                )
            )
    files = {key: ObjectInfo(key, end, f"{rng.bytes(16).hex()}-9") for key, end in ends.items()}
    return manifest_of(trials, files, 512)


def measure_size() -> None:
    print("| 45 sessions, 11,162 trials | bytes gzipped | write, CPU s | read, CPU s |")
    print("|---|---|---|---|")
    for layout in ("contiguous", "gzip chunks of 128 bins"):
        manifest = full_size_manifest(layout != "contiguous")
        started = time.process_time()
        data = manifest.to_bytes()
        written = time.process_time()
        TrialManifest.from_bytes(data, "data")
        read = time.process_time()
        print(f"| {layout} | {len(data):,} | {written - started:.2f} | {read - written:.2f} |")


def measure_requests() -> None:
    with tempfile.TemporaryDirectory() as folder, serve_s3(Path(folder), cached=True) as server:
        os.environ.update(server.environment())
        server.make_bucket("bench")
        dataset = SyntheticDataset(
            sessions=4,
            train_trials=32,
            val_trials=8,
            test_trials=0,
            electrodes=256,
            bins_per_phoneme=28.0,
        )
        store = open_store("s3://bench/data")
        manifest = synthesize(store, dataset)
        size = sum(record.size for record in manifest.files.values())
        with run_proxy(server.endpoint_url) as proxy:
            os.environ["AWS_ENDPOINT_URL_S3"] = proxy.url
            print(f"\n| {len(manifest.files)} files, {size / 1e6:.0f} MB | GETs | LISTs | MB | s |")
            print("|---|---|---|---|---|")
            store = open_store("s3://bench/data")
            for name, action in (
                ("index (1 process)", lambda: index_dataset(store, processes=1)),
                ("index (2 processes)", lambda: index_dataset(store, processes=2)),
                ("start of a job: manifest there", lambda: load_or_build_manifest(store, print)),
                ("manifest alone", lambda: load_manifest(store)),
            ):
                proxy.reset_counts()
                started = time.monotonic()
                action()
                counts = proxy.counts
                gets = counts.ranged_gets + counts.other_gets
                seconds = time.monotonic() - started
                megabytes = counts.body_bytes / 1e6
                print(f"| {name} | {gets} | {counts.lists} | {megabytes:.2f} | {seconds:.1f} |")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    measure_size()
    measure_requests()
