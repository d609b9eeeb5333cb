"""Turn a phoneme dataset into a diphone dataset, file by file, resumably, proving every trial."""

from __future__ import annotations

import io
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import h5py
import numpy as np

from ..errors import ConfigError, DataError
from ..labels.diphones import LabelForm, decode_diphones, encode_diphones
from ..labels.pronunciation import (
    Lexicon,
    dictionary_fingerprint,
    read_lexicon,
    text_phonemes,
    unknown_words,
)
from ..storage.locations import data_files, session_and_split
from ..storage.store import ObjectStore, open_store
from .hdf5_reader import (
    TRIAL_NAME,
    FileInspection,
    inspect_file,
    is_labelled,
    read_labels,
    read_sentence,
)
from .hdf5_values import (
    HDF5_ERRORS,
    cause_of,
    check_stored,
    printable,
    read_dataset,
    refuse_external_link,
)
from .hdf5_writer import FeatureType, declare_features, fill_features, write_labels
from .isolation import Progress, limited, sound_answers
from .making import DatasetInMaking, Origin, signed
from .manifest import TrialManifest

_REPAIR = "repair it, or leave such trials out with --exclude-damaged."
_LABELS = ("seq_class_ids", "seq_class_ids_phoneme")


@dataclass(frozen=True)
class EncodingOptions:
    """What the target is to look like.

    form: form of the diphone labels. dtype: of the features.
    from_text: take phoneme labels from each trial's sentence instead of its label array.
    lexicon: file with pronunciations of one's own words, for from_text.
    exclude_damaged: leave trials out, by name, that cannot be encoded.
    """

    form: LabelForm = "self_loop"
    dtype: FeatureType = "float32"
    from_text: bool = False
    lexicon: str | None = None
    exclude_damaged: bool = False

    def purpose(self) -> dict[str, Any]:
        """What decides the target's content: of a lexicon its words, not its name.

        Raises:
            ConfigError: a lexicon that is not used. StorageError, DataError: it cannot be read.
        """
        purpose = asdict(self)
        del purpose["exclude_damaged"]  # a file without damage is the same either way
        if self.lexicon and not self.from_text:
            raise ConfigError("--lexicon is for labels from text: say --from-text, too.")
        if self.from_text:
            words = repr(sorted((self.words() or {}).items())).encode()
            purpose["lexicon"] = f"{zlib.crc32(words):08x}" if self.lexicon else None
            purpose["dictionary"] = dictionary_fingerprint()
        return purpose

    def words(self) -> Lexicon | None:
        """One's own words if labels come from text (often none), None if they come from labels."""
        if not self.from_text:
            return None
        return read_lexicon(Path(self.lexicon)) if self.lexicon else {}


class Execution(TypedDict, total=False):
    """How `encode_files` does its work; what each means stands there."""

    processes: int
    overwrite: bool
    typed: str | None
    progress: Progress
    log: Callable[[str], None]


def encode_dataset(
    source: str, target: ObjectStore, options: EncodingOptions, **how: Unpack[Execution]
) -> TrialManifest:
    """Write the diphone form of every data file in a folder or at a URL to `target`.

    Args:
        how: see `encode_files`.

    Raises:
        DataError: damage in the source, a target that holds something else.
        StorageError: source or target cannot be read or written.
    """
    place = open_store(source)
    files = data_files(place.list(), place.url)
    sources = {key: (key, partial(_read, place.url, key, f.size)) for key, f in files.items()}
    command = "prepare_dataset.py encode"
    return encode_files(sources, place.url, target, command, options, **how)


def encode_files(
    sources: Mapping[str, tuple[str, Callable[[], bytes]]],
    place: str,
    target: ObjectStore,
    command: str,
    options: EncodingOptions,
    *,
    processes: int = 1,
    overwrite: bool = False,
    typed: str | None = None,
    progress: Progress = lambda done, total: None,
    log: Callable[[str], None] = print,
) -> TrialManifest:
    """Write the diphone form of every source, by its key in `target`, and a manifest.

    Files are written whole or not at all. A file that is already in the target, encoded from the
    same content with the same options, is skipped, so an interrupted run is simply repeated.
    Before a file is written, each of its trials is decoded back and compared with the source.

    Args:
        sources: what messages call a file, and how it is read.
        place: folder or URL of the sources.
        command: e.g. "prepare_dataset.py encode". typed: all of it, to be repeated.
        processes: files encoded at once, each in memory.
        overwrite: replace files of these names that this command did not write, or from other
            content.
        log: receives one line per thing left out, about files skipped, and what was compared.
    """
    origin = Origin(command, options.purpose())
    if options.from_text and not options.exclude_damaged:
        _refuse_unknown_words(sources, options, processes)
    done: list[tuple[Origin, FileInspection]] = []
    again = 0
    with DatasetInMaking(
        target,
        command,
        typed or command,
        origin.options,
        sources,
        reads=[place],
        overwrite=overwrite,
    ) as making:
        jobs = {
            name: (key, name, read, target.url, options, origin, making.done.get(key), overwrite)
            for key, (name, read) in sources.items()
        }
        with closing(sound_answers(_encode_job, jobs, processes, progress)) as answers:
            for made, inspection, written in answers:
                making.check()
                again += not written
                done.append((made, inspection))
                for line in (*made.not_copied, *made.damaged):
                    log(f"Left out: {line}")
        if again:
            log(f"{again} of {len(sources)} files are encoded already and are skipped")
        manifest = making.finish(inspection for _, inspection in done)
    records = [record for _, inspection in done for record in inspection.records]
    labelled = sum(record.class_ids is not None for record in records)
    log(
        f"Compared with the source: the features of {len(records):,} trials value by value, the "
        f"labels of {labelled:,} by decoding them; all are equal"
    )
    return manifest


def _refuse_unknown_words(
    sources: Mapping[str, tuple[str, Callable[[], bytes]]], options: EncodingOptions, processes: int
) -> None:
    """Name every word that nobody can pronounce at once, before anything is written.

    Raises:
        DataError: there are some.
    """
    jobs = {
        name: (read, options)
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
            f"Nobody says how to pronounce {len(counts)} words (and how often they occur): "
            f"{words}; add lines 'word PHONEME PHONEME …' to a file and give it with --lexicon, or "
            "leave such trials out with --exclude-damaged."
        )


def _words_job(read: Callable[[], bytes], options: EncodingOptions) -> Counter[str]:
    """Unknown words of one file and how often they occur; damage is for encoding to name."""
    counts: Counter[str] = Counter()
    data, lexicon = read(), options.words() or {}
    with limited(len(data)), suppress(*HDF5_ERRORS), h5py.File(io.BytesIO(data), "r") as file:
        for trial in file.values():
            with suppress(DataError, *HDF5_ERRORS):
                counts.update(unknown_words(read_sentence(trial, lambda *_: None) or "", lexicon))
    return counts


def _read(url: str, key: str, size: int) -> bytes:
    return open_store(url).read(key, 0, size)


def encode_file(
    key: str,
    data: bytes,
    options: EncodingOptions,
    without: Collection[str] = (),
    name: str | None = None,
) -> tuple[bytes, list[str], list[str]]:
    """The encoded file of a file's bytes.

    Attributes and datasets beside features and labels are copied as they are.

    Args:
        without: names of trials to leave out.
        name: what messages call the file, unless by its key.

    Returns:
        (the file, a line for each thing that could not be copied, a line for each trial left out).

    Raises:
        DataError: damage, unless options.exclude_damaged.
    """
    name = name or key
    lexicon = options.words()
    not_copied: list[str] = []
    damaged: list[str] = []
    first: dict[Any, str] = {}  # trial by the place of its features
    features: dict[str, np.ndarray] = {}
    buffer = io.BytesIO()
    try:
        with h5py.File(io.BytesIO(data), "r") as old, h5py.File(buffer, "w") as new:
            trials = {trial for trial in old if TRIAL_NAME.fullmatch(printable(trial))}
            not_copied += [f"{name}: {what}" for what in _copy(old, new, {*old} - trials)]
            for trial in sorted(trials.difference(without)):
                try:
                    refuse_external_link(old, trial)
                    group = new.create_group(trial)
                    values, lost = _encode_trial(key, old[trial], group, options, lexicon)
                    stored = h5py.h5o.get_info(old[trial]["input_features"].id)
                    other = first.setdefault((stored.fileno, stored.addr), trial)
                    if other != trial:
                        raise DataError(f"its features are a link to those of {other}")
                except (DataError, *HDF5_ERRORS) as error:
                    reason = f"{name}:{trial}: {cause_of(error).rstrip('.')}"
                    if not options.exclude_damaged:
                        raise DataError(f"{reason}; {_REPAIR}") from error
                    damaged.append(reason)
                    del new[trial]
                else:
                    features[trial] = values
                    not_copied += [f"{name}:{trial}: {what}" for what in lost]
            fill_features(new, features)
    except HDF5_ERRORS as error:
        raise DataError(
            f"{name}: cannot be read as HDF5 ({cause_of(error)}); copy it again."
        ) from error
    return buffer.getvalue(), not_copied, damaged


def _encode_trial(
    key: str, old: h5py.Group, new: h5py.Group, options: EncodingOptions, lexicon: Lexicon | None
) -> tuple[np.ndarray, list[str]]:
    """Fill `new` but for its features, which are returned, and what of `old` cannot be copied."""
    if not isinstance(old, h5py.Group):
        raise DataError("is not a group")
    features = _source_features(old)
    phonemes = _source_phonemes(key, old, lexicon)
    anew = {"input_features"} if phonemes is None else {"input_features", *_LABELS}
    left_out = list(_copy(old, new, {*old} - anew))
    values = declare_features(new, features, options.dtype)
    left_out += _copy(old["input_features"], new["input_features"], set())
    if phonemes is not None:
        write_labels(new, encode_diphones(phonemes, options.form), phonemes)
    return values, left_out


def _copy(old: Any, new: Any, names: set[str]) -> Iterator[str]:
    """Copy all attributes and the members `names`; says of which that is impossible, and why."""
    for name in old.attrs:
        try:
            new.attrs[name] = old.attrs[name]
        except HDF5_ERRORS as error:
            yield f"attribute {printable(name)} cannot be copied ({cause_of(error)})"
    for name in sorted(names, key=printable):
        try:
            refuse_external_link(old, name)
            old.copy(name, new)
        except (DataError, *HDF5_ERRORS) as error:
            yield f"{printable(name)} cannot be copied ({cause_of(error)})"


def _source_features(trial: h5py.Group) -> np.ndarray:
    """Features [T, C] of a source trial, every value of which is really there."""
    dataset = read_dataset(trial, "input_features")
    if dataset.dtype.kind not in "fiu":
        raise DataError(f"input_features is {dataset.dtype}, not numbers")
    check_stored(dataset, "input_features")
    return dataset[()]


def _source_phonemes(key: str, trial: h5py.Group, lexicon: Lexicon | None) -> np.ndarray | None:
    """Phoneme labels of a source trial, None of one in the test split that has none."""
    _, split = session_and_split(key)
    if lexicon is None:
        return read_labels(trial)[1] if is_labelled(trial, split) else None
    sentence = read_sentence(trial, lambda *_: None)
    needless = split == "test" and not is_labelled(trial, split)
    if sentence is not None and not (needless and unknown_words(sentence, lexicon)):
        return text_phonemes(sentence, lexicon)
    if needless:
        return None
    raise DataError("attribute sentence_label is missing, so there is no text to label")


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
    original = read()
    origin = replace(origin, source_crc32=zlib.crc32(original))
    if done and done[0].source_crc32 == origin.source_crc32:
        if options.exclude_damaged or not done[0].damaged:
            return (*done, False)
    elif done and not overwrite:
        raise DataError(
            f"{key} in the target was encoded from another content of {name}: give an empty target,"
            " or say --overwrite."
        )
    with limited(len(original)):
        encoded, origin, inspection = _signed_file(key, original, options, origin, (), name)
        broken = _broken(inspection)
        if broken and options.exclude_damaged and None not in broken:
            encoded, origin, inspection = _signed_file(key, original, options, origin, broken, name)
            origin.damaged.extend(f"{name}:{trial}: {why}" for trial, why in broken.items())
            encoded = signed(encoded, origin)
            inspection = inspect_file(key, encoded)
            broken = _broken(inspection)
        if broken:
            trial, reason = next(iter(broken.items()))
            if origin.damaged:
                raise DataError(
                    f"{name} has no sound trial ({origin.damaged[0]}): repair it, or take it out "
                    "of the source."
                )
            raise DataError(
                f"{name}:{trial}: {reason}; {_REPAIR}" if trial else f"{name}: {reason}."
            )
        _prove(original, encoded, inspection, options)
    open_store(target_url).write(key, encoded)
    return origin, inspection, True


def _signed_file(
    key: str,
    original: bytes,
    options: EncodingOptions,
    origin: Origin,
    without: Collection[str],
    name: str,
) -> tuple[bytes, Origin, FileInspection]:
    """The encoded file, what it says of its making, and what it holds."""
    encoded, not_copied, damaged = encode_file(key, original, options, without, name)
    origin = replace(origin, not_copied=not_copied, damaged=damaged)
    encoded = signed(encoded, origin)
    return encoded, origin, inspect_file(key, encoded)


def _broken(inspection: FileInspection) -> dict[Any, str]:
    """Reasons by trial, None for the whole file."""
    return {f.trial: f.reason for f in inspection.findings if f.severity == "error"}


def _prove(
    original: bytes, encoded: bytes, inspection: FileInspection, options: EncodingOptions
) -> None:
    """Decode every encoded trial by the manifest's record and compare it with the source.

    Raises:
        DataError: labels or features differ.
    """
    lexicon = options.words()
    with h5py.File(io.BytesIO(original), "r") as file:
        for record in inspection.records:
            trial = file[record.trial]
            span = memoryview(encoded)[record.offset : record.offset + record.length]
            expected = _source_features(trial).astype(options.dtype)
            if not np.array_equal(record.decode(span), expected):
                raise DataError(f"{record.name}: the encoded features differ from the source's.")
            phonemes = _source_phonemes(record.key, trial, lexicon)
            if phonemes is None:
                continue
            if record.class_ids is None or not np.array_equal(
                decode_diphones(record.class_ids, options.form), phonemes
            ):
                raise DataError(f"{record.name}: the encoded labels do not decode to the source's.")
