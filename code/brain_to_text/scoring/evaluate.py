"""From models and a dataset to results: all of `evaluate_model.py`, and a job's last act."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..config import TrainingConfig
from ..dataset.indexing import load_or_build_manifest
from ..dataset.manifest import TrialManifest
from ..dataset.selection import select_for_evaluation
from ..errors import ConfigError, DataError
from ..model.augmentations import Augmentation
from ..model.device import autocast_dtype
from ..storage.store import open_store
from ..streaming.dataset_s3 import EvaluationDatasetS3
from ..streaming.trial_stream import TrialStream
from .decoding import DecodedTrial, decode_trials
from .results import Evaluation, complete_or_nothing, write_results
from .summary import compare, describe, label_form_remark, summarise
from .tables import HYPOTHESES, empty_rows, read_table, rescored_sentences, submission_remark
from .trained_model import ModelArtefact, open_model
from .word_decoder import WordDecoder
from .words import (
    DecodedSentences,
    WordOptions,
    check_words,
    decode_sentences,
    decodings,
    make_decoder,
    score_sentences,
    training_sentences,
)

N_EXAMPLES = 4


@dataclass(frozen=True)
class EvaluationOptions:
    """What `evaluate_model.py` was asked to do.

    Attributes:
        models: folder, model.tar.gz or `s3://` URL; several are an ensemble.
        data: dataset folder or `s3://` URL.
        split: "val", "test" or "train".
        output_dir: where tables and the report go.
        compare_with: another model to test against, or None.
        batch_size: trials per forward pass.
        device: None for the first GPU, else the CPU.
        export_logits: also write phoneme logits for the public language-model server.
        words: decode or score sentences too, or None.
        overwrite: replace results of another model, dataset or split in output_dir.
    """

    models: Sequence[str]
    data: str
    split: str
    output_dir: Path
    compare_with: str | None = None
    batch_size: int = 128
    device: str | None = None
    export_logits: bool = False
    words: WordOptions | None = None
    overwrite: bool = False


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
    words = options.words
    if words is not None:
        check_words(words)
        if words.rescored is not None:
            read_table(words.rescored, HYPOTHESES)
    purpose = {
        "model": " + ".join(options.models),
        "data": options.data,
        "split": options.split,
    }
    place, data = (Path(os.path.realpath(p)) for p in (options.output_dir, options.data))
    if "://" not in options.data and data in (place, *place.parents):
        raise ConfigError(
            f"--output-dir {options.output_dir} lies in the dataset {options.data}: give a folder "
            "beside it."
        )
    files = (words.language_model, words.lexicon, words.rescored) if words is not None else ()
    reads = [Path(file) for file in files if file]
    with complete_or_nothing(options.output_dir, purpose, options.overwrite, reads) as folder:
        evaluation = _evaluate(options, device, folder, say)
    say(f"Tables and report.html are in {options.output_dir}")
    return evaluation


def _evaluate(
    options: EvaluationOptions, device: torch.device, folder: Path, say: Callable[[str], None]
) -> Evaluation:
    """All of `evaluate_model` between the first checks and the results' final place."""
    artefacts = [open_model(model) for model in options.models]
    _check_ensemble(artefacts)
    other = open_model(options.compare_with) if options.compare_with else None
    store = open_store(options.data)
    manifest = load_or_build_manifest(store, say)
    said: set[str] = set()
    for artefact in artefacts:
        _, remarks = select_for_evaluation(
            manifest, artefact.config, artefact.sessions, options.split
        )
        whose = f"{artefact.location}: " if artefacts[1:] else ""
        said |= {f"{whose}{sentence}" for sentence in remarks}
        for sentence in remarks:
            say(f"{whose}{sentence}")
    decoder: WordDecoder | None = None
    facts: dict[str, str] = {}
    if options.words is not None and options.words.rescored is None:
        decoder, facts = make_decoder(options.words, manifest, folder, options.split)
        for name, fact in facts.items():
            say(f"{name}: {fact}")
    stream = TrialStream(store, manifest)
    run = partial(run_model, stream=stream, device=device, batch_size=options.batch_size)
    try:
        members = [run(artefact, split=options.split) for artefact in artefacts]
        seconds = sum(member.seconds for member in members)
        say(
            f"Decoded {len(members[0].trials)} trials in {seconds:.1f} s: "
            f"{sum(len(m.trials) for m in members) / max(seconds, 1e-9):.1f} trials/s"
        )
        evaluation = combine(members) if len(members) > 1 else members[0]
        comparison = None
        if other is not None:
            rival = run(other, split=options.split).trials
            comparison = compare(evaluation.trials, rival, other.location)
        if options.words is not None:
            tuning = None
            if options.words.tune and options.split != "val":
                on_val = [run(artefact, split="val") for artefact in artefacts]
                tuning = (combine(on_val) if len(on_val) > 1 else on_val[0]).trials
            evaluation = _add_sentences(
                options.words, decoder, facts, evaluation, tuning, members if members[1:] else ()
            )
    finally:
        stream.close()
    for sentence in evaluation.remarks:
        if sentence not in said:
            say(sentence)
    for line in describe(evaluation.all_numbers, comparison):
        say(line)
    write_results(evaluation, folder, comparison=comparison, logits=options.export_logits)
    return evaluation


def _add_sentences(
    words: WordOptions,
    decoder: WordDecoder | None,
    facts: Mapping[str, str],
    evaluation: Evaluation,
    tuning: Sequence[DecodedTrial] | None,
    members: Sequence[Evaluation],
) -> Evaluation:
    """Sentences and their error rates, those of an ensemble's members too."""
    trials, manifest, split = evaluation.trials, evaluation.manifest, evaluation.split
    trained_on = set(training_sentences(manifest))
    summary = evaluation.summary
    if decoder is None:
        assert words.rescored is not None
        text = rescored_sentences(words.rescored, trials)
        facts = {"Sentences": f"those with the best score in {words.rescored}"}
        sentences = score_sentences(trials, text, facts, trained_on)
    else:
        total = decodings(words, trials, tuning) + len(members) * len(trials)
        with tqdm(total=total, unit="sentence", desc="Sentences") as bar:
            sentences = decode_sentences(
                words, decoder, facts, trials, tuning, bar.update, trained_on
            )
            if members:
                rows = [
                    _with_words(row, member, decoder, sentences, bar.update)
                    for row, member in zip(summary["members"], members, strict=True)
                ]
                summary = {**summary, "members": rows}
    rows_written = len(manifest.select(split))
    empty = empty_rows(manifest, split, sentences.text)
    sentences.summary["submission"] = {"rows": rows_written, "empty": empty}
    remark = submission_remark(rows_written, empty)
    return dataclasses.replace(
        evaluation,
        sentences=sentences,
        summary=summary,
        remarks=(*evaluation.remarks, remark),
    )


def _with_words(
    row: dict[str, Any],
    member: Evaluation,
    decoder: WordDecoder,
    whole: DecodedSentences,
    progress: Callable[[], object],
) -> dict[str, Any]:
    """An ensemble member's row with its word error rate, at the weights used for the whole."""
    text = {}
    shared = [trial for trial in member.trials if trial.index in whole.settings]
    for trial in shared:
        text[trial.index] = decoder.decode(trial.phoneme_log_probs, whole.settings[trial.index])
        progress()
    own = score_sentences(shared, text, {}).summary
    return {**row, "rates": {**row["rates"], "WER": own["WER"]}} if "WER" in own else row


# --- ensembles ------------------------------------------------------------------------------------


def _check_ensemble(artefacts: Sequence[ModelArtefact]) -> None:
    """Raises: ConfigError: models whose frames are not at the same times."""
    first = artefacts[0]
    for other in artefacts[1:]:
        for key in ("patch_size", "patch_stride"):
            mine, theirs = (getattr(a.config.model, key) for a in (first, other))
            if mine != theirs:
                raise ConfigError(
                    f"model.{key} is {mine} in {first.location} and {theirs} in {other.location}: "
                    "models of an ensemble need frames at the same times; evaluate them apart, "
                    "with --compare-with."
                )


def combine(members: Sequence[Evaluation]) -> Evaluation:
    """An ensemble: the mean of its members' (marginalised) phoneme log-probabilities, decoded.

    Only trials that every member decoded take part; there is no DER, as the mean has no diphones.

    Raises:
        DataError: the members share no trial.
    """
    first, manifest = members[0], members[0].manifest
    by_index = [{trial.index: trial for trial in member.trials} for member in members]
    shared = sorted(set.intersection(*(set(trials) for trials in by_index)))
    if not shared:
        raise DataError(
            "The models of this ensemble share no trial: give models that were trained on the "
            "same sessions."
        )
    examples = example_trials(manifest, shared, N_EXAMPLES)
    trials = []
    for index in shared:
        mean = np.mean([trials_of[index].phoneme_log_probs for trials_of in by_index], axis=0)
        mean -= np.logaddexp.reduce(mean, axis=-1, keepdims=True)
        kept = mean if index in examples else None
        trials.append(
            DecodedTrial.of_phonemes(index, manifest.trials[index], mean, class_log_probs=kept)
        )
    rows, remarks = [], []
    for member, trials_of in zip(members, by_index, strict=True):
        own = [trials_of[index] for index in shared]
        row = {
            "model": member.artefact.location,
            "step": member.artefact.step,
            "rates": summarise(own).get("rates", {}),
        }
        if any(trial.reference for trial in own):
            row["comparison"] = compare(trials, own, member.artefact.location)["metrics"]["PER"]
        rows.append(row)
        remarks += [f"{member.artefact.location}: {remark}" for remark in member.remarks]
        if lost := len(trials_of) - len(shared):
            remarks.append(
                f"Left out: {lost:,} trials that {member.artefact.location} decoded and another "
                "model of the ensemble did not"
            )
    summary = {**summarise(trials, set(training_sentences(manifest))), "members": rows}
    return dataclasses.replace(
        first,
        trials=trials,
        summary=summary,
        seconds=sum(member.seconds for member in members),
        remarks=tuple(remarks),
        model=" + ".join(member.artefact.location for member in members),
    )


# --- one model ------------------------------------------------------------------------------------


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
    chosen, remarks = select_for_evaluation(manifest, config, artefact.sessions, split)
    dataset = EvaluationDatasetS3(
        stream,
        chosen,
        batch_size=batch_size,
        device=device,
        feature_subset=config.dataset.feature_subset,
    )
    indices = np.concatenate(chosen)
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
        summarise(trials, set(training_sentences(manifest))),
        seconds,
        remarks=(*remarks, *([doubt] if doubt else [])),
    )


def example_trials(manifest: TrialManifest, trials: Collection[int], most: int) -> list[int]:
    """Up to `most` trials to look at: the middle ones of sessions spread over the recording."""
    by_session: dict[str, list[int]] = {}
    for index in trials:
        by_session.setdefault(manifest.trials[index].session, []).append(index)
    sessions = sorted(by_session)
    places = np.unique(np.linspace(0, len(sessions) - 1, min(most, len(sessions))).round())
    return [by_session[sessions[int(p)]][len(by_session[sessions[int(p)]]) // 2] for p in places]


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
        output_dir: where the results go; those of the run's earlier starts are replaced.
        stream: the run's own; its cache may still hold the validation trials.
        metrics_file: the run's metrics.jsonl, for the curves.

    Raises:
        CheckpointError: no model there. StorageError: data or results cannot be read or written.
    """
    artefact = open_model(model_dir)
    if metrics_file is not None:
        artefact = dataclasses.replace(artefact, metrics=read_metrics(metrics_file))
    evaluation = run_model(artefact, stream, "val", device, batch_size, progress=False)
    with complete_or_nothing(output_dir, overwrite=True) as folder:
        write_results(evaluation, folder)
    return evaluation


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of a run's metrics.jsonl by kind ("train", "validation"); {} without a file."""
    rows: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.setdefault(row.pop("kind"), []).append(row)
    return rows


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
