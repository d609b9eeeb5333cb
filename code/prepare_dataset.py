"""Make, import, encode, index and check datasets, in a folder or under s3://BUCKET/PREFIX."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from brain_to_text.command_line import require, run

require(
    "h5py jinja2 numpy tqdm yaml",
    "type `pip install 's3fs>=2026' boto3 h5py jinja2 numpy pyyaml tqdm`",
)

import argparse
import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from brain_to_text.dataset.encoding import EncodingOptions, dataset_sources, encode_files
from brain_to_text.dataset.hdf5_writer import FEATURE_TYPES
from brain_to_text.dataset.import_mat import mat_sources
from brain_to_text.dataset.indexing import index_dataset, refuse_damage
from brain_to_text.dataset.manifest import earlier_manifest, write_manifest
from brain_to_text.dataset.synthetic import SyntheticDataset, synthesize
from brain_to_text.dataset.validation import missing_files, scattered_chunks, validate_dataset
from brain_to_text.errors import BrainToTextError, ConfigError, DataError
from brain_to_text.labels.diphones import LABEL_FORMS
from brain_to_text.labels.pronunciation import read_lexicon
from brain_to_text.redaction import one_line
from brain_to_text.scoring.report_pages import dataset_page
from brain_to_text.storage.locations import (
    KMS_KEY_VARIABLE,
    MANIFEST_NAME,
    is_s3,
    not_taken_sentence,
    shortened,
)
from brain_to_text.storage.ownership import check_file, replace_file
from brain_to_text.storage.store import open_store

_PLACE = "folder or s3://BUCKET/PREFIX"
_BY_SIZE = "worker processes; default by size"
_OVERWRITE = "replace files of these names that this command did not write, or that changed since"
_KMS_KEY = "KMS key (id or ARN) that encrypts what is written to S3; default: as the bucket does"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 on success, 1 with one sentence on an error, 2 on wrong usage."""
    typed = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(typed)
    options.typed = shlex.join(["python", "code/prepare_dataset.py", *typed])
    try:
        with _encrypted(options):
            code = int(options.run(options))
            print(end="", flush=True)
            return code
    except BrainToTextError as error:
        print(f"ERROR: {one_line(str(error))}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        with suppress(OSError):  # after a hang-up nobody reads it
            print(
                f"Stopped by {signal.Signals(number).name}: every file is whole or not there; "
                "repeat the command to go on.",
                file=sys.stderr,
                flush=True,
            )
        return 128 + number


def run_synthesize(options: argparse.Namespace) -> int:
    """Write synthetic recordings and their manifest."""
    if options.trials < 1:
        raise DataError(f"--trials is {options.trials}: give at least 1.")
    dataset = SyntheticDataset(
        sessions=options.sessions,
        train_trials=options.trials,
        val_trials=-(-options.trials // 5),
        test_trials=-(-options.trials // 20),
        electrodes=options.electrodes,
        phoneme_set=options.phonemes,
        seed=options.seed,
    )
    store = open_store(options.target)
    with _progress("Sessions", "session") as report:
        manifest = synthesize(
            store,
            dataset,
            overwrite=options.overwrite,
            typed=options.typed,
            progress=report,
        )
    print(manifest.summary(store.url))
    return 0


def run_index(options: argparse.Namespace) -> int:
    """Make the manifest of a dataset anew."""
    store = open_store(options.source)
    started = time.monotonic()
    listing = store.list()
    before = earlier_manifest(store, listing)
    with _progress("Indexing", "file") as report:
        manifest = index_dataset(store, listing, options.processes, report)
    if not options.exclude_damaged:
        refuse_damage(store.url, manifest.damaged, "--exclude-damaged")
    overlooked = not_taken_sentence(listing)
    if overlooked:
        print(one_line(overlooked))
    gone = sorted(before.files.keys() - manifest.files.keys() if before else ())
    if gone:
        print(
            one_line(
                f"Warning: {len(gone)} files that were indexed before are gone ({shortened(gone)}):"
                " copy them again unless you removed them"
            )
        )
    for finding in manifest.damaged:
        print(one_line(f"Left out as damaged: {finding}"))
    warnings = (*missing_files(manifest.files), *scattered_chunks(manifest.trials), *manifest.lost)
    for finding in warnings:
        print(one_line(f"Warning: {finding}"))
    write_manifest(store, manifest)
    print(manifest.summary(store.url))
    print(f"Wrote {store.url}/{MANIFEST_NAME} in {time.monotonic() - started:.1f} s")
    return 0


def run_encode(options: argparse.Namespace) -> int:
    """Write the diphone form of a phoneme set, or of MATLAB files, and its manifest."""
    target = open_store(options.target)
    if options.lexicon and not options.from_text:
        raise ConfigError("--lexicon is for labels from text: say --from-text, too.")
    words = read_lexicon(Path(options.lexicon)) if options.lexicon else {}
    chosen = EncodingOptions(
        options.form,
        options.dtype,
        lexicon=words if options.from_text else None,
        exclude_damaged=options.exclude_damaged,
    )
    with _progress("Encoding", "file") as report:
        manifest = encode_files(
            options.sources(options.source),
            options.source,
            target,
            chosen,
            command=f"prepare_dataset.py {options.command}",
            typed=options.typed,
            processes=options.processes,
            overwrite=options.overwrite,
            progress=report,
            log=lambda line: print(line, flush=True),
        )
    print(manifest.summary(target.url))
    return 0


def run_validate(options: argparse.Namespace) -> int:
    """Check every trial; 0 when there is no error, 1 otherwise."""
    mark = b"<title>Dataset "
    if options.html is not None:
        check_file(options.html, mark)
    with _progress("Validating", "file") as report:
        store = open_store(options.source)
        result = validate_dataset(store, processes=options.processes, progress=report)
    print(json.dumps(result.to_dict(), indent=2) if options.json else result.to_text())
    if options.html is not None:
        replace_file(options.html, dataset_page(result).encode(), mark)
    return 1 if result.errors else 0


@contextmanager
def _encrypted(options: argparse.Namespace) -> Iterator[None]:
    """Write to S3 with the key of --kms-key, in worker processes, too."""
    key, before = getattr(options, "kms_key", None), os.environ.get(KMS_KEY_VARIABLE)
    if key is None:
        yield
        return
    written = options.target if "target" in options else options.source
    if not is_s3(written):
        raise ConfigError(f"--kms-key is for what is written to S3, and {written} is a folder.")
    os.environ[KMS_KEY_VARIABLE] = key
    try:
        yield
    finally:
        del os.environ[KMS_KEY_VARIABLE]
        if before is not None:
            os.environ[KMS_KEY_VARIABLE] = before


@contextmanager
def _progress(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal's stderr, as the callback (done, in all)."""
    from tqdm import tqdm

    with tqdm(desc=title, unit=unit, disable=None) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    made = commands.add_parser(
        "synthesize",
        help="write synthetic recordings that a decoder really learns from",
        description="Write synthetic recordings with the real dataset's schema, and a manifest; by "
        "default they train in minutes on a CPU with rnn_args_smoke.yaml.",
    )
    made.add_argument("target", help=_PLACE)
    made.add_argument("--sessions", type=int, default=4, help="how many sessions, from 1 to 45")
    made.add_argument(
        "--trials",
        type=int,
        default=80,
        help="training trials per session; a fifth as many for validation, a twentieth for test",
    )
    made.add_argument("--electrodes", type=int, default=48, help="two features each")
    made.add_argument(
        "--phonemes", action="store_true", help="a 41-class phoneme set instead of diphones"
    )
    made.add_argument("--seed", type=int, default=0, help="equal seeds make equal files")
    made.add_argument("--overwrite", action="store_true", help=_OVERWRITE)
    made.add_argument("--kms-key", metavar="ARN", help=_KMS_KEY)
    made.set_defaults(run=run_synthesize)

    imported = commands.add_parser(
        "import-mat",
        help="turn the 2024 benchmark's MATLAB files into a dataset",
        description="Write the recordings of the Brain-to-Text Benchmark '24 (participant T12) in "
        "the public schema: 256 features, z-scored per block, diphone labels by pronunciation.",
    )
    imported.add_argument(
        "source", metavar="folder", help="competitionData, with train, test, competitionHoldOut"
    )
    imported.add_argument("target", help=_PLACE)
    _of_another(imported)
    imported.set_defaults(
        run=run_encode, sources=mat_sources, from_text=True, dtype="float32", command="import-mat"
    )

    encoded = commands.add_parser(
        "encode",
        help="turn a phoneme dataset into a diphone dataset",
        description="Write the diphone form of a dataset. Interrupted? Repeat the command: files "
        "that are done are skipped. Every trial is decoded back before its file is written.",
    )
    encoded.add_argument("source", help=_PLACE)
    encoded.add_argument("target", help=_PLACE)
    encoded.add_argument(
        "--dtype",
        choices=FEATURE_TYPES,
        default="float32",
        help="float16 halves what a job reads",
    )
    encoded.add_argument(
        "--from-text",
        action="store_true",
        help="take phonemes from each trial's sentence",
    )
    _of_another(encoded)
    encoded.set_defaults(run=run_encode, sources=dataset_sources, command="encode")

    indexed = commands.add_parser(
        "index",
        help="record where every trial lies",
        description="Read every data file once and write trial_manifest.json.gz beside them.",
    )
    indexed.add_argument("source", help=_PLACE)
    indexed.add_argument("--processes", type=int, help=_BY_SIZE)
    indexed.add_argument(
        "--exclude-damaged",
        action="store_true",
        help="name damaged trials in the manifest and go on, instead of stopping",
    )
    indexed.add_argument("--kms-key", metavar="ARN", help=_KMS_KEY)
    indexed.set_defaults(run=run_index)

    checked = commands.add_parser(
        "validate",
        help="check every trial",
        description="Read the whole dataset and report everything wrong or odd; exit code 1 if "
        "there is an error.",
    )
    checked.add_argument("source", help=_PLACE)
    checked.add_argument("--processes", type=int, help=_BY_SIZE)
    checked.add_argument("--json", action="store_true", help="print the report as JSON instead")
    checked.add_argument(
        "--html", type=Path, metavar="FILE", help="write the report as one HTML page too"
    )
    checked.set_defaults(run=run_validate)
    return parser


def _of_another(command: argparse.ArgumentParser) -> None:
    """What the commands have in common that make a dataset out of another."""
    command.add_argument("--form", choices=LABEL_FORMS, default="self_loop", help="label form")
    command.add_argument(
        "--lexicon", help="for labels from text: more words, lines of 'word PHONEME PHONEME …'"
    )
    command.add_argument(
        "--exclude-damaged", action="store_true", help="leave out, by name, what cannot be encoded"
    )
    command.add_argument("--processes", type=int, default=1, help="files made at once")
    command.add_argument("--overwrite", action="store_true", help=_OVERWRITE)
    command.add_argument("--kms-key", metavar="ARN", help=_KMS_KEY)


def _stop(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    for _number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: nothing is left half-written
        signal.signal(_number, _stop)
    sys.exit(run(main))
