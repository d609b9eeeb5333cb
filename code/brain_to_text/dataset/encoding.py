"""Turn a phoneme dataset into a diphone dataset, file by file, resumably, proving every trial."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import ConfigError, DataError
from ..labels.diphones import LabelForm, decode_diphones, encode_diphones
from ..labels.pronunciation import Lexicon, read_lexicon, text_phonemes
from ..storage.locations import S3_ETAG, data_files, printable, session_and_split
from ..storage.store import ObjectStore, open_store
from ..storage.targets import Target
from .hdf5_reader import (
    TRIAL_NAME,
    FileInspection,
    inspect_file,
    is_labelled,
    read_labels,
    read_sentence,
)
from .hdf5_values import HDF5_ERRORS, DamagedTrial, cause_of, check_stored, read_dataset
from .hdf5_writer import FeatureType, write_features, write_labels
from .indexing import keep_index
from .manifest import TrialManifest
from .workers import limited, sound_answers

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
        return purpose

    def words(self) -> Lexicon | None:
        """One's own words if labels come from text (often none), None if they come from labels."""
        if not self.from_text:
            return None
        return read_lexicon(Path(self.lexicon)) if self.lexicon else {}


@dataclass(frozen=True)
class Source:
    """A file to encode: what messages call it, its ETag where that is S3's, how it is read."""

    name: str
    etag: str | None
    read: Callable[[], bytes]


@dataclass(frozen=True)
class _Encoded:
    """A file done, and for a repeated run: its sums, what was compared, what is not in it."""

    inspection: FileInspection
    note: Mapping[str, Any]


def encode_dataset(
    source: str, target: ObjectStore, options: EncodingOptions, **how: Any
) -> TrialManifest:
    """Write the diphone form of every data file in a folder or at a URL to `target`.

    Args:
        how: see `encode_files`.

    Raises:
        DataError: damage in the source, a target that holds something else.
        StorageError: source or target cannot be read or written.
    """
    place = open_store(source)
    sources = {
        key: Source(
            key,
            info.etag if S3_ETAG.fullmatch(info.etag) else None,
            partial(_read, place.url, key, info.size),
        )
        for key, info in data_files(place.list(), place.url).items()
    }
    command = "prepare_dataset.py encode"
    return encode_files(sources, place.url, target, command, options, **how)


def encode_files(
    sources: Mapping[str, Source],
    place: str,
    target: ObjectStore,
    command: str,
    options: EncodingOptions,
    *,
    processes: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[str], None] = print,
) -> TrialManifest:
    """Write the diphone form of every source, by its key in `target`, and a manifest.

    Files are written whole or not at all. A file that is already in the target, encoded from the
    same content with the same options, is skipped, so an interrupted run is simply repeated.
    Before a file is written, each of its trials is decoded back and compared with the source.

    Args:
        place: folder or URL of the sources.
        command: as typed.
        processes: files encoded at once, each in memory.
        overwrite: replace files of these names that this command did not write.
        progress: called with (files done, files in all).
        log: receives one line per thing left out, about files skipped, and what was compared.
    """
    purpose = options.purpose()
    with Target(target, command, purpose, sources, reads=[place], overwrite=overwrite) as claimed:
        done = _still_done(claimed, place, sources, options, processes, progress)
        if done:
            log(f"{len(done)} of {len(sources)} files are encoded already and are skipped")
        for line in (line for encoded in done.values() for line in encoded.note["left_out"]):
            log(f"Left out: {line}")
        jobs = {
            source.name: (key, source, target.url, options)
            for key, source in sources.items()
            if key not in done
        }
        with closing(sound_answers(_encode_job, jobs, processes, progress, len(done))) as answers:
            for encoded in answers:
                for line in encoded.note["left_out"]:
                    log(f"Left out: {line}")
                done[encoded.inspection.key] = encoded
                notes = {key: file.note for key, file in done.items()}
                claimed.notes = {"source": place, "files": notes}
                claimed.save()
        manifest = keep_index(target, [file.inspection for file in done.values()])
    trials, labelled = np.sum([file.note["compared"] for file in done.values()], axis=0)
    log(
        f"Compared with the source: the features of {trials:,} trials value by value, the labels "
        f"of {labelled:,} by decoding them; all are equal"
    )
    return manifest


def _read(url: str, key: str, size: int) -> bytes:
    return open_store(url).read(key, size)


def _still_done(
    target: Target,
    place: str,
    sources: Mapping[str, Source],
    options: EncodingOptions,
    processes: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, _Encoded]:
    """The files of an earlier run whose source and target have not changed since, by key.

    One of which something was left out counts only where that is asked for again.

    Raises:
        DataError: they were made of another place's files, with other content.
    """
    there = target.store.list()
    jobs = {
        f"{target.store.url}/{key}": (key, sources[key], target.store.url, note)
        for key, note in target.notes.get("files", {}).items()
        if key in sources and key in there and (options.exclude_damaged or not note["left_out"])
    }
    answers = list(sound_answers(_recheck_job, jobs, processes, progress))
    changed = sorted(answer for answer in answers if isinstance(answer, str))
    if changed and target.notes["source"] != place:
        raise DataError(
            f"{target.store.url} was encoded from {target.notes['source']}, whose {changed[0]} is "
            f"another than that of {place}: give an empty target, or say --overwrite."
        )
    return {a.inspection.key: a for a in answers if isinstance(a, _Encoded)}


def _recheck_job(
    key: str, source: Source, target_url: str, note: Mapping[str, Any]
) -> _Encoded | str | None:
    """A file that still holds, the key of one whose source is another, None for another target."""
    known = source.etag is not None and source.etag == note["etag"]
    if not known and zlib.crc32(source.read()) != note["source"]:
        return key
    data = open_store(target_url).read(key)
    if zlib.crc32(data) != note["target"]:
        return None
    with limited(len(data)):
        return _Encoded(inspect_file(key, data), note)


def encode_file(
    key: str,
    data: bytes,
    options: EncodingOptions,
    without: Collection[str] = (),
    name: str | None = None,
) -> tuple[bytes, list[str]]:
    """The encoded file of a file's bytes, and one line for everything left out.

    Attributes and datasets beside features and labels are copied as they are.

    Args:
        without: names of trials to leave out.
        name: what messages call the file, unless by its key.

    Raises:
        DataError: damage, unless options.exclude_damaged.
    """
    name = name or key
    lexicon = options.words()
    left_out: list[str] = []
    buffer = io.BytesIO()
    try:
        with h5py.File(io.BytesIO(data), "r") as old, h5py.File(buffer, "w") as new:
            trials = {trial for trial in old if TRIAL_NAME.fullmatch(printable(trial))}
            left_out += [f"{name}: {what}" for what in _copy(old, new, {*old} - trials)]
            for trial in sorted(trials.difference(without)):
                try:
                    lost = _encode_trial(key, old[trial], new.create_group(trial), options, lexicon)
                except (DamagedTrial, DataError, *HDF5_ERRORS) as error:
                    reason = f"{name}:{trial}: {cause_of(error).rstrip('.')}"
                    if not options.exclude_damaged:
                        raise DataError(f"{reason}; {_REPAIR}") from error
                    left_out.append(reason)
                    del new[trial]
                else:
                    left_out += [f"{name}:{trial}: {what}" for what in lost]
    except HDF5_ERRORS as error:
        raise DataError(
            f"{name}: cannot be read as HDF5 ({cause_of(error)}); copy it again."
        ) from error
    return buffer.getvalue(), left_out


def _encode_trial(
    key: str, old: h5py.Group, new: h5py.Group, options: EncodingOptions, lexicon: Lexicon | None
) -> list[str]:
    """Fill `new`; returns what of `old` could not be copied."""
    if not isinstance(old, h5py.Group):
        raise DamagedTrial("is not a group", "wrong kind")
    features = _source_features(old)
    phonemes = _source_phonemes(key, old, lexicon)
    anew = {"input_features"} if phonemes is None else {"input_features", *_LABELS}
    left_out = list(_copy(old, new, {*old} - anew))
    write_features(new, features, options.dtype)
    left_out += _copy(old["input_features"], new["input_features"], set())
    if phonemes is not None:
        write_labels(new, encode_diphones(phonemes, options.form), phonemes)
    return left_out


def _copy(old: Any, new: Any, names: set[str]) -> Iterator[str]:
    """Copy all attributes and the members `names`; says of which that is impossible, and why."""
    for name in old.attrs:
        try:
            new.attrs[name] = old.attrs[name]
        except HDF5_ERRORS as error:
            yield f"attribute {printable(name)} cannot be copied ({cause_of(error)})"
    for name in names:
        try:
            old.copy(name, new)
        except HDF5_ERRORS as error:
            yield f"{printable(name)} cannot be copied ({cause_of(error)})"


def _source_features(trial: h5py.Group) -> np.ndarray:
    """Features [T, C] of a source trial, every value of which is really there."""
    dataset = read_dataset(trial, "input_features")
    if dataset.dtype.kind not in "fiu":
        raise DamagedTrial(f"input_features is {dataset.dtype}, not numbers", "wrong dtype")
    check_stored(dataset, "input_features")
    return dataset[()]


def _source_phonemes(key: str, trial: h5py.Group, lexicon: Lexicon | None) -> np.ndarray | None:
    """Phoneme labels of a source trial, None of one in the test split that has none."""
    _, split = session_and_split(key)
    if lexicon is None:
        return read_labels(trial)[1] if is_labelled(trial, split) else None
    sentence = read_sentence(trial, lambda *_: None)
    if sentence is not None:
        return text_phonemes(sentence, lexicon)
    if split == "test":
        return None
    raise DataError("attribute sentence_label is missing, so there is no text to label")


def _encode_job(key: str, source: Source, target_url: str, options: EncodingOptions) -> _Encoded:
    """Read, encode, prove and write one file."""
    original = source.read()
    with limited(len(original)):
        encoded, left_out = encode_file(key, original, options, name=source.name)
        inspection = inspect_file(key, encoded)
        broken = _broken(inspection)
        if broken and options.exclude_damaged and None not in broken:
            encoded, left_out = encode_file(key, original, options, broken, source.name)
            left_out += [f"{source.name}:{trial}: {reason}" for trial, reason in broken.items()]
            inspection = inspect_file(key, encoded)
            broken = _broken(inspection)
        for trial, reason in broken.items():
            where = f"{source.name}:{trial}" if trial else source.name
            raise DataError(f"{where}: {reason}; {_REPAIR}")
        compared = _prove(original, encoded, inspection, options)
    open_store(target_url).write(key, encoded)
    note = {
        "etag": source.etag,
        "source": zlib.crc32(original),
        "target": zlib.crc32(encoded),
        "compared": compared,
        "left_out": left_out,
    }
    return _Encoded(inspection, note)


def _broken(inspection: FileInspection) -> dict[Any, str]:
    """Reasons by trial, None for the whole file."""
    return {f.trial: f.reason for f in inspection.findings if f.severity == "error"}


def _prove(
    original: bytes, encoded: bytes, inspection: FileInspection, options: EncodingOptions
) -> tuple[int, int]:
    """Decode every encoded trial by the manifest's record and compare it with the source.

    Returns how many features and how many label sequences were compared.

    Raises:
        DataError: labels or features differ.
    """
    lexicon = options.words()
    labelled = 0
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
            labelled += 1
    return len(inspection.records), labelled
