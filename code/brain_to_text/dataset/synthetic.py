"""Synthetic recordings of attempted speech: same files as the real dataset, and really learnable.

Every phoneme has a place in a small articulatory space; each onset is pulled towards a place that
depends on the pair (previous, current), so that diphones carry information of their own. Electrodes
read that space through a mixing matrix which drifts, and a share of which is swapped, from session
to session, so that a decoder needs its day layers. Threshold crossings are Poisson counts, spike
power is gamma noise around the same rate, both z-scored per block.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..labels.diphones import N_DIPHONES, LabelForm, encode_diphones
from ..labels.phonemes import N_PHONEMES, SILENCE, phoneme_ids
from ..labels.recording_blocks import RecordingBlock, recording_blocks
from ..storage.store import ObjectStore
from .hdf5_reader import FileInspection, inspect_file
from .hdf5_writer import TrialContents, data_file_bytes
from .isolation import Progress
from .making import DatasetInMaking, Origin, signed
from .manifest import TrialManifest

PATCH_SIZE, PATCH_STRIDE = 14, 4  # trials are long enough for CTC at this patching
_ARTICULATORS = 16  # dimensions of the articulatory space
_ONSET_BINS = 3.0  # time constant of the pull at a phoneme's onset
_BASE_RATE = 0.5  # threshold crossings per 20 ms bin at rest, i.e. 25 per second
_POWER_SHAPE = 4.0  # shape of the gamma noise on spike power
_VOCABULARY = 60  # words of the 372, about
_BLOCK_TRIALS = 50  # at most, in all but the last block
# Each item is a word class; "?" after it: present half of the time. NP is a noun phrase.
_TEMPLATES = (
    "subject auxiliary verb NP",
    "subject auxiliary verb NP adverb?",
    "subject verb NP preposition NP",
    "subject adverb? verb NP",
    "NP auxiliary verb NP",
    "question auxiliary subject verb NP",
    "auxiliary subject verb NP preposition? NP",
    "greeting subject auxiliary verb NP",
    "subject verb NP conjunction subject verb NP",
    "adverb subject auxiliary verb preposition NP",
)
_NOUN_PHRASES = ("determiner noun", "possessive noun", "determiner adjective noun")


@dataclass(frozen=True)
class SyntheticDataset:
    """What to make. The defaults train in minutes on a CPU with rnn_args_smoke.yaml.

    sessions: how many of the 45 real session names, in order of date.
    train_trials, val_trials, test_trials: per session.
    electrodes: two features each (threshold crossings, then spike power).
    bins_per_phoneme: mean duration in 20 ms bins.
    gain: how strongly articulation modulates firing; the signal-to-noise ratio.
    session_change: 0 (every session mixes alike) … 1 (unrelated mixing).
    phoneme_set: 41-class labels instead of diphones. label_form: form of diphone labels.
    """

    sessions: int = 4
    train_trials: int = 80
    val_trials: int = 16
    test_trials: int = 4
    electrodes: int = 48
    phoneme_set: bool = False
    label_form: LabelForm = "self_loop"
    seed: int = 0
    bins_per_phoneme: float = 12.0
    gain: float = 1.0
    session_change: float = 0.7


@dataclass(frozen=True)
class _PlannedTrial:
    split: str
    block: int
    trial_num: int
    sentence: str


def synthesize(
    target: ObjectStore,
    dataset: SyntheticDataset,
    *,
    overwrite: bool = False,
    typed: str = "prepare_dataset.py synthesize",
    progress: Progress = lambda done, total: None,
) -> TrialManifest:
    """Write a dataset and its manifest to `target`; the same description gives the same bytes.

    Sessions that are there already, made by the same description, are skipped.

    Args:
        typed: the whole command, to be repeated if this one does not end.
        overwrite: replace files of these names that this command did not write.

    Raises:
        DataError: a description that cannot be made, a target that holds something else.
        StorageError: the target cannot be written.
    """
    plans = _plan(dataset)
    keys = {f"{name}/data_{trial.split}.hdf5" for name, plan in plans.items() for trial in plan}
    origin = Origin("prepare_dataset.py synthesize", asdict(dataset))
    inspections: list[FileInspection] = []
    making = DatasetInMaking(
        target, origin.command, typed, origin.options, keys, overwrite=overwrite
    )
    for index, (session, plan) in enumerate(plans.items()):
        wanted = {key for key in keys if key.startswith(f"{session}/")}
        if wanted <= making.done.keys():
            inspections += [making.done[key][1] for key in wanted]
        else:
            for key, data in _session_files(dataset, index, session, plan):
                data = signed(data, origin)
                making.check()
                target.write(key, data)
                inspections.append(inspect_file(key, data))
        progress(index + 1, len(plans))
    return making.finish(inspections)


def _plan(dataset: SyntheticDataset) -> dict[str, list[_PlannedTrial]]:
    """Trials by session; no sentence of the training split occurs in another split."""
    by_session: dict[str, list[RecordingBlock]] = {}
    for block in recording_blocks():
        by_session.setdefault(block.session, []).append(block)
    if not 1 <= dataset.sessions <= len(by_session):
        raise DataError(f"--sessions must be from 1 to {len(by_session)}, not {dataset.sessions}.")
    if not 1 <= dataset.electrodes <= 4096 or min(dataset.train_trials, dataset.val_trials) < 0:
        raise DataError("--electrodes must be from 1 to 4096, the trial counts positive.")
    if dataset.seed < 0:
        raise DataError(f"--seed must not be negative, like {dataset.seed}.")
    rng = np.random.default_rng([dataset.seed, 1])
    n_train = dataset.sessions * dataset.train_trials
    n_held_out = dataset.sessions * (dataset.val_trials + dataset.test_trials)
    train = random_sentences(n_train, rng, size=_VOCABULARY)
    others = random_sentences(n_held_out, rng, size=_VOCABULARY, distinct_from=set(train))
    trained, held_out = iter(train), iter(others)
    plan: dict[str, list[_PlannedTrial]] = {}
    for session, blocks in list(by_session.items())[: dataset.sessions]:
        training = [block.block for block in blocks if not block.held_out]
        tested = [block.block for block in blocks if block.held_out]
        last = tested[0] if tested else max(block.block for block in blocks) + 1
        trials = plan[session] = []
        for index in range(dataset.train_trials):
            which = min(index // _BLOCK_TRIALS, len(training) - 1)
            number = index - _BLOCK_TRIALS * which
            trials.append(_PlannedTrial("train", training[which], number, next(trained)))
        splits = ["val"] * dataset.val_trials + ["test"] * dataset.test_trials
        for number, split in enumerate(splits):
            trials.append(_PlannedTrial(split, last, number, next(held_out)))
    return plan


# --- one session ----------------------------------------------------------------------------------


def _session_files(
    dataset: SyntheticDataset, index: int, session: str, plan: list[_PlannedTrial]
) -> Iterator[tuple[str, bytes]]:
    """Key and bytes of each file of one session."""
    rng = np.random.default_rng([dataset.seed, 2, index])
    mixing = session_mixing(dataset, index)
    by_split: dict[str, list[TrialContents]] = {}
    for block in dict.fromkeys(trial.block for trial in plan):
        trials = [trial for trial in plan if trial.block == block]
        block_features = _block_features(dataset, mixing, trials, rng)
        for trial, features in zip(trials, block_features, strict=True):
            made = by_split.setdefault(trial.split, [])
            name = f"trial_{len(made):04d}"
            contents = TrialContents(name, session, block, trial.trial_num, features)
            if trial.split != "test":
                spoken = sentence_phonemes(trial.sentence)
                diphones = encode_diphones(spoken, dataset.label_form)
                contents = replace(
                    contents,
                    class_ids=spoken if dataset.phoneme_set else diphones,
                    phoneme_ids=None if dataset.phoneme_set else spoken,
                    sentence=trial.sentence,
                )
            made.append(contents)
    for split, contents_of_split in by_split.items():
        yield f"{session}/data_{split}.hdf5", data_file_bytes(contents_of_split)


def session_mixing(dataset: SyntheticDataset, index: int) -> np.ndarray:
    """[electrodes, articulators] float32: how the session's electrodes read the articulation.

    Sessions change cumulatively: each keeps part of the one before, adds its own, and swaps the
    places of a share of its electrodes.
    """
    shape = (dataset.electrodes, _ARTICULATORS)
    mixing = np.random.default_rng([dataset.seed, 3]).standard_normal(shape)
    for session in range(1, index + 1):
        rng = np.random.default_rng([dataset.seed, 3, session])
        change = dataset.session_change
        mixing = np.sqrt(1 - change**2) * mixing + change * rng.standard_normal(shape)
        moved = rng.permutation(dataset.electrodes)[: int(change * dataset.electrodes / 4)]
        mixing[moved] = mixing[np.roll(moved, 1)]
    return (mixing / np.sqrt(_ARTICULATORS)).astype(np.float32)


def _articulation(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of phonemes [41, D] and of onsets [1681, D]; silence and boundary are at rest."""
    rng = np.random.default_rng([seed, 4])
    places = rng.standard_normal((N_PHONEMES, _ARTICULATORS))
    onsets = rng.standard_normal((N_DIPHONES, _ARTICULATORS))
    scale = 2.0 * np.sqrt(_ARTICULATORS) / np.linalg.norm(places, axis=1, keepdims=True)
    places *= scale
    places[[0, SILENCE]] = 0
    return places.astype(np.float32), onsets.astype(np.float32)


def _block_features(
    dataset: SyntheticDataset,
    mixing: np.ndarray,
    trials: Sequence[_PlannedTrial],
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Features [T, 2 x electrodes] float32 of the trials of one block, z-scored over the block."""
    places, onsets = _articulation(dataset.seed)
    current, previous, age, ends = _timeline(dataset, trials, rng)
    pull = np.exp(-age / _ONSET_BINS, dtype=np.float32)[:, None]
    articulation = places[current] * (1 - pull / 2) + places[previous] * (pull / 2)
    articulation += onsets[N_PHONEMES * previous + current] * pull
    drive = np.clip(dataset.gain * (articulation @ mixing.T), -4, 3)
    rate = _BASE_RATE * np.exp(drive, dtype=np.float32)
    features = np.empty((len(rate), 2 * dataset.electrodes), np.float32)
    features[:, : dataset.electrodes] = rng.poisson(rate)
    power = rng.standard_gamma(_POWER_SHAPE, rate.shape, np.float32)
    features[:, dataset.electrodes :] = power * (rate + _BASE_RATE)
    features -= features.mean(axis=0)
    features /= np.maximum(features.std(axis=0), 1e-6)
    return np.split(features, ends[:-1])


def _timeline(
    dataset: SyntheticDataset, trials: Sequence[_PlannedTrial], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per bin: current phoneme, previous phoneme, bins since the onset; and where trials end.

    Every trial starts and ends at rest and is long enough for CTC with self-loop labels.
    """
    current, previous, durations, ends = [], [], [], []
    for trial in trials:
        labels = sentence_phonemes(trial.sentence)
        spoken = rng.gamma(8.0, dataset.bins_per_phoneme / 8.0, len(labels))
        spoken = np.maximum(np.round(spoken), np.ceil(dataset.bins_per_phoneme / 2)).astype(int)
        rest = rng.integers(8, 24, 2)
        diphones = encode_diphones(labels)
        frames = len(diphones) + int((diphones[1:] == diphones[:-1]).sum())
        needed = PATCH_SIZE + PATCH_STRIDE * frames + 4  # a few bins may be cut in training
        rest[1] += max(0, needed - int(spoken.sum() + rest.sum()))
        current.append(np.concatenate([[0], labels, [0]]))
        previous.append(np.concatenate([[0, 0], labels]))
        durations.append(np.concatenate([rest[:1], spoken, rest[1:]]))
        ends.append(int(durations[-1].sum()))
    repeats = np.concatenate(durations)
    starts = np.cumsum(repeats) - repeats
    age = np.arange(repeats.sum()) - np.repeat(starts, repeats)
    return (
        np.repeat(np.concatenate(current), repeats),
        np.repeat(np.concatenate(previous), repeats),
        age.astype(np.float32),
        np.cumsum(ends),
    )


# --- random English-like sentences ----------------------------------------------------------------
# The vocabulary (common_words.csv) covers all 39 phonemes; its pronunciations follow the CMU
# Pronouncing Dictionary. Word order follows a small grammar and word choice falls off with rank, so
# that a language model has something to learn.


@cache
def _words(size: int | None = None) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
    """Words by class, about `size` in all, and the phoneme ids of every word."""
    with Path(__file__).with_name("common_words.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    classes: dict[str, list[str]] = {}
    for row in rows:
        classes.setdefault(row["class"], []).append(row["word"])
    share = 1 if size is None else size / len(rows)
    chosen = {name: words[: max(1, round(len(words) * share))] for name, words in classes.items()}
    return chosen, {row["word"]: phoneme_ids(row["phonemes"].split()) for row in rows}


def vocabulary(size: int | None = None) -> list[str]:
    """The words that sentences are made of, sorted."""
    return sorted({word for words in _words(size)[0].values() for word in words})


def sentence_phonemes(sentence: str) -> np.ndarray:
    """Phoneme ids [n] int32 of a sentence of known words, silence after each word."""
    sounds = _words()[1]
    parts = [np.append(sounds[word], SILENCE) for word in sentence.split()]
    return np.concatenate(parts).astype(np.int32)


def random_sentences(
    count: int,
    rng: np.random.Generator,
    *,
    size: int | None = None,
    distinct_from: Collection[str] = (),
) -> list[str]:
    """`count` sentences; none of them is in `distinct_from`.

    Args:
        size: about how many words the vocabulary has; None for all.
    """
    classes, _ = _words(size)
    weights = {
        name: np.cumsum(1 / np.arange(2, len(words) + 2) ** 0.7) for name, words in classes.items()
    }
    sentences: list[str] = []
    while len(sentences) < count:
        words: list[str] = []
        for item in _TEMPLATES[rng.integers(len(_TEMPLATES))].split():
            if item.endswith("?") and rng.random() < 0.5:
                continue
            name = item.rstrip("?")
            parts = _NOUN_PHRASES[rng.integers(len(_NOUN_PHRASES))] if name == "NP" else name
            for part in parts.split():
                drawn = rng.random() * weights[part][-1]
                words.append(classes[part][int(np.searchsorted(weights[part], drawn))])
        sentence = " ".join(words)
        if sentence not in distinct_from:
            sentences.append(sentence)
    return sentences
