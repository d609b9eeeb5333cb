"""Turn a phoneme dataset into a diphone dataset, file by file, resumably, proving every trial."""

from __future__ import annotations

import io
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import h5py
import numpy as np

from ..errors import DataError
from ..labels.diphones import LabelForm, decode_diphones, encode_diphones
from ..labels.pronunciation import (
    UNKNOWN_WORDS_ADVICE,
    Lexicon,
    UnknownWordsError,
    text_phonemes,
)
from ..storage.locations import data_files, session_and_split
from ..storage.store import ObjectStore, open_store
from .hdf5_reader import DataFile, FileInspection, StoredTrial, inspect_file
from .hdf5_values import HDF5_ERRORS, cause_of, open_member, printable, refusing_damage
from .hdf5_writer import FeatureType, TrialContents, fill_features, write_trial
from .isolation import Progress, limited, sound_answers
from .making import DatasetInMaking, Origin, signed
from .manifest import TrialManifest

# By its key in the target: what messages call a source, and how the bytes of its HDF5 are read.
Sources = Mapping[str, tuple[str, Callable[[], bytes]]]
_LABELS = ("seq_class_ids", "seq_class_ids_phoneme")


@dataclass(frozen=True)
class EncodingOptions:
    """What the target is to look like.

    form: form of the diphone labels. dtype: of the features.
    lexicon: the user's words, often none, if labels come from each trial's sentence; None if they
        come from its label arrays.
    exclude_damaged: leave trials out, by name, that cannot be encoded.
    """

    form: LabelForm = "self_loop"
    dtype: FeatureType = "float32"
    lexicon: Lexicon | None = None
    exclude_damaged: bool = False

    def purpose(self) -> dict[str, Any]:
        """What decides the target's content, as plain types."""
        purpose: dict[str, Any] = {"form": self.form, "dtype": self.dtype, "lexicon": None}
        if self.lexicon is not None:
            words = repr(sorted(self.lexicon.items())).encode()
            purpose["lexicon"] = f"{zlib.crc32(words):08x}"
        return purpose


def dataset_sources(url: str) -> Sources:
    """Every data file in a folder or at a URL.

    Raises:
        DataError: there are none. StorageError: it cannot be listed.
    """
    store = open_store(url)
    files = data_files(store.list(), store.url)
    return {key: (key, partial(_read, store.url, key, f.size)) for key, f in files.items()}


def _read(url: str, key: str, size: int) -> bytes:
    return open_store(url).read(key, 0, size)


def encode_files(
    sources: Sources,
    data_url: str,
    target: ObjectStore,
    options: EncodingOptions,
    *,
    command: str = "prepare_dataset.py encode",
    typed: str | None = None,
    processes: int = 1,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
    log: Callable[[str], None] = print,
) -> TrialManifest:
    """Write the diphone form of every source to `target`, and a manifest.

    Files are written whole or not at all. A file that is already in the target, encoded from the
    same content with the same options, is skipped, so an interrupted run is simply repeated.
    Before a file is written, each of its trials is decoded back and compared with the source.

    Args:
        data_url: folder or URL of the sources.
        command: as files say what made them. typed: all of it, to be repeated.
        processes: files encoded at once, each in memory.
        overwrite: replace files of these names that this command did not write, or from other
            content.
        log: receives one line per thing left out, about files skipped, and what was compared.

    Raises:
        DataError: damage in the source, words without a known pronunciation, a target that holds
            something else. StorageError: source or target cannot be read or written.
    """
    if options.lexicon is not None and not options.exclude_damaged:
        _refuse_unknown_words(sources, options.lexicon, processes)
    origin = Origin(command, options.purpose())
    done: list[tuple[Origin, FileInspection, bool]] = []
    making = DatasetInMaking(
        target,
        command,
        typed or command,
        origin.options,
        sources,
        reads=[data_url],
        overwrite=overwrite,
    )
    jobs = {
        name: (key, name, read, target.url, options, origin, making.done.get(key), overwrite)
        for key, (name, read) in sources.items()
    }
    with closing(sound_answers(_encode_job, jobs, processes, progress)) as answers:
        for answer in answers:
            making.check()
            done.append(answer)
            for line in (*answer[0].not_copied, *answer[0].damaged):
                log(f"Left out: {line}")
    if again := sum(not written for _, _, written in done):
        log(f"{again} of {len(sources)} files are encoded already and are skipped")
    manifest = making.finish(inspection for _, inspection, _ in done)
    labelled = sum(count > 0 for count in manifest.trials.n_labels)
    log(
        f"Compared with the source: the features of {len(manifest.trials):,} trials value by "
        f"value, the labels of {labelled:,} by decoding them; all are equal"
    )
    return manifest


def _refuse_unknown_words(sources: Sources, lexicon: Lexicon, processes: int) -> None:
    """Name every word without a known pronunciation at once, before anything is written.

    Raises:
        DataError: there are some.
    """
    jobs = {
        name: (key, read, lexicon)
        for key, (name, read) in sources.items()
        if session_and_split(key)[1] != "test"  # whose trials need no labels
    }
    counts: Counter[str] = Counter()
    with closing(sound_answers(_words_job, jobs, processes)) as answers:
        for answer in answers:
            counts += answer
    if counts:
        words = ", ".join(f"{word} ({count})" for word, count in counts.most_common())
        raise DataError(
            f"No pronunciation is known for {len(counts)} words (and how often each occurs): "
            f"{words}; {UNKNOWN_WORDS_ADVICE}, or leave such trials out with --exclude-damaged."
        )


def _words_job(key: str, read: Callable[[], bytes], lexicon: Lexicon) -> Counter[str]:
    """Unknown words of one file and how often they occur; damage is for encoding to name."""
    counts: Counter[str] = Counter()
    data = read()
    with limited(len(data)), suppress(DataError):
        file = DataFile(key, data)
        for name in file.trials:
            try:
                with refusing_damage("cannot be read"):
                    text_phonemes(file.read_sentence(name) or "", lexicon)
            except UnknownWordsError as unknown:
                counts.update(unknown.words)
            except DataError:
                continue
    return counts


def _encode_job(
    key: str,
    name: str,
    read: Callable[[], bytes],
    target_url: str,
    options: EncodingOptions,
    origin: Origin,
    done: tuple[Origin, FileInspection] | None,
    overwrite: bool,
) -> tuple[Origin, FileInspection, bool]:
    """Read, encode, sign, prove and write one file; False if that is `done`."""
    data = read()
    origin = replace(origin, source_crc32=zlib.crc32(data))
    if done and done[0].source_crc32 == origin.source_crc32:
        if options.exclude_damaged or not done[0].damaged:
            return (*done, False)
    elif done and not overwrite:
        raise DataError(
            f"{key} in the target was encoded from another content of {name}: give an empty target,"
            " or say --overwrite."
        )
    with limited(len(data)):
        encoded, trials, not_copied, damaged = encode_file(key, data, options, name)
        origin = replace(origin, not_copied=not_copied, damaged=damaged)
        encoded = signed(encoded, origin)
        inspection = inspect_file(key, encoded, look=np.asarray)
        _prove(inspection, trials, options.form)
        inspection.looks.clear()
    open_store(target_url).write(key, encoded)
    return origin, inspection, True


def encode_file(
    key: str, data: bytes, options: EncodingOptions, name: str | None = None
) -> tuple[bytes, dict[str, TrialContents], list[str], list[str]]:
    """The encoded file of a file's bytes.

    Attributes and datasets beside features and labels are copied as they are.

    Args:
        name: what messages call the file, unless by its key.

    Returns:
        (the file, the trials that it is to hold by name, a line for each thing that could not be
        copied, a line for each trial left out).

    Raises:
        DataError: damage, unless options.exclude_damaged; no sound trial.
    """
    name = name or key
    not_copied: list[str] = []
    damaged: list[str] = []
    trials: dict[str, TrialContents] = {}
    buffer = io.BytesIO()
    try:
        old = DataFile(key, data)
    except DataError as damage:
        raise DataError(f"{name}: {damage}; copy it again.") from damage
    with old.hdf5, h5py.File(buffer, "w") as new:
        not_copied += [f"{name}: {what}" for what in _copy(old.hdf5, new, old.others)]
        for trial in old.trials:
            try:
                with refusing_damage("cannot be read"):
                    stored = old.read(trial, labels=options.lexicon is None)
                    made = _encoded(old, stored, options)
                    group = new.create_group(trial)
                    rewritten = {"input_features", *(() if made.class_ids is None else _LABELS)}
                    lost = list(_copy(stored.group, group, {*stored.group} - rewritten))
                    features = write_trial(group, made, options.dtype)
                    lost += _copy(stored.group["input_features"], group["input_features"], ())
            except DataError as damage:
                reason = f"{name}:{trial}: {str(damage).rstrip('.')}"
                if not options.exclude_damaged:
                    raise DataError(
                        f"{reason}; repair it, or leave such trials out with --exclude-damaged."
                    ) from damage
                damaged.append(reason)
                if trial in new:
                    del new[trial]
            else:
                trials[trial] = replace(made, features=features)
                not_copied += [f"{name}:{trial}: {what}" for what in lost]
        if not trials:
            why = damaged[0] if damaged else "none is named trial_NNNN"
            raise DataError(
                f"{name} has no sound trial ({why}): repair it, or take it out of the source."
            )
        fill_features(new, {trial: made.features for trial, made in trials.items()})
    return buffer.getvalue(), trials, not_copied, damaged


def _encoded(file: DataFile, stored: StoredTrial, options: EncodingOptions) -> TrialContents:
    """A trial with diphone labels; its sentence, which is copied as it is, is None here."""
    phonemes = stored.contents.phoneme_ids
    if options.lexicon is not None:
        try:
            phonemes = text_phonemes(stored.contents.sentence or "", options.lexicon)
        except DataError:
            if file.is_labelled(stored.group):
                raise
    labels = None if phonemes is None else encode_diphones(phonemes, options.form)
    return replace(stored.contents, class_ids=labels, phoneme_ids=phonemes, sentence=None)


def _copy(old: Any, new: Any, names: Iterable[str]) -> Iterator[str]:
    """Copy all attributes and the members `names`; says of which that is impossible, and why."""
    for name in old.attrs:
        try:
            new.attrs[name] = old.attrs[name]
        except HDF5_ERRORS as error:
            yield f"attribute {printable(name)} cannot be copied ({cause_of(error)})"
    for name in sorted(names, key=printable):
        try:
            open_member(old, name)
            old.copy(name, new)
        except (DataError, *HDF5_ERRORS) as error:
            yield f"{printable(name)} cannot be copied ({cause_of(error)})"


def _prove(
    inspection: FileInspection, trials: Mapping[str, TrialContents], form: LabelForm
) -> None:
    """Compare what the manifest's records decode to, `inspection.looks`, with the source.

    Raises:
        DataError: labels or features differ, or a trial is not sound.
    """
    for finding in inspection.findings:
        if finding.severity == "error":
            raise DataError(f"{finding}.")
    for record, features in zip(inspection.records, inspection.looks, strict=True):
        source = trials[record.trial]
        if not np.array_equal(features, source.features):
            raise DataError(f"{record.name}: the encoded features differ from the source's.")
        if source.phoneme_ids is not None and not np.array_equal(
            decode_diphones([] if record.class_ids is None else record.class_ids, form),
            source.phoneme_ids,
        ):
            raise DataError(f"{record.name}: the encoded labels do not decode to the source's.")
