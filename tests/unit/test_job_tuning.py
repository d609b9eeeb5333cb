"""A sweep's request: ranges checked against the configuration, everything else as in a job."""

import re
from dataclasses import replace

import pytest
from brain_to_text.errors import ConfigError, JobError
from brain_to_text.launch.job_tuning import (
    read_sweep,
    submit_sweep,
    sweep_price,
    sweep_table,
    tuning_request,
)
from brain_to_text.launch.request import METRIC_DEFINITIONS, JobSettings, training_request
from support.aws_emulation import BUCKET, ROLE, emulated_aws

JOB = JobSettings(s3_bucket=BUCKET, role=ROLE, image_uri="i", job_name="b2t-sweep-1")
SPEC = """
metric: validation:DER
max_jobs: 12
max_parallel_jobs: 3
parameters:
  lr_max: {min: 0.001, max: 0.01, scaling: Logarithmic}
  dataset.batch_size: {min: 32, max: 64}
  model.n_units: {values: [768, 1024]}
"""


@pytest.fixture
def spec(tmp_path):
    def write(text=SPEC):
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        return path

    return write


def test_the_request_field_by_field(spec):
    request, single = tuning_request(spec(), JOB), training_request(JOB)
    assert request["HyperParameterTuningJobName"] == "b2t-sweep-1"
    assert request["HyperParameterTuningJobConfig"] == {
        "Strategy": "Bayesian",
        "HyperParameterTuningJobObjective": {"Type": "Minimize", "MetricName": "validation:DER"},
        "ResourceLimits": {"MaxNumberOfTrainingJobs": 12, "MaxParallelTrainingJobs": 3},
        "ParameterRanges": {
            "ContinuousParameterRanges": [
                {
                    "Name": "lr_max",
                    "MinValue": "0.001",
                    "MaxValue": "0.01",
                    "ScalingType": "Logarithmic",
                }
            ],
            "IntegerParameterRanges": [
                {
                    "Name": "dataset.batch_size",
                    "MinValue": "32",
                    "MaxValue": "64",
                    "ScalingType": "Auto",
                }
            ],
            "CategoricalParameterRanges": [{"Name": "model.n_units", "Values": ["768", "1024"]}],
        },
        "TrainingJobEarlyStoppingType": "Off",
    }
    definition = request["TrainingJobDefinition"]
    assert definition["AlgorithmSpecification"] == {
        "TrainingImage": "i",
        "TrainingInputMode": "File",
        "MetricDefinitions": list(METRIC_DEFINITIONS),
    }
    assert definition["StaticHyperParameters"] == {
        "s3-bucket": BUCKET,
        "s3-data-prefix": "data/hdf5_data_diphone_encoded",
        "config-file": "rnn_args_diphone_sagemaker.yaml",
    }
    for name in ("RoleArn", "ResourceConfig", "StoppingCondition", "OutputDataConfig"):
        assert definition[name] == single[name]
    assert "CheckpointConfig" not in definition


def test_a_sweep_has_no_place_for_checkpoints_and_says_so(spec):
    with pytest.raises(JobError, match="drop --spot"):
        tuning_request(spec(), replace(JOB, spot=True))


@pytest.mark.parametrize(
    "text, said",
    [
        ("max_jobs: 3", "'parameters'"),
        ("parameters: {lr_mx: {min: 0.1, max: 1}}", "lr_max"),
        ("parameters: {lr_max: {min: 0.01, max: 0.001}}", "min < max"),
        ("parameters: {lr_max: [1, 2]}", "values"),
        ("parameters: {model.rnn_dropout: {min: 0.1, max: 1.5}}", "model.rnn_dropout"),
        ("parameters: {dataset.n_classes: {values: [41, 42]}}", "dataset.n_classes"),
        ("parameters: {lr_max: {min: 0.001, max: 1, scaling: Log}}", "Logarithmic"),
        ("strategy: Genetic\nparameters: {lr_max: {min: 0.001, max: 1}}", "Bayesian"),
        ("metric: train:x\nparameters: {lr_max: {min: 0.001, max: 1}}", "validation:DER"),
        ("max_jobs: 0\nparameters: {lr_max: {min: 0.001, max: 1}}", "1 to 750"),
        ("jobs: 3\nparameters: {lr_max: {min: 0.001, max: 1}}", "unknown setting 'jobs'"),
        (": {", "cannot be read"),
        ("strategy: Grid\nparameters: {lr_max: {min: 0.001, max: 1}}", "'lr_max' is a range"),
        ("strategy: Grid\nmax_jobs: 3\nparameters: {seed: {values: [1, 2]}}", "2 combinations"),
        (
            "strategy: Hyperband\nearly_stopping: true\nparameters: {seed: {values: [1]}}",
            "drop early_stopping",
        ),
        ("parameters: {lr_min: {min: 0, max: 0.001, scaling: Logarithmic}}", "min > 0"),
        ("parameters: {n_units: {min: 8, max: 16, scaling: ReverseLogarithmic}}", "fractions"),
        ("parameters: {use_amp: {min: false, max: true}}", "no numbers"),
        ("parameters: {lr_max: {values: []}}", "at least one"),
    ],
)
def test_impossible_sweeps_are_refused(spec, text, said):
    with pytest.raises(ConfigError) as refused:
        tuning_request(spec(text), JOB)
    assert said in str(refused.value)


def test_a_grid_has_as_many_jobs_as_combinations(spec):
    text = "strategy: Grid\nparameters: {seed: {values: [1, 2, 3]}, n_units: {values: [8, 16]}}"
    config = tuning_request(spec(text), JOB)["HyperParameterTuningJobConfig"]
    assert config["Strategy"] == "Grid"
    assert config["ResourceLimits"]["MaxNumberOfTrainingJobs"] == 6


def test_settings_that_may_be_null_are_still_whole_numbers(spec):
    text = "parameters: {lr_decay_steps: {min: 1000, max: 2000}}"
    ranges = tuning_request(spec(text), JOB)["HyperParameterTuningJobConfig"]["ParameterRanges"]
    assert [entry["Name"] for entry in ranges["IntegerParameterRanges"]] == ["lr_decay_steps"]


def test_the_price_spans_the_cheapest_and_the_dearest_job(spec):
    def dollars(text):
        lines = sweep_price(read_sweep(spec(text), JOB), JOB)
        assert "g5.2xlarge" in lines[1]
        low, high = re.search(r"\$([\d.]+) to \$([\d.]+) on demand", lines[-1]).groups()
        return float(low), float(high)

    low, high = dollars(SPEC)
    small = "max_jobs: 12\nparameters: {n_units: {values: [768]}, batch_size: {values: [32]}}"
    large = "max_jobs: 12\nparameters: {n_units: {values: [1024]}, batch_size: {values: [64]}}"
    assert dollars(small) == (low, low)
    assert dollars(large) == (high, high)
    assert low < high


@pytest.mark.aws
def test_the_emulated_service_takes_the_request(spec, monkeypatch):
    with emulated_aws(monkeypatch) as aws:
        name = submit_sweep(tuning_request(spec(), JOB), aws.account)
        known = aws.client("sagemaker").describe_hyper_parameter_tuning_job(
            HyperParameterTuningJobName=name
        )
        assert known["HyperParameterTuningJobConfig"]["ResourceLimits"] == {
            "MaxNumberOfTrainingJobs": 12,
            "MaxParallelTrainingJobs": 3,
        }


def test_results_are_tabulated_best_first():
    jobs = [
        {
            "TrainingJobName": f"trial-{number}",
            "TrainingJobStatus": "Completed",
            "TunedHyperParameters": {"lr_max": "0.00" + str(number)},
            **({"FinalHyperParameterTuningJobObjectiveMetric": {"Value": der}} if der else {}),
        }
        for number, der in ((1, 0.5), (2, None), (3, 0.4))
    ]

    class Account:
        def client(self, _):
            return self

        def get_paginator(self, _):
            return self

        def paginate(self, **_):
            return [{"TrainingJobSummaries": jobs}]

    table = sweep_table("sweep", Account())
    assert [line.split()[2] for line in table] == ["trial-3", "trial-1", "trial-2"]
    assert table[0] == "    0.4000  Completed   trial-3  lr_max=0.003"
