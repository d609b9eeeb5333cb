"""The job request: what the user asked for, nothing secret, everything decodable."""

import json

import launch_sagemaker_job
import pytest
import train_model_sagemaker
from brain_to_text.config_reader import load_config
from brain_to_text.errors import JobError
from brain_to_text.launch.request import (
    CODE_FOLDER,
    METRIC_DEFINITIONS,
    JobSettings,
    check_settings,
    hyperparameter_text,
    job_config,
    new_job_name,
    training_request,
)
from brain_to_text.launch.request_validation import option_of
from brain_to_text.training.container import SageMakerEnvironment
from hypothesis import given
from hypothesis import strategies as st

KNOWN = {
    "s3_bucket": "my-bucket",
    "role": "arn:aws:iam::123456789012:role/brain-to-text-training",
    "image_uri": "123456789012.dkr.ecr.us-east-1.amazonaws.com/b2t@sha256:" + "ab" * 32,
    "job_name": "b2t-diphone-1",
}

DIPHONES = {  # in what the diphone file differs from the schema
    "batches_per_val_step": "1500",
    "dataset.batch_size": "48",
    "dataset.n_classes": "1681",
    "lr_max": "0.004",
    "model.classifier": "factored",
    "model.n_units": "1024",
    "model.rnn_dropout": "0.5",
    "num_training_batches": "150000",
    "weight_decay": "0.002",
}


def request(**settings):
    asked = JobSettings(**{**KNOWN, **settings})
    check_settings(asked)
    return training_request(asked, job_config(asked))


def test_the_shortest_command_makes_the_reference_job():
    assert request() == {
        "TrainingJobName": "b2t-diphone-1",
        "RoleArn": KNOWN["role"],
        "AlgorithmSpecification": {
            "TrainingImage": KNOWN["image_uri"],
            "TrainingInputMode": "File",
            "MetricDefinitions": list(METRIC_DEFINITIONS),
        },
        "HyperParameters": {
            "s3-bucket": "my-bucket",
            "s3-data-prefix": "data/hdf5_data_diphone_encoded",
            "config-file": "defaults",
            "output-s3-uri": "s3://my-bucket/sagemaker-outputs/b2t-diphone-1",
            **DIPHONES,
        },
        "OutputDataConfig": {"S3OutputPath": "s3://my-bucket/sagemaker-outputs"},
        "ResourceConfig": {
            "InstanceType": "ml.g5.2xlarge",
            "InstanceCount": 1,
            "VolumeSizeInGB": 30,
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": 172800},
        "CheckpointConfig": {
            "S3Uri": "s3://my-bucket/sagemaker-outputs/b2t-diphone-1/checkpoints",
            "LocalPath": "/opt/ml/checkpoints",
        },
        "Tags": [{"Key": "project", "Value": "brain-to-text"}],
        "ProfilerConfig": {"DisableProfiler": True},
        "RetryStrategy": {"MaximumRetryAttempts": 1},
    }


def test_other_ways_to_start_and_to_read():
    made = request(resume_from="b2t-earlier", data_channel="file", s3_data_prefix="some/data/")
    states = "s3://my-bucket/sagemaker-outputs/b2t-earlier/checkpoints"
    assert made["CheckpointConfig"]["S3Uri"] == states
    (channel,) = made["InputDataConfig"]
    assert channel["InputMode"] == made["AlgorithmSpecification"]["TrainingInputMode"] == "File"
    assert channel["DataSource"]["S3DataSource"]["S3Uri"] == "s3://my-bucket/some/data/"
    assert made["HyperParameters"]["data-dir"] == "/opt/ml/input/data/training"


def test_short_options_and_dotted_keys_become_the_same_hyperparameters():
    short = request(batch_size=32, num_training_batches=1000)["HyperParameters"]
    dotted = request(overrides={"dataset.batch_size": "32", "num-training-batches": "1000"})
    assert short == dotted["HyperParameters"] and short["dataset.batch_size"] == "32"


@pytest.mark.parametrize("kind", ["diphone_sagemaker", "phoneme_sagemaker", "smoke"])
def test_a_job_carries_what_differs_from_the_schemas_defaults(kind):
    """The phoneme file is the public baseline, which is the schema's default."""
    made = request(config_file=f"rnn_args_{kind}.yaml")["HyperParameters"]
    places = {"config-file", "s3-bucket", "s3-data-prefix", "output-s3-uri"}
    assert (made.keys() == places) == (kind == "phoneme_sagemaker")
    words = [word for k, v in made.items() for word in (f"--{k}", through_toolkit(v))]
    environment = SageMakerEnvironment.from_variables({})
    options, values = train_model_sagemaker.parse_arguments(words, environment)
    trained = load_config(train_model_sagemaker._find_config(options.config_file), values)
    assert trained == load_config(CODE_FOLDER / f"rnn_args_{kind}.yaml")


def test_lists_and_mappings_make_the_same_config_in_the_image(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "dataset: {n_classes: 1681, bad_trials_dict: {t15.2023.08.11: {2: [1, 4]}}}\n"
        "objective: {schedule: [[0.5, 1], [90000, 0.4]]}\nlr_min: 1.0e-05\nuse_amp: false\n"
    )
    made = request(config_file=str(path))["HyperParameters"]
    received = {name: through_toolkit(text) for name, text in made.items() if "-" not in name}
    assert load_config(None, received) == load_config(path)


def through_toolkit(text: str) -> str:
    """What the program sees on its command line: JSON-decoded, then str(), mappings as k=v."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if value is None:
        return ""
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in sorted(value.items()))
    return str(value)


@given(st.text())
def test_text_reaches_the_program_unchanged(text):
    assert through_toolkit(hyperparameter_text(text)) == text


@given(st.one_of(st.integers(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False)))
def test_numbers_and_booleans_reach_the_program_as_python_writes_them(value):
    assert through_toolkit(hyperparameter_text(value)) == str(value)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"s3_bucket": "s3://my-bucket"}, "without s3://"),
        ({"job_name": "no_underscores"}, "--job-name is 'no_underscores'"),
        ({"instance_type": "g5.2xlarge"}, "nearest: ml.g5.2xlarge"),
        ({"instance_count": 0}, "--instance-count is 0"),
        ({"retries": 31}, "--retries is '31' and SageMaker wants it to be at most 30"),
        ({"keep_alive_minutes": 361}, "at most 21,600 seconds"),
        ({"role": "brain-to-text"}, "--role"),
        ({"environment": {"A": "x" * 513}}, "--env A is 513 characters long"),
        ({"tags": {"a*b": "1"}}, "--tag is 'a*b'"),
        ({"tags": {"project": "mine"}}, "'project' is how --list finds our jobs"),
        ({"tags": {f"t{n}": "1" for n in range(56)}}, "--tag is 57 entries long"),
        ({"overrides": {"init_checkpoint_path": "a" * 2501}}, "write it into a file in code/"),
        ({"max_run_hours": float("nan")}, "--max-run-hours is nan"),
        ({"subnets": ("a_b",), "security_group_ids": ("sg-1",)}, "--subnets is 'a_b'"),
        ({"subnets": ("subnet-1",)}, "--security-group-ids"),
        ({"max_wait_hours": 60.0}, "--spot"),
        ({"spot": True, "max_wait_hours": 1.0}, "cannot be less"),
        ({"spot": True, "keep_alive_minutes": 5}, "warm"),
        ({"init_from_checkpoint": "bucket/key"}, "s3://BUCKET/KEY"),
        ({"data_channel": "pipe"}, "fastfile"),
        ({"environment": {"A": "AKIAIOSFODNN7EXAMPLE"}}, "looks like a secret"),
        ({"tags": {"a": "ghp_0123456789abcdefghij"}}, "The tag 'a' looks like a secret"),
        ({"tags": {"db-pass": "x"}}, "The tag 'db-pass' looks like a secret"),
        ({"volume_gb": 0}, "--volume-gb is 0"),
        ({"environment": {"A": "https://b/k?X-Amz-Signature=0a1b"}}, "looks like a secret"),
        ({"overrides": {"model.n_units": "https://me:pw@host"}}, "looks like a secret"),
        ({"mlflow_tracking_uri": "https://me:pw@host"}, "password"),
        ({"mlflow_tracking_uri": "databricks"}, "mlflow-tracking-server or mlflow-app"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(settings, said):
    with pytest.raises(JobError) as refused:
        request(**settings)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


# Fields that no option sets to a value: constants, and what a switch turns on.
CONSTANTS = (
    "AlgorithmSpecification.TrainingInputMode",
    "AlgorithmSpecification.MetricDefinitions",
    "CheckpointConfig.LocalPath",
    "ProfilerConfig",
    "RemoteDebugConfig",
    "EnableManagedSpotTraining",
    "EnableInterContainerTrafficEncryption",
)


def test_every_field_of_a_request_is_blamed_on_an_option_that_exists():
    flags = set(launch_sagemaker_job.build_parser()._option_string_actions)
    everything = {
        "spot": True,
        "data_channel": "file",
        "subnets": ("subnet-1",),
        "security_group_ids": ("sg-1",),
        "encrypt_traffic": True,
        "output_kms_key": "arn:aws:kms:us-east-1:123456789012:key/1",
        "volume_kms_key": "alias/my-key",
        "tags": {"Größe": "1 + 2 = 3 @ home/lab:a.b_c-d"},
        "environment": {"A_b1": "any\ttext\nat all ü"},
        "debug_shell": True,
        "mlflow_tracking_uri": "arn:aws:sagemaker:us-east-1:123456789012:mlflow-app/x",
        "accept_changes": True,
    }
    for settings in (everything, {"keep_alive_minutes": 360}):
        for path in leaves(request(**settings)):
            place = ".".join(part for part in path if isinstance(part, str))
            if not place.startswith(CONSTANTS):
                assert option_of(path).split()[0] in flags | {"configuration"}, place


def leaves(value, path=()):
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for name, part in inner:
        if isinstance(part, (dict, list)):
            yield from leaves(part, (*path, name))
        else:
            yield (*path, name)


@pytest.mark.parametrize("name", ["role", "image_uri", "job_name"])
def test_what_is_missing_is_named_with_the_option_that_gives_it(name):
    with pytest.raises(JobError, match="--" + name.replace("_", "-")):
        request(**{name: None})


@pytest.mark.parametrize("config", ["rnn_args_diphone_sagemaker.yaml", "/a/b/my own!.yaml", "."])
def test_made_names_are_valid_and_differ(config):
    names = {new_job_name(config) for _ in range(20)}
    assert len(names) == 20
    assert all(JobSettings(s3_bucket="my-bucket", job_name=name) for name in names)
    assert all(len(name) <= 63 for name in names)
