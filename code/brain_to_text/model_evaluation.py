"""From a model and a dataset to results: all of `evaluate_model.py`, and a job's last act."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .augmentations import Augmentation
from .config import TrainingConfig
from .dataset_s3 import EvaluationDatasetS3
from .device import autocast_dtype
from .errors import DataError
from .evaluation_results import Evaluation, write_results
from .evaluation_summary import compare, describe, summarise
from .model_artefact import ModelArtefact, open_model
from .object_store import open_store
from .report import read_metrics
from .sentence_decoding import WordOptions, decode_sentences, make_decoder, write_submission
from .trial_decoding import decode_trials, example_trials
from .trial_manifest import TrialManifest, load_or_build_manifest
from .trial_stream import TrialStream

N_EXAMPLES = 4


@dataclass(frozen=True)
class EvaluationOptions:
    """What `evaluate_model.py` was asked to do.

    Attributes:
        model: folder, model.tar.gz or `s3://` URL.
        data: dataset folder or `s3://` URL.
        split: "val", "test" or "train".
        output_dir: where tables and the report go.
        compare_with: another model to test against, or None.
        batch_size: trials per forward pass.
        device: None for the first GPU, else the CPU.
        export_logits: also write phoneme logits for the public language-model server.
        words: decode sentences too, or None.
    """

    model: str
    data: str
    split: str
    output_dir: Path
    compare_with: str | None = None
    batch_size: int = 64
    device: str | None = None
    export_logits: bool = False
    words: WordOptions | None = None


def evaluate_model(options: EvaluationOptions, say: Callable[[str], None] = print) -> Evaluation:
    """Decode a split, score it, write tables and the report to `options.output_dir`.

    Raises:
        BrainToTextError: model, data or output cannot be read, used or written.
    """
    device = torch.device(options.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    say(f"Using device: {device}")
    artefact = open_model(options.model)
    other = open_model(options.compare_with) if options.compare_with else None
    store = open_store(options.data)
    manifest = load_or_build_manifest(store, say)
    chosen = choose_trials(manifest, artefact.sessions, options.split, artefact.config)
    for sentence in chosen.remarks:
        say(sentence)
    stream = TrialStream(store, manifest)
    try:
        run = partial(
            run_model,
            stream=stream,
            split=options.split,
            device=device,
            batch_size=options.batch_size,
        )
        evaluation = run(artefact)
        say(
            f"Decoded {len(evaluation.trials)} trials in {evaluation.seconds:.1f} s: "
            f"{len(evaluation.trials) / max(evaluation.seconds, 1e-9):.1f} trials/s"
        )
        comparison = None
        if other is not None:
            comparison = compare(evaluation.trials, run(other).trials, other.location)
        if options.words is not None:
            evaluation = _add_sentences(options, options.words, evaluation, run)
    finally:
        stream.close()
    for line in describe(evaluation.all_numbers, comparison):
        say(line)
    write_results(
        evaluation, options.output_dir, comparison=comparison, logits=options.export_logits
    )
    say(f"Tables and report.html are in {options.output_dir}")
    return evaluation


def _add_sentences(
    options: EvaluationOptions,
    words: WordOptions,
    evaluation: Evaluation,
    run: Callable[..., Evaluation],
) -> Evaluation:
    """Decode sentences, tuning on the validation split, and write the submission file."""
    decoder, facts = make_decoder(words, evaluation.manifest, options.output_dir)
    tuning = None
    if words.tune and options.split != "val":
        tuning = run(evaluation.artefact, split="val").trials
    with tqdm(unit="setting", disable=not words.tune, desc="Tuning") as bar:
        sentences = decode_sentences(words, decoder, facts, evaluation.trials, tuning, bar.update)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_submission(options.output_dir / "submission.csv", evaluation.trials, sentences.text)
    return dataclasses.replace(evaluation, sentences=sentences)


@dataclass(frozen=True)
class ChosenTrials:
    """Trials by day index, and one sentence for everything left out."""

    by_session: tuple[np.ndarray, ...]
    remarks: tuple[str, ...]


def choose_trials(
    manifest: TrialManifest, sessions: Sequence[str], split: str, config: TrainingConfig
) -> ChosenTrials:
    """The trials of a split that a model with these day layers can decode.

    Raises:
        DataError: none at all, or features of another width.
    """
    if manifest.n_features != config.dataset.neural_dim:
        raise DataError(
            f"The data has {manifest.n_features} features per bin and the model takes "
            f"{config.dataset.neural_dim}: give the dataset the model was trained on."
        )
    listed = {
        (session, int(block), int(trial))
        for session, blocks in (config.dataset.bad_trials_dict or {}).items()
        for block, trials in blocks.items()
        for trial in (trials if isinstance(trials, list) else [trials])
    }
    remarks, chosen = [], []
    too_short = []
    switches = config.dataset.dataset_probability_val or [1.0] * len(sessions)
    for session, switch in zip(sessions, switches, strict=True):
        kept: list[int] = []
        if split == "val" and switch == 0:
            if session in manifest.sessions and manifest.select(split, [session]):
                remarks.append(f"Left out: {session}, 0 in dataset.dataset_probability_val")
            chosen.append(np.array(kept, dtype=np.int64))
            continue
        for index in manifest.select(split, [session]) if session in manifest.sessions else []:
            trial = manifest.trials[index]
            if (session, trial.block_num, trial.trial_num) in listed:
                remarks.append(f"Left out: {trial.name}, listed in dataset.bad_trials_dict")
            elif trial.n_time_steps < config.model.patch_size:
                too_short.append(trial.name)
            else:
                kept.append(index)
        chosen.append(np.array(kept, dtype=np.int64))
    for name in too_short:
        remarks.append(
            f"Left out: {name}, shorter than one patch of {config.model.patch_size} bins"
        )
    strangers = [s for s in manifest.sessions if s not in sessions]
    lost = len(manifest.select(split, strangers)) if strangers else 0
    if lost:
        remarks.append(
            f"Left out: {lost} trials of {len(strangers)} sessions that the model has no day layer "
            f"for ({strangers[0]}{' …' if len(strangers) > 1 else ''})"
        )
    if not any(len(trials) for trials in chosen):
        raise DataError(
            f"The dataset has no {split} trials of the model's {len(sessions)} sessions "
            f"({sessions[0]} … {sessions[-1]}): choose another --split or dataset."
        )
    return ChosenTrials(tuple(chosen), tuple(remarks))


def run_model(
    artefact: ModelArtefact,
    stream: TrialStream,
    split: str,
    device: torch.device,
    batch_size: int = 64,
    progress: bool = True,
) -> Evaluation:
    """Decode one split with one model and score it."""
    config, manifest = artefact.config, stream.manifest
    model = artefact.build(device)
    chosen = choose_trials(manifest, artefact.sessions, split, config)
    dataset = EvaluationDatasetS3(
        stream,
        chosen.by_session,
        batch_size=batch_size,
        device=device,
        feature_subset=config.dataset.feature_subset,
    )
    indices = np.concatenate(chosen.by_session)
    examples = example_trials(manifest, sorted(indices.tolist()), N_EXAMPLES)
    started = time.perf_counter()
    with tqdm(total=len(indices), unit="trial", disable=not progress, desc="Decoding") as bar:
        trials = decode_trials(
            model,
            Augmentation(config.dataset.data_transforms),
            dataset,
            autocast=_autocast(config, device),
            keep_classes=examples,
            progress=bar.update,
        )
    seconds = time.perf_counter() - started
    return Evaluation(artefact, stream.url, split, manifest, trials, summarise(trials), seconds)


def write_run_report(
    model_dir: Path,
    output_dir: Path,
    stream: TrialStream,
    device: torch.device,
    *,
    metrics_file: Path | None = None,
    batch_size: int = 64,
) -> Evaluation:
    """Evaluate the best model of a finished run and leave tables and report.html beside it.

    Args:
        model_dir: holds checkpoint/best_checkpoint and checkpoint/args.yaml.
        output_dir: where the results go.
        stream: the run's own; its cache may still hold the validation trials.
        metrics_file: the run's metrics.jsonl, for the curves.

    Raises:
        CheckpointError: no model there. StorageError: data or results cannot be read or written.
    """
    artefact = open_model(model_dir)
    if metrics_file is not None:
        artefact = dataclasses.replace(artefact, metrics=read_metrics(metrics_file))
    evaluation = run_model(artefact, stream, "val", device, batch_size, progress=False)
    write_results(evaluation, output_dir)
    return evaluation


def _autocast(
    config: TrainingConfig, device: torch.device
) -> Callable[[], AbstractContextManager[object]]:
    dtype = autocast_dtype(config, device)
    if dtype is None:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=dtype)
