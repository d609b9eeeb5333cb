"""How good is a decoder? Error rates with intervals, tables per trial, and a report to look at.

Reads the model exactly as a SageMaker job leaves it (a folder, model.tar.gz, or the s3:// URL of
either) and the data from S3 or a folder.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))

from brain_to_text.command_line import require, run

require(
    "h5py jinja2 numpy rapidfuzz torch tqdm yaml",
    "use .venv/bin/python, which ./local_run.sh makes",
)

from brain_to_text.errors import BrainToTextError, ConfigError
from brain_to_text.redaction import one_line
from brain_to_text.storage.locations import DEFAULT_PREFIX, s3_url

if TYPE_CHECKING:
    from brain_to_text.scoring.word_decoder import WordOptions


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option(
        "--model",
        required=True,
        action="append",
        help="model folder, model.tar.gz, or s3:// URL of either; again for each model of an "
        "ensemble, which decodes the mean of their phoneme log-probabilities",
    )
    option("--s3-bucket", default=os.environ.get("S3_BUCKET"), help="bucket that holds the dataset")
    option("--s3-data-prefix", default=DEFAULT_PREFIX, help="prefix of the SESSION folders")
    option("--data-dir", help="a folder (or s3:// URL) instead of a bucket and prefix")
    option("--split", choices=("val", "test", "train"), default="val")
    option("--output-dir", type=Path, default=Path(".local/evaluation"), help="for the results")
    option(
        "--overwrite",
        action="store_true",
        help="replace results of another model, dataset or split in the output folder",
    )
    option("--compare-with", help="another model: tested against it, trial by trial")
    option("--batch-size", type=int, default=128, help="trials per forward pass")
    option(
        "--export-logits",
        action="store_true",
        help="also write phoneme_logits.hdf5 for the public language-model server",
    )
    option(
        "--export-streaming",
        type=Path,
        metavar="FILE",
        help="write the real-time decoder as TorchScript, and evaluate nothing",
    )
    words = parser.add_argument_group(
        "words (needs docker/requirements_sagemaker_words.txt)"
    ).add_argument
    words(
        "--language-model",
        help="decode sentences with this ARPA or KenLM file; 'training': 3-grams of the training "
        "sentences; 'none': the lexicon alone",
    )
    words("--lexicon", type=Path, help="file of 'WORD PHONEME ...' lines: adds words")
    words("--lm-weight", type=float, help="of the model's log10 probabilities")
    words("--word-score", type=float, help="added per word")
    words("--beam-size", type=int, help="hypotheses kept per frame")
    words("--tune-words", action="store_true", help="choose both weights on the val split")
    words(
        "--nbest",
        type=int,
        metavar="N",
        help="also write the N best sentences of each trial, with their scores, to nbest.csv",
    )
    words(
        "--rescored",
        type=Path,
        metavar="FILE",
        help="instead of a language model: nbest.csv with your own column score, whose best "
        "sentences are scored",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """0 when done, 1 with one clear sentence otherwise."""
    options = build_parser().parse_args(arguments)
    try:
        evaluate(options)
        print(end="", flush=True)
    except BrainToTextError as error:
        print(f"ERROR: {one_line(str(error))}", file=sys.stderr)
        return 1
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Turn options into one call of the library, after what needs no torch was checked."""
    if options.export_streaming is not None:
        from brain_to_text.model.realtime import export_streaming
        from brain_to_text.model.trained_model import open_model

        if len(options.model) > 1:
            raise ConfigError("An ensemble has no real-time decoder: give one --model.")
        export_streaming(open_model(options.model[0]), options.export_streaming)
        print(f"The real-time decoder is in {options.export_streaming}")
        return
    if options.data_dir == "":
        raise ConfigError("--data-dir is empty: give a folder or an s3:// URL.")
    if options.data_dir is None and not options.s3_bucket:
        raise ConfigError(
            "No data was named: give --s3-bucket BUCKET (and --s3-data-prefix), or "
            "--data-dir FOLDER."
        )
    data = options.data_dir or s3_url(options.s3_bucket, options.s3_data_prefix)

    # After the cheap checks: importing torch takes seconds.
    from brain_to_text.scoring.evaluate import evaluate_model

    evaluate_model(
        options.model,
        data,
        options.split,
        options.output_dir,
        compare_with=options.compare_with,
        batch_size=options.batch_size,
        export_logits=options.export_logits,
        words=_word_options(options),
        overwrite=options.overwrite,
    )


def _word_options(options: argparse.Namespace) -> "WordOptions | None":
    from brain_to_text.scoring.word_decoder import WordOptions

    names = [field.name for field in dataclasses.fields(WordOptions)]
    given = {name: getattr(options, name) for name in names}
    given = {n: value for n, value in given.items() if value is not None and value is not False}
    return WordOptions(**given) if given else None


if __name__ == "__main__":
    sys.exit(run(main))
