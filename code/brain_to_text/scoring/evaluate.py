"""From a model and a dataset to results: all of `evaluate_model.py`, and a job's last act."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..config import TrainingConfig
from ..dataset.manifest import TrialManifest, load_or_build_manifest
from ..dataset.selection import bad_trials
from ..dataset.store import open_store
from ..errors import ConfigError, DataError
from ..model.augmentations import Augmentation
from ..model.device import autocast_dtype
from ..streaming.dataset_s3 import EvaluationDatasetS3
from ..streaming.trial_stream import TrialStream
from .report import read_metrics
from .sentence_decoding import (
    WordOptions,
    check_words,
    decode_sentences,
    decodings,
    empty_rows,
    make_decoder,
    submission_remark,
)
from .summary import compare, describe, label_form_remark, summarise
from .tables import Evaluation, complete_or_nothing, write_results
from .trained_model import ModelArtefact, open_model
from .trial_decoding import decode_trials, example_trials
from .words import WordDecoder

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
    batch_size: int = 128
    device: str | None = None
    export_logits: bool = False
    words: WordOptions | None = None


def evaluate_model(options: EvaluationOptions, say: Callable[[str], None] = print) -> Evaluation:
    """Decode a split, score it, write tables and the report to `options.output_dir`.

    What can be known to fail fails before anything is decoded, and results are written completely
    or not at all.

    Raises:
        BrainToTextError: model, data or output cannot be read, used or written.
    """
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size is {options.batch_size}: give at least 1 trial.")
    device = _device(options.device)
    say(f"Using device: {device}")
    if options.words is not None:
        check_words(options.words)
    with complete_or_nothing(options.output_dir) as folder:
        evaluation = _evaluate(options, device, folder, say)
    say(f"Tables and report.html are in {options.output_dir}")
    return evaluation


def _evaluate(
    options: EvaluationOptions, device: torch.device, folder: Path, say: Callable[[str], None]
) -> Evaluation:
    """All of `evaluate_model` between the first checks and the results' final place."""
    artefact = open_model(options.model)
    other = open_model(options.compare_with) if options.compare_with else None
    store = open_store(options.data)
    manifest = load_or_build_manifest(store, say)
    chosen = choose_trials(manifest, artefact.sessions, options.split, artefact.config)
    for sentence in chosen.remarks:
        say(sentence)
    decoder: WordDecoder | None = None
    facts: dict[str, str] = {}
    if options.words is not None:
        decoder, facts = make_decoder(options.words, manifest, folder)
        for name, fact in facts.items():
            say(f"{name}: {fact}")
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
        if options.words is not None and decoder is not None:
            evaluation = _add_sentences(options.words, decoder, facts, evaluation, run)
    finally:
        stream.close()
    for sentence in evaluation.remarks[len(chosen.remarks) :]:
        say(sentence)
    for line in describe(evaluation.all_numbers, comparison):
        say(line)
    write_results(evaluation, folder, comparison=comparison, logits=options.export_logits)
    return evaluation


def _add_sentences(
    words: WordOptions,
    decoder: WordDecoder,
    facts: Mapping[str, str],
    evaluation: Evaluation,
    run: Callable[..., Evaluation],
) -> Evaluation:
    """Decode sentences, with weights tuned on the validation split where asked."""
    tuning = None
    if words.tune and evaluation.split != "val":
        tuning = run(evaluation.artefact, split="val").trials
    total = decodings(words, evaluation.trials, tuning)
    with tqdm(total=total, unit="sentence", desc="Sentences") as bar:
        sentences = decode_sentences(words, decoder, facts, evaluation.trials, tuning, bar.update)
    manifest, split = evaluation.manifest, evaluation.split
    rows = len(manifest.select(split))
    empty = empty_rows(manifest, split, sentences.text)
    sentences.summary["submission"] = {"rows": rows, "empty": empty}
    remark = submission_remark(rows, empty)
    return dataclasses.replace(
        evaluation, sentences=sentences, remarks=(*evaluation.remarks, remark)
    )


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
        ConfigError: dataset.bad_trials_dict lists something else than trials.
    """
    if manifest.n_features != config.dataset.neural_dim:
        raise DataError(
            f"The data has {manifest.n_features} features per bin and the model takes "
            f"{config.dataset.neural_dim}: give the dataset the model was trained on."
        )
    remarks, chosen = [], []
    too_short = []
    switches = config.dataset.dataset_probability_val or [1.0] * len(sessions)
    for session, switch in zip(sessions, switches, strict=True):
        kept: list[int] = []
        bad = bad_trials(config, session)
        if split == "val" and switch == 0:
            if session in manifest.sessions and manifest.select(split, [session]):
                remarks.append(f"Left out: {session}, 0 in dataset.dataset_probability_val")
            chosen.append(np.array(kept, dtype=np.int64))
            continue
        for index in manifest.select(split, [session]) if session in manifest.sessions else []:
            trial = manifest.trials[index]
            if (trial.block_num, trial.trial_num) in bad:
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
    batch_size: int = 128,
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
            label_form=artefact.label_form,
            progress=bar.update,
        )
    seconds = time.perf_counter() - started
    doubt = label_form_remark(trials, artefact.label_form, manifest.label_form)
    return Evaluation(
        artefact,
        stream.url,
        split,
        manifest,
        trials,
        summarise(trials),
        seconds,
        remarks=(*chosen.remarks, *([doubt] if doubt else [])),
    )


def write_run_report(
    model_dir: Path,
    output_dir: Path,
    stream: TrialStream,
    device: torch.device,
    *,
    metrics_file: Path | None = None,
    batch_size: int = 128,
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
    with complete_or_nothing(output_dir) as folder:
        write_results(evaluation, folder)
    return evaluation


def _device(name: str | None) -> torch.device:
    """The named device, or the first GPU, else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name or ("cuda:0" if n_gpus else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name} is no device: give cpu, or cuda:0 for the first GPU.")
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        raise ConfigError(
            f"--device {name} is not there: torch {torch.__version__} sees {n_gpus} GPUs; give "
            "cpu, or leave --device away."
        )
    return device


def _autocast(
    config: TrainingConfig, device: torch.device
) -> Callable[[], AbstractContextManager[object]]:
    dtype = autocast_dtype(config, device)
    if dtype is None:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=dtype)
