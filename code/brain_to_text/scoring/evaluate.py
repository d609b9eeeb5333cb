"""From models and a dataset to results: all of `evaluate_model.py`, and a job's last act."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..dataset.indexing import load_or_build_manifest
from ..dataset.selection import select_for_evaluation
from ..errors import ConfigError, DataError
from ..labels.diphones import LABEL_FORMS
from ..model.augmentations import Augmentation
from ..model.device import autocast_dtype
from ..model.trained_model import ModelArtefact, open_model
from ..storage.ownership import lies_in
from ..storage.store import open_store
from ..streaming.dataset_s3 import EvaluationDatasetS3
from ..streaming.trial_stream import TrialStream
from .decoding import DecodedSplit, DecodedTrial, Inference, decode, greedy_decode
from .output_files import RESULTS, check_results, result_folder, write_results, writing_to
from .sentences import check_words, choose_weights, make_decoder, search
from .summary import Evaluation, compare, describe
from .tables import n_best_rows, rescored_sentences, submission_remark
from .word_decoder import WordOptions

N_EXAMPLES = 4


def evaluate_model(
    models: Sequence[str],
    data: str,
    split: str,
    output_dir: Path,
    *,
    compare_with: str | None = None,
    batch_size: int = 128,
    export_logits: bool = False,
    words: WordOptions | None = None,
    overwrite: bool = False,
) -> Evaluation:
    """Decode a split, score it, write tables and the report; on the first GPU, else on the CPU.

    What can be known to fail fails before anything is decoded or written, and results are written
    completely or not at all.

    Args:
        models: folder, model.tar.gz or `s3://` URL; several are an ensemble.
        data: dataset folder or `s3://` URL.
        split: "val", "test" or "train".
        output_dir: where tables and the report go.
        compare_with: another model to test against, or None.
        batch_size: trials per forward pass.
        export_logits: also write phoneme logits for the public language-model server.
        words: decode or score sentences too, or None.
        overwrite: replace results of another model, dataset or split in output_dir.

    Raises:
        BrainToTextError: model, data or output cannot be read, used or written.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch-size is {batch_size}: give at least 1 trial.")
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    print(f"Using device: {device}")
    if words is not None:
        check_words(words)
    if lies_in(str(output_dir), data):
        raise ConfigError(
            f"--output-dir {output_dir} lies in the dataset {data}: give a folder beside it."
        )
    files = (words.language_model, words.lexicon, words.rescored) if words is not None else ()
    purpose = {"model": " + ".join(models), "data": data, "split": split}
    check_results(output_dir, purpose, overwrite, [Path(file) for file in files if file])

    artefacts = [open_model(model) for model in models]
    _check_ensemble(artefacts)
    rival = open_model(compare_with) if compare_with else None
    store = open_store(data)
    manifest = load_or_build_manifest(store, print, splits=(split,))
    chosen = [
        set(np.concatenate(select_for_evaluation(manifest, a.config, a.sessions, split)[0]))
        for a in (*artefacts, *([rival] if rival else []))
    ]
    text: dict[int, str] = {}
    if words is not None and words.rescored is not None:
        shared = sorted(set.intersection(*chosen[: len(artefacts)]))
        text = rescored_sentences(words.rescored, {manifest.trials[i].name: i for i in shared})
    with (
        result_folder(output_dir, RESULTS) as folder,
        closing(TrialStream(store, manifest)) as stream,
    ):
        decoder = None
        if words is not None and words.rescored is None:
            with writing_to(output_dir):
                decoder, facts = make_decoder(words, manifest, folder, split)
            for name, fact in facts.items():
                print(f"{name}: {fact}")
        run = partial(run_model, stream=stream, device=device, batch_size=batch_size)
        members = [run(artefact, split=split) for artefact in artefacts]
        seconds = sum(member.seconds for member in members)
        print(
            f"Decoded {len(members[0].trials)} trials in {seconds:.1f} s: "
            f"{sum(len(m.trials) for m in members) / max(seconds, 1e-9):.1f} trials/s"
        )
        evaluation = combine(members)
        if rival is not None:
            others = run(rival, split=split).trials
            comparison = compare(evaluation.trials, others, rival.location)
            evaluation = replace(evaluation, comparison=comparison)
        if words is not None and decoder is not None:
            tuning = None
            if words.tune_words and split != "val":
                tuning = combine([run(a, split="val") for a in artefacts]).trials
            weights = choose_weights(words, decoder, evaluation.trials, tuning)
            found = search(decoder, evaluation.trials, weights)
            evaluation = replace(
                evaluation,
                trials=found.of(evaluation.trials),
                words={**facts, **found.weights()},
                nbest=n_best_rows(evaluation.trials, found) if words.nbest > 1 else (),
                members=tuple(
                    replace(m, trials=search(decoder, m.trials, weights).of(m.trials))
                    for m in evaluation.members
                ),
            )
        elif words is not None:
            evaluation = replace(
                evaluation,
                trials=[replace(t, sentence=text[t.index]) for t in evaluation.trials],
                words={"Sentences": f"those with the best score in {words.rescored}"},
            )
        if words is not None:
            remark = submission_remark(manifest, split, evaluation.trials)
            evaluation = replace(evaluation, remarks=(*evaluation.remarks, remark))
        for line in (*evaluation.remarks, *describe(evaluation.summary)):
            print(line)
        write_results(evaluation, folder, logits=export_logits)
    print(f"Tables and report.html are in {output_dir}")
    return evaluation


# --- ensembles ------------------------------------------------------------------------------------


def _check_ensemble(artefacts: Sequence[ModelArtefact]) -> None:
    """Raises: ConfigError: models whose frames are not at the same times."""
    first = artefacts[0]
    for other in artefacts[1:]:
        for key in ("patch_size", "patch_stride"):
            one, another = (getattr(a.config.model, key) for a in (first, other))
            if one != another:
                raise ConfigError(
                    f"model.{key} is {one} in {first.location} and {another} in {other.location}: "
                    "models of an ensemble need frames at the same times; evaluate them apart, "
                    "with --compare-with."
                )


def combine(members: Sequence[Evaluation]) -> Evaluation:
    """An ensemble: the mean of its members' (marginalised) phoneme log-probabilities, decoded.

    Only trials that every member decoded take part; there is no DER, as the mean has no diphones.
    One member alone is the whole.

    Raises:
        DataError: the members share no trial.
    """
    first = members[0]
    if len(members) == 1:
        return first
    by_index = [{trial.index: trial for trial in member.trials} for member in members]
    shared = sorted(set.intersection(*(set(trials) for trials in by_index)))
    if not shared:
        raise DataError(
            "The models of this ensemble share no trial: give models that were trained on the "
            "same sessions."
        )
    trials = []
    for index in shared:
        mean = np.mean([trials_of[index].phoneme_log_probs for trials_of in by_index], axis=0)
        mean -= np.logaddexp.reduce(mean, axis=-1, keepdims=True)
        alike = by_index[0][index]
        trials.append(
            DecodedTrial(
                index=index,
                record=alike.record,
                reference=alike.reference,
                hypothesis=greedy_decode(mean.argmax(-1)[None], np.array([len(mean)]))[0],
                phoneme_log_probs=mean,
            )
        )
    remarks = []
    for member in members:
        remarks += [f"{member.artefact.location}: {remark}" for remark in member.remarks]
        if lost := len(member.trials) - len(shared):
            remarks.append(
                f"Left out: {lost:,} trials that {member.artefact.location} decoded and another "
                "model of the ensemble did not"
            )
    shown = set(example_trials(trials))
    return replace(
        first,
        trials=trials,
        examples={t.index: t.phoneme_log_probs for t in trials if t.index in shown},
        seconds=sum(member.seconds for member in members),
        remarks=tuple(remarks),
        members=tuple(
            replace(member, trials=[trials_of[index] for index in shared])
            for member, trials_of in zip(members, by_index, strict=True)
        ),
    )


# --- one model ------------------------------------------------------------------------------------


def run_model(
    artefact: ModelArtefact,
    stream: TrialStream,
    split: str,
    device: torch.device,
    batch_size: int = 128,
    decoded: DecodedSplit | None = None,
) -> Evaluation:
    """Decode one split with one model.

    Args:
        decoded: the trials, where this model has decoded them already.
    """
    config, manifest = artefact.config, stream.manifest
    chosen, remarks = select_for_evaluation(manifest, config, artefact.sessions, split)
    dtype = autocast_dtype(config, device)
    cast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
    augmentation = Augmentation(config.dataset.data_transforms)
    inference = Inference(artefact.build(device), augmentation, cast)
    dataset_of = partial(
        EvaluationDatasetS3,
        stream,
        batch_size=batch_size,
        device=device,
        feature_subset=config.dataset.feature_subset,
    )
    run = partial(decode, inference, label_form=artefact.label_form)
    if decoded is None:
        n_trials = sum(map(len, chosen))
        with tqdm(total=n_trials, unit="trial", disable=None, desc="Decoding") as bar:
            decoded = run(dataset_of(chosen), probabilities=True, progress=bar.update)
        assert decoded is not None  # nothing stops it
    shown = example_trials(decoded.trials)
    again = run(dataset_of([np.intersect1d(trials, shown) for trials in chosen]), keep_logits=True)
    assert again is not None and again.logits is not None
    form, data_form = artefact.label_form, manifest.label_form
    if form not in (None, data_form) and data_form in LABEL_FORMS:
        remarks += (
            f"WARNING: the model was trained on {form} labels and the data has {data_form} labels: "
            f"its diphones are read as {form}, and there is no DER; for one, type 'python "
            f"code/prepare_dataset.py encode SOURCE TARGET --form {form}'",
        )
    return Evaluation(
        artefact,
        stream.url,
        split,
        manifest,
        decoded.trials,
        decoded.seconds,
        examples={i: again.logits[i].float().log_softmax(-1).numpy() for i in shown},
        remarks=remarks,
    )


def example_trials(trials: Sequence[DecodedTrial]) -> list[int]:
    """A few trials to look at, by index: the worst, then typical ones.

    Without labels they are spread over the recording.
    """
    rates = {trial.index: trial.errors["PER"].rate for trial in trials if trial.reference}
    if not rates:
        spread = np.linspace(0, len(trials) - 1, min(N_EXAMPLES, len(trials)))
        return [trials[int(position)].index for position in spread]
    worst = sorted(rates, key=lambda index: -rates[index])[: N_EXAMPLES // 2]
    median = float(np.median(list(rates.values())))
    typical = sorted(rates.keys() - worst, key=lambda index: (abs(rates[index] - median), index))
    return worst + typical[: N_EXAMPLES - len(worst)]


def write_run_report(
    model_dir: Path,
    output_dir: Path,
    stream: TrialStream,
    device: torch.device,
    *,
    batch_size: int = 128,
    decoded: DecodedSplit | None = None,
    job: Mapping[str, str] | None = None,
) -> Evaluation:
    """Evaluate the best model of a finished run and leave tables and report.html beside it.

    Args:
        model_dir: holds checkpoint/best_checkpoint, checkpoint/args.yaml and training_log.
        output_dir: where the results go; those of the run's earlier starts are replaced.
        stream: the run's own; its cache may still hold the validation trials.
        decoded: the best model's validation, where this job made it.
        job: facts about the job, for people.

    Raises:
        CheckpointError: no model there. StorageError: data or results cannot be read or written.
    """
    evaluation = run_model(open_model(model_dir), stream, "val", device, batch_size, decoded)
    with result_folder(output_dir) as folder:
        write_results(replace(evaluation, job=job or {}), folder)
    return evaluation
