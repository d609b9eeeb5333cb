"""Turn a phoneme dataset into a diphone dataset, file by file, resumably, proving every trial."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import ConfigError, DataError
from ..labels.diphones import LabelForm, decode_diphones, encode_diphones
from ..labels.pronunciation import (
    Lexicon,
    dictionary_fingerprint,
    read_lexicon,
    text_phonemes,
)
from ..storage.locations import S3_ETAG, ObjectInfo, data_files
from ..storage.store import ObjectStore, open_store
from ..storage.targets import Target
from .hdf5_reader import (
    DATA_FILE,
    TRIAL_NAME,
    FileInspection,
    inspect_file,
    is_labelled,
    read_labels,
    read_sentence,
)
from .hdf5_values import HDF5_ERRORS, DamagedTrial, cause_of, check_stored, printable, read_dataset
from .hdf5_writer import FeatureType, write_features, write_labels
from .indexing import keep_index
from .manifest import TrialManifest
from .workers import limited, sound_answers

COMMAND = "prepare_dataset.py encode"
_LABELS = ("seq_class_ids", "seq_class_ids_phoneme")
_NOTED = ("crc32", "compared", "left_out")  # of an encoded file, for a repeated run


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


@dataclass(frozen=True)
class _Encoded:
    """One file done.

    source: its source's ETag, where that is S3's, and CRC-32. crc32: its own.
    compared: trials, label sequences. left_out: lines about what is not in it.
    """

    inspection: FileInspection
    source: tuple[str | None, int]
    crc32: int
    compared: tuple[int, int]
    left_out: Sequence[str] = ()

    def note(self) -> dict[str, Any]:
        """What tells later that it still holds."""
        return {name: getattr(self, name) for name in ("source", *_NOTED)}


def encode_dataset(
    source: ObjectStore,
    target: ObjectStore,
    options: EncodingOptions | None = None,
    *,
    processes: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[str], None] = print,
) -> TrialManifest:
    """Write the diphone form of every data file of `source` to `target`, and a manifest.

    Files are written whole or not at all. A file that is already in the target, encoded from the
    same content with the same options, is skipped, so an interrupted run is simply repeated.
    Before a file is written, each of its trials is decoded back and compared with the source.

    Args:
        processes: files encoded at once, each in memory.
        overwrite: replace files of these names that this command did not write.
        progress: called with (files done, files in all).
        log: receives one line per thing left out, about files skipped, and what was compared.

    Raises:
        DataError: damage in the source, a target that holds something else.
        StorageError: source or target cannot be read or written.
    """
    options = options or EncodingOptions()
    sources = data_files(source.list(), source.url)
    purpose = options.purpose()
    with Target.claim(
        target, COMMAND, purpose, sources, reads=[source.url], overwrite=overwrite
    ) as claimed:
        done = _still_done(claimed, source, sources, options, processes, progress)
        if done:
            log(f"{len(done)} of {len(sources)} files are encoded already and are skipped")
        for line in (line for encoded in done.values() for line in encoded.left_out):
            log(f"Left out: {line}")
        jobs = {
            f"{source.url}/{key}": (source.url, target.url, info, options)
            for key, info in sources.items()
            if key not in done
        }
        with closing(sound_answers(_encode_job, jobs, processes, progress, len(done))) as answers:
            for encoded in answers:
                for line in encoded.left_out:
                    log(f"Left out: {line}")
                done[encoded.inspection.key] = encoded
                claimed.notes = {
                    "source": source.url,
                    "files": {key: file.note() for key, file in done.items()},
                }
                claimed.save()
        manifest = keep_index(target, [file.inspection for file in done.values()])
    trials, labelled = np.sum([file.compared for file in done.values()], axis=0)
    log(
        f"Compared with the source: the features of {trials:,} trials value by value, the labels "
        f"of {labelled:,} by decoding them; all are equal"
    )
    return manifest


def _still_done(
    target: Target,
    source: ObjectStore,
    sources: Mapping[str, ObjectInfo],
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
        f"{target.store.url}/{key}": (source.url, sources[key], target.store.url, there[key], note)
        for key, note in target.notes.get("files", {}).items()
        if key in sources and key in there and (options.exclude_damaged or not note["left_out"])
    }
    answers = list(sound_answers(_recheck_job, jobs, processes, progress))
    changed = sorted(answer for answer in answers if isinstance(answer, str))
    if changed and target.notes["source"] != source.url:
        raise DataError(
            f"{target.store.url} was encoded from {target.notes['source']}, whose {changed[0]} is "
            f"another than that of {source.url}: give an empty target, or say --overwrite."
        )
    return {a.inspection.key: a for a in answers if isinstance(a, _Encoded)}


def _recheck_job(
    source_url: str, info: ObjectInfo, target_url: str, own: ObjectInfo, note: Mapping[str, Any]
) -> _Encoded | str | None:
    """A file that still holds, the key of one whose source is another, None for another target."""
    key, (etag, crc32) = info.key, note["source"]
    known = etag is not None and etag == _etag(info)
    if not known and zlib.crc32(open_store(source_url).read(key, info.size)) != crc32:
        return key
    data = open_store(target_url).read(key, own.size)
    if zlib.crc32(data) != note["crc32"]:
        return None
    with limited(len(data)):
        inspection = inspect_file(key, data)
    return _Encoded(inspection, (etag, crc32), *(note[name] for name in _NOTED))


def encode_file(
    key: str, data: bytes, options: EncodingOptions, without: frozenset[str] = frozenset()
) -> tuple[bytes, list[str]]:
    """The encoded file of a file's bytes, and one line for everything left out.

    Attributes and datasets beside features and labels are copied as they are.

    Args:
        without: names of trials to leave out.

    Raises:
        DataError: damage, unless options.exclude_damaged.
    """
    lexicon = options.words()
    left_out: list[str] = []
    buffer = io.BytesIO()
    try:
        with h5py.File(io.BytesIO(data), "r") as old, h5py.File(buffer, "w") as new:
            trials = {name for name in old if TRIAL_NAME.fullmatch(printable(name))}
            left_out += [f"{key}: {what}" for what in _copy(old, new, {*old} - trials)]
            for name in sorted(trials - without):
                where = f"{key}:{name}"
                try:
                    lost = _encode_trial(key, old[name], new.create_group(name), options, lexicon)
                except (DamagedTrial, DataError, *HDF5_ERRORS) as error:
                    reason = cause_of(error).removeprefix(f"{where}: ").rstrip(".")
                    if not options.exclude_damaged:
                        raise DataError(
                            f"{where}: {reason}; repair it, or leave such trials out with "
                            "--exclude-damaged."
                        ) from error
                    left_out.append(f"{where}: {reason}")
                    del new[name]
                else:
                    left_out += [f"{where}: {what}" for what in lost]
    except HDF5_ERRORS as error:
        raise DataError(f"{key}: cannot be read as HDF5 ({cause_of(error)}); copy it again.") from (
            error
        )
    return buffer.getvalue(), left_out


def _encode_trial(
    key: str,
    old: h5py.Group,
    new: h5py.Group,
    options: EncodingOptions,
    lexicon: Lexicon | None,
) -> list[str]:
    """Fill `new`; returns what of `old` could not be copied."""
    if not isinstance(old, h5py.Group):
        raise DamagedTrial("is not a group", "wrong kind")
    where = f"{key}:{new.name.lstrip('/')}"
    features = _source_features(old)
    phonemes = _source_phonemes(key, old, lexicon)
    anew = {"input_features"} if phonemes is None else {"input_features", *_LABELS}
    left_out = list(_copy(old, new, {*old} - anew))
    write_features(new, features, options.dtype, where)
    left_out += _copy(old["input_features"], new["input_features"], set())
    if phonemes is not None:
        write_labels(new, encode_diphones(phonemes, options.form), phonemes, where)
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
    match = DATA_FILE.fullmatch(key)
    assert match is not None  # keys come from data_files
    if lexicon is None:
        return read_labels(trial)[1] if is_labelled(trial, match["split"]) else None
    sentence = read_sentence(trial, lambda *_: None)
    if sentence is not None:
        return text_phonemes(sentence, lexicon)
    if match["split"] == "test":
        return None
    raise DataError("attribute sentence_label is missing, so there is no text to label")


def _encode_job(
    source_url: str, target_url: str, info: ObjectInfo, options: EncodingOptions
) -> _Encoded:
    """Read, encode, prove and write one file."""
    key = info.key
    original = open_store(source_url).read(key, info.size)
    with limited(len(original)):
        encoded, left_out = encode_file(key, original, options)
        inspection = inspect_file(key, encoded)
        broken = [f for f in inspection.findings if f.severity == "error"]
        if broken and options.exclude_damaged and all(f.trial for f in broken):
            without = frozenset(f.trial for f in broken if f.trial)
            encoded, left_out = encode_file(key, original, options, without)
            inspection = inspect_file(key, encoded)
            left_out += map(str, broken)
            broken = [f for f in inspection.findings if f.severity == "error"]
        if broken:
            raise DataError(
                f"{source_url}/{broken[0]}; see all with 'python code/prepare_dataset.py validate "
                f"{source_url}'."
            )
        compared = _prove(original, encoded, inspection, options)
    open_store(target_url).write(key, encoded)
    source = (_etag(info), zlib.crc32(original))
    return _Encoded(inspection, source, zlib.crc32(encoded), compared, left_out)


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


def _etag(info: ObjectInfo) -> str | None:
    return info.etag if S3_ETAG.fullmatch(info.etag) else None
