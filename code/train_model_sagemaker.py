"""Train a brain-to-text decoder on data streamed from S3: the program SageMaker starts.

Works alike as `python train_model_sagemaker.py …`, under the training toolkit's `train`, and with
every option given as a SageMaker hyperparameter. Any key of the configuration is an option too, by
its dotted path or its unambiguous last part: `--model.n_units 768`, `--batch-size 32`.
"""

import argparse
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from brain_to_text.command_line import require, run

require(
    "h5py numpy rapidfuzz torch tqdm yaml",
    "use .venv/bin/python, which ./local_run.sh makes, or the image",
)

from brain_to_text.config import config_keys
from brain_to_text.config_reader import SCHEMA_DEFAULTS, load_config, split_overrides
from brain_to_text.errors import BrainToTextError, ConfigError, InUseError
from brain_to_text.storage.locations import DEFAULT_PREFIX, s3_url
from brain_to_text.training.container import SageMakerEnvironment, failure_text

if TYPE_CHECKING:
    from brain_to_text.training.run import Run

DEFAULT_CONFIG = "rnn_args_diphone_sagemaker.yaml"


def parse_arguments(
    arguments: list[str], environment: SageMakerEnvironment
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Split the command line into this program's options and configuration overrides.

    Raises:
        ConfigError: something that is neither, or an option without a value.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=_keys_of_the_configuration(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    text = parser.add_argument
    text("--s3-bucket", default=os.environ.get("S3_BUCKET"), help="bucket that holds the dataset")
    text("--s3-data-prefix", default=DEFAULT_PREFIX, help="prefix of the SESSION folders")
    text("--data-dir", help="a folder instead of a bucket (File or FastFile channels, local data)")
    text(
        "--config-file",
        default=DEFAULT_CONFIG,
        help=f"YAML: a path, or a name beside this program; '{SCHEMA_DEFAULTS}': no file",
    )
    text("--model-dir", default=str(environment.model_dir), help="becomes model.tar.gz")
    text(
        "--output-data-dir", default=str(environment.output_data_dir), help="becomes output.tar.gz"
    )
    text("--checkpoint-dir", default=str(environment.checkpoint_dir), help="resume states")
    text("--output-s3-uri", help="folder for logs/training_log while the job runs")
    text(
        "--accept-changes",
        default="false",
        help="true: resume even though config, data or code differ from the checkpoint's",
    )
    options, rest = parser.parse_known_args(arguments)
    return options, split_overrides(rest)


def _keys_of_the_configuration() -> str:
    """Each key with the public baseline's value and what it means, as text for --help."""
    default = load_config()
    lines = ["configuration keys, with the public baseline's values:"]
    for path, _, entry in config_keys():
        value: Any = default
        for name in path.split("."):
            value = getattr(value, name)
        shown = "null" if value is None else str(value).lower()
        lines.append(f"  --{path} [{shown}]\n      {entry.metadata['help']}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Train; 0 when finished or stopped by a signal, 1 with one clear sentence otherwise."""
    environment = SageMakerEnvironment.from_variables()
    try:
        options, overrides = parse_arguments(
            sys.argv[1:] if arguments is None else arguments, environment
        )
        train(options, overrides, environment)
        environment.forget_failure()
    except Exception as error:  # noqa: BLE001
        if not isinstance(error, BrainToTextError):
            traceback.print_exc()
        # a run that is refused leaves the failure file to the one that holds the folder
        refused = isinstance(error, InUseError)
        text = failure_text(error) if refused else environment.write_failure(error)
        print(f"ERROR: {text}", file=sys.stderr, flush=True)
        return 1
    return 0


def train(
    options: argparse.Namespace, overrides: dict[str, str], environment: SageMakerEnvironment
) -> None:
    """Turn options into one call of the trainer."""
    config = load_config(_find_config(options.config_file), overrides)
    accept_changes = str(options.accept_changes).lower()
    if accept_changes not in ("true", "false"):
        raise ConfigError(f"--accept-changes is {options.accept_changes!r}: write true or false.")

    # Large tensors in huge pages: a new 120 MB batch costs 15 ms instead of 65 ms of page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # After the cheap checks: importing torch takes seconds.
    from brain_to_text.training.rnn_trainer_s3 import BrainToTextDecoder_Trainer_S3, RunPaths

    trainer = BrainToTextDecoder_Trainer_S3(
        config,
        _data_url(options, environment),
        RunPaths(
            Path(options.model_dir),
            Path(options.output_data_dir),
            Path(options.checkpoint_dir),
        ),
        log_url=_log_url(options, environment),
        accept_changes=accept_changes == "true",
        report=write_report,
    )
    trainer.train()


def write_report(run: "Run") -> None:
    """Tables and report.html of a finished run's best model."""
    from brain_to_text.scoring.evaluate import write_run_report
    from brain_to_text.training.log_files import process_seconds

    write_run_report(
        run.paths.model_dir,
        run.paths.output_data_dir,
        run.stream,
        run.device,
        batch_size=run.config.dataset.batch_size,
        decoded=run.best,
        job=job_facts(process_seconds()),
    )


def job_facts(seconds: float) -> dict[str, str]:
    """What a job knows of itself, for its report; on demand, as far as the price table knows.

    Args:
        seconds: since the job's first process began.
    """
    from brain_to_text.launch.pricing import hourly_price

    name = os.environ.get("SM_CURRENT_INSTANCE_TYPE", "")
    count = len(json.loads(os.environ.get("SM_HOSTS", "[]"))) or 1
    price, source = hourly_price(name)
    facts = {
        "Job": os.environ.get("TRAINING_JOB_NAME", ""),
        "Instance": name and f"{count} x {name}",
    }
    facts["Duration of this job"] = f"{seconds / 60:.1f} min" if seconds else ""
    if price is not None and seconds:
        dollars = price * count * seconds / 3600
        facts["Cost so far"] = f"${dollars:.2f} on demand ({source})"
    return {fact: value for fact, value in facts.items() if value}


def _data_url(options: argparse.Namespace, environment: SageMakerEnvironment) -> str:
    folder = options.data_dir or (None if options.s3_bucket else environment.data_dir)
    if folder is not None:
        return str(folder)
    if not options.s3_bucket:
        raise ConfigError(
            "No data was named: give --s3-bucket BUCKET (and --s3-data-prefix), or "
            "--data-dir FOLDER."
        )
    return s3_url(options.s3_bucket, options.s3_data_prefix)


def _log_url(options: argparse.Namespace, environment: SageMakerEnvironment) -> str | None:
    if options.output_s3_uri:
        return f"{options.output_s3_uri.rstrip('/')}/logs"
    if options.s3_bucket and environment.job_name:
        return s3_url(options.s3_bucket, "sagemaker-outputs", environment.job_name, "logs")
    return None


def _find_config(name: str) -> Path | None:
    if name == SCHEMA_DEFAULTS:
        return None
    path = Path(name)
    return path if path.exists() or path.is_absolute() else HERE / name


if __name__ == "__main__":
    sys.exit(run(main))
