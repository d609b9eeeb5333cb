"""Turn a phoneme dataset into a diphone dataset, file by file, resumably, proving every trial."""

from __future__ import annotations

import base64
import gzip
import io
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np

from ..errors import DataError
from ..labels.diphones import LabelForm, decode_diphones, encode_diphones
from ..labels.pronunciation import Lexicon, read_lexicon
from ..labels.text_labels import text_phonemes
from .hdf5_reader import (
    DATA_FILE,
    HDF5_ERRORS,
    TRIAL_NAME,
    DamagedTrial,
    FileInspection,
    attribute_text,
    inspect_file,
    read_labels,
)
from .hdf5_writer import FeatureType, Layout, padded, write_features
from .manifest import (
    FileRecord,
    TrialManifest,
    data_files,
    manifest_from_inspections,
    write_manifest,
)
from .store import ObjectInfo, ObjectStore, listing_after_writing, open_store

PROGRESS_NAME = "encode_progress.json.gz"
_WRITTEN_ANEW = ("input_features", "seq_class_ids", "seq_class_ids_phoneme")


@dataclass(frozen=True)
class EncodingOptions:
    """What the target is to look like.

    form: form of the diphone labels. dtype, layout: how features are stored.
    from_text: take phoneme labels from each trial's sentence instead of its label array.
    lexicon: file with pronunciations of one's own words, for from_text.
    exclude_damaged: leave trials out, by name, that cannot be encoded.
    """

    form: LabelForm = "self_loop"
    dtype: FeatureType = "float32"
    layout: Layout = "contiguous"
    from_text: bool = False
    lexicon: str | None = None
    exclude_damaged: bool = False


def encode_dataset(
    source: ObjectStore,
    target: ObjectStore,
    options: EncodingOptions | None = None,
    *,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[str], None] = print,
) -> TrialManifest:
    """Write the diphone form of every data file of `source` to `target`, and a manifest.

    Files are written whole or not at all. A file that is already in the target, encoded from the
    same source file with the same options, is skipped, so an interrupted run is simply repeated.
    Before a file is written, each of its trials is decoded back and compared with the source.

    Args:
        processes: files encoded at once, each in memory.
        progress: called with (files done, files in all).
        log: receives one line per trial left out, and one about files skipped.

    Raises:
        DataError: damage in the source, a target that holds something else.
        StorageError: source or target cannot be read or written.
    """
    options = options or EncodingOptions()
    if source.url.rstrip("/") == target.url.rstrip("/"):
        raise DataError(f"Source and target are both {source.url}: give another target.")
    sources = data_files(source.list(), source.url)
    state = _State.load(source, target, options, sources)
    todo = [info for key, info in sources.items() if key not in state.done]
    if state.done:
        log(f"{len(state.done)} of {len(sources)} files are encoded already and are skipped")
    total = len(sources)
    if progress is not None:
        progress(len(state.done), total)
    jobs = [(source.url, target.url, info, options) for info in todo]
    for inspection, left_out in _encoded(jobs, processes):
        for line in left_out:
            log(f"Left out: {line}")
        state.add(target, sources[inspection.key], inspection)
        if progress is not None:
            progress(len(state.done), total)
    manifest = state.manifest()
    write_manifest(target, manifest)
    return manifest


def encode_file(key: str, data: bytes, options: EncodingOptions) -> tuple[bytes, list[str]]:
    """The encoded file of a file's bytes, and one line per trial left out.

    Attributes and datasets beside features and labels are copied as they are.

    Raises:
        DataError: damage, unless options.exclude_damaged.
    """
    lexicon = _lexicon(options)
    left_out: list[str] = []
    buffer = io.BytesIO()
    try:
        with h5py.File(io.BytesIO(data), "r") as old, h5py.File(buffer, "w") as new:
            new.attrs.update(old.attrs)
            for name in old:
                if not TRIAL_NAME.fullmatch(name):
                    old.copy(name, new)
                    continue
                try:
                    _encode_trial(key, old[name], new.create_group(name), options, lexicon)
                except (DamagedTrial, DataError, *HDF5_ERRORS) as error:
                    reason = " ".join(str(error).split()).removeprefix(f"{key}:{name}: ")
                    if not options.exclude_damaged:
                        raise DataError(
                            f"{key}:{name}: {reason.rstrip('.')}; repair it, or leave such trials "
                            "out with --exclude-damaged."
                        ) from error
                    left_out.append(f"{key}:{name}: {reason}")
                    del new[name]
    except HDF5_ERRORS as error:
        raise DataError(
            f"{key}: cannot be read as HDF5 ({' '.join(str(error).split())}); copy it again."
        ) from error
    return buffer.getvalue(), left_out


def _lexicon(options: EncodingOptions) -> Lexicon | None:
    """One's own words if labels come from text (often none), None if they come from labels."""
    if not options.from_text:
        return None
    return read_lexicon(Path(options.lexicon)) if options.lexicon else {}


def _encode_trial(
    key: str,
    old: h5py.Group,
    new: h5py.Group,
    options: EncodingOptions,
    lexicon: Lexicon | None,
) -> None:
    where = f"{key}:{new.name.lstrip('/')}"
    if "input_features" not in old:
        raise DataError(f"{where}: dataset input_features is missing")
    for name, value in old.attrs.items():
        new.attrs[name] = value
    for name in old:
        if name not in _WRITTEN_ANEW:
            old.copy(name, new)
    write_features(new, old["input_features"][:], options.layout, options.dtype, where)
    phonemes = _source_phonemes(key, old, lexicon)
    if phonemes is not None:
        labels = encode_diphones(phonemes, options.form)
        new["seq_class_ids"] = padded(labels, where)
        new["seq_class_ids_phoneme"] = padded(phonemes, where)
        new.attrs["seq_len"] = len(labels)
        new.attrs["seq_len_phoneme"] = len(phonemes)


def _source_phonemes(key: str, trial: h5py.Group, lexicon: Lexicon | None) -> np.ndarray | None:
    """Phoneme labels of a source trial, None in the test split."""
    match = DATA_FILE.fullmatch(key)
    if match is not None and match["split"] == "test":
        return None
    attributes = dict(trial.attrs)
    if lexicon is not None:
        sentence = attribute_text(attributes, "sentence_label")
        if sentence is None:
            raise DataError("attribute sentence_label is missing, so there is no text to label")
        return text_phonemes(sentence, lexicon)
    return read_labels(trial, attributes)[1]


def _encode_job(
    source_url: str, target_url: str, info: ObjectInfo, options: EncodingOptions
) -> tuple[FileInspection, list[str]]:
    """Read, encode, prove and write one file."""
    key = info.key
    original = open_store(source_url).read(key, info.size)
    encoded, left_out = encode_file(key, original, options)
    inspection = inspect_file(key, encoded)
    broken = [f for f in inspection.findings if f.severity == "error"]
    if broken:
        raise DataError(
            f"{source_url}/{broken[0]}; see all with 'python code/prepare_dataset.py validate "
            f"{source_url}'."
        )
    _prove(original, encoded, inspection, options)
    open_store(target_url).write(key, encoded)
    return inspection, left_out


def _prove(
    original: bytes, encoded: bytes, inspection: FileInspection, options: EncodingOptions
) -> None:
    """Decode every encoded trial by the manifest's record and compare it with the source.

    Raises:
        DataError: labels or features differ.
    """
    lexicon = _lexicon(options)
    with h5py.File(io.BytesIO(original), "r") as file:
        for record in inspection.records:
            trial = file[record.trial]
            span = memoryview(encoded)[record.offset : record.offset + record.length]
            expected = trial["input_features"][:].astype(options.dtype)
            if not np.array_equal(record.decode(span), expected):
                raise DataError(f"{record.name}: the encoded features differ from the source's.")
            phonemes = _source_phonemes(record.key, trial, lexicon)
            if phonemes is None:
                continue
            if record.class_ids is None or not np.array_equal(
                decode_diphones(record.class_ids, options.form), phonemes
            ):
                raise DataError(f"{record.name}: the encoded labels do not decode to the source's.")


def _encoded(
    jobs: list[tuple[str, str, ObjectInfo, EncodingOptions]], processes: int
) -> Iterator[tuple[FileInspection, list[str]]]:
    if processes <= 1:
        for job in jobs:
            yield _encode_job(*job)
        return
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        for future in as_completed([pool.submit(_encode_job, *job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()


class _State:
    """What has been encoded so far, kept in the target as one small object."""

    def __init__(self, options: EncodingOptions) -> None:
        self.options = options
        self.sources: dict[str, FileRecord] = {}
        self.targets: dict[str, ObjectInfo] = {}
        self.inspections: dict[str, FileInspection] = {}

    @property
    def done(self) -> set[str]:
        return set(self.inspections)

    @classmethod
    def load(
        cls,
        source: ObjectStore,
        target: ObjectStore,
        options: EncodingOptions,
        sources: Mapping[str, ObjectInfo],
    ) -> _State:
        """What of an earlier run still holds.

        Raises:
            DataError: the target was begun with other options, or holds files of another source.
        """
        state = cls(options)
        listing = target.list()
        strangers = [k for k in listing if DATA_FILE.fullmatch(k) and k not in sources]
        if strangers:
            raise DataError(
                f"{target.url} already holds {strangers[0]}, which {source.url} does not have: "
                "give an empty target, or remove what is there."
            )
        if PROGRESS_NAME not in listing:
            return state
        try:
            saved = json.loads(gzip.decompress(target.read(PROGRESS_NAME)))
            earlier, files = saved["options"], saved["sources"]
            partial = TrialManifest.from_bytes(base64.b64decode(saved["manifest"]))
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{target.url}/{PROGRESS_NAME} is damaged: remove it to encode everything again."
            ) from error
        if earlier != asdict(options):
            changed = [
                f"{k} was {earlier.get(k)}"
                for k, v in asdict(options).items()
                if earlier.get(k) != v
            ]
            raise DataError(
                f"{target.url} was begun with other options ({', '.join(changed)}): repeat them, "
                "or give an empty target."
            )
        for key, (size, etag) in files.items():
            info, there = sources.get(key), listing.get(key)
            written = partial.files.get(key)
            if info is None or there is None or written is None:
                continue
            if (info.size, info.etag) == (size, etag) and written == FileRecord(
                there.size, there.etag
            ):
                records = [trial for trial in partial.trials if trial.key == key]
                forms: list[str | None] = [
                    None if trial.class_ids is None else options.form for trial in records
                ]
                state.sources[key] = FileRecord(size, etag)
                state.targets[key] = there
                state.inspections[key] = FileInspection(key, there.size, records, forms)
        return state

    def add(self, target: ObjectStore, info: ObjectInfo, inspection: FileInspection) -> None:
        """Record a file just written, and keep that in the target."""
        key = inspection.key
        self.targets |= listing_after_writing(target, {key: inspection.size})
        self.sources[key] = FileRecord(info.size, info.etag)
        self.inspections[key] = inspection
        document = {
            "options": asdict(self.options),
            "sources": {k: [record.size, record.etag] for k, record in self.sources.items()},
            "manifest": base64.b64encode(self.manifest().to_bytes()).decode(),
        }
        target.write(PROGRESS_NAME, gzip.compress(json.dumps(document).encode(), mtime=0))

    def manifest(self) -> TrialManifest:
        """The manifest of what is there."""
        keys = sorted(self.inspections)
        return manifest_from_inspections(
            {key: self.targets[key] for key in keys}, [self.inspections[key] for key in keys]
        )
