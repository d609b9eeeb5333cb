"""Launching against an emulated account: what is asked for is what goes over the wire."""

import copy
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import launch_sagemaker_job as front_door
import pytest
from brain_to_text.errors import JobError
from brain_to_text.launch.job_submission import _compose_for_the_sdk, _no_telemetry
from brain_to_text.launch.jobs import job_state
from brain_to_text.launch.launch import launch_training_job
from brain_to_text.launch.request import CODE_FOLDER
from brain_to_text.launch.watch import LOG_GROUP, watch
from support.aws_emulation import BUCKET, ROLE, emulated_aws, ready_to_train

pytestmark = pytest.mark.aws

# --no-deps: everything they need for training jobs is there already, for v2
SDK_V3 = ("sagemaker-train==1.27.0", "sagemaker-core==2.27.0", "nest-asyncio==1.6.0")
CASES = {
    "on demand": ([], {}),
    "spot with checkpoints": (
        ["--spot", "--max-run-hours", "30", "--max-wait-hours", "40"],
        {"spot": True, "max_run_hours": 30.0, "max_wait_hours": 40.0},
    ),
    "two nodes": (["--instance-count", "2"], {"instance_count": 2}),
    "FastFile": (["--data-channel", "fastfile"], {"data_channel": "fastfile"}),
    "VPC and KMS": (
        ["--subnets", "subnet-1", "subnet-2", "--security-group-ids", "sg-1", "--encrypt-traffic"]
        + ["--output-kms-key", "k1", "--volume-kms-key", "k2", "--keep-alive-minutes", "10"],
        {
            "subnets": ("subnet-1", "subnet-2"),
            "security_group_ids": ("sg-1",),
            "encrypt_traffic": True,
            "output_kms_key": "k1",
            "volume_kms_key": "k2",
            "keep_alive_minutes": 10,
        },
    ),
    "MLflow": (
        ["--mlflow-tracking-uri", "https://mlflow.example.org", "--env", "A=b", "--tag", "t=v"],
        {
            "mlflow_tracking_uri": "https://mlflow.example.org",
            "environment": {"A": "b"},
            "tags": {"t": "v"},
        },
    ),
    "own settings": (
        ["--batch-size", "32", "--model.n_units", "768", "--retries", "0", "--tensorboard"],
        {
            "batch_size": 32,
            "overrides": {"model.n_units": 768},
            "retries": 0,
            "tensorboard": True,
        },
    ),
}
WIRE = {
    "on demand": {},
    "spot with checkpoints": {
        "EnableManagedSpotTraining": True,
        "StoppingCondition": {"MaxRuntimeInSeconds": 108000, "MaxWaitTimeInSeconds": 144000},
    },
    "two nodes": {
        "ResourceConfig": {
            "InstanceType": "ml.g5.2xlarge",
            "InstanceCount": 2,
            "VolumeSizeInGB": 30,
        }
    },
    "FastFile": {
        "InputDataConfig": [
            {
                "ChannelName": "training",
                "InputMode": "FastFile",
                "DataSource": {
                    "S3DataSource": {
                        "S3DataType": "S3Prefix",
                        "S3Uri": f"s3://{BUCKET}/data/hdf5_data_diphone_encoded/",
                        "S3DataDistributionType": "FullyReplicated",
                    }
                },
            }
        ]
    },
    "VPC and KMS": {
        "VpcConfig": {"SecurityGroupIds": ["sg-1"], "Subnets": ["subnet-1", "subnet-2"]},
        "EnableInterContainerTrafficEncryption": True,
        "OutputDataConfig": {
            "S3OutputPath": f"s3://{BUCKET}/sagemaker-outputs",
            "KmsKeyId": "k1",
        },
        "ResourceConfig": {
            "InstanceType": "ml.g5.2xlarge",
            "InstanceCount": 1,
            "VolumeSizeInGB": 30,
            "VolumeKmsKeyId": "k2",
            "KeepAlivePeriodInSeconds": 600,
        },
    },
    "MLflow": {
        "Environment": {
            "A": "b",
            "MLFLOW_TRACKING_URI": "https://mlflow.example.org",
            "MLFLOW_EXPERIMENT_NAME": "brain-to-text",
            "MLFLOW_RUN_NAME": "b2t-1",
        },
        "Tags": [{"Key": "project", "Value": "brain-to-text"}, {"Key": "t", "Value": "v"}],
    },
    "own settings": {
        "HyperParameters": {
            "s3-bucket": BUCKET,
            "s3-data-prefix": "data/hdf5_data_diphone_encoded",
            "config-file": "rnn_args_diphone_sagemaker.yaml",
            "output-s3-uri": f"s3://{BUCKET}/sagemaker-outputs/b2t-1",
            "model.n_units": "768",
            "dataset.batch_size": "32",
            "tensorboard-dir": "/opt/ml/output/tensorboard",
        },
        "RetryStrategy": None,
        "TensorBoardOutputConfig": {
            "S3OutputPath": f"s3://{BUCKET}/sagemaker-outputs",
            "LocalPath": "/opt/ml/output/tensorboard",
        },
    },
}


@pytest.fixture
def aws(monkeypatch):
    with emulated_aws(monkeypatch) as emulated:
        ready_to_train(emulated)
        monkeypatch.setattr(front_door, "AwsAccount", lambda *_: emulated.account)
        yield emulated


@pytest.fixture
def sdk_v2(monkeypatch, tmp_path):
    """SDK v2, silent, and not validating its settings file fifty times per job."""
    config = pytest.importorskip("sagemaker.config.config", reason="SDK v2 is not installed")
    monkeypatch.setattr(config, "validate_sagemaker_config", lambda *_: None)
    monkeypatch.setenv("SAGEMAKER_USER_CONFIG_OVERRIDE", str(telemetry_off(tmp_path)))


def telemetry_off(folder):
    """The SDKs' settings file that keeps them from reporting home."""
    path = folder / "sagemaker_defaults.yaml"
    modules = {"Modules": {"TelemetryOptOut": True}}
    settings = {"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": modules}}
    path.write_text(json.dumps(settings))
    return path


def run(*arguments):
    return front_door.main([str(argument) for argument in arguments])


def basics(aws):
    return ["--s3-bucket", BUCKET, "--role", ROLE, "--image-uri", aws.image_uri, "--job-name"]


@pytest.mark.parametrize("case", CASES)
def test_command_function_and_dry_run_make_the_same_request_on_the_wire(aws, sdk_v2, case, capsys):
    options, settings = CASES[case]
    known = {"role": ROLE, "image_uri": aws.image_uri, "job_name": "b2t-1"}
    assert run(*basics(aws), "b2t-1", "--dry-run", *options) == 0
    announced = json.loads(capsys.readouterr().out)
    launch_training_job(BUCKET, account=aws.account, sdk="v2", **known, **settings)
    launch_training_job(
        BUCKET, account=aws.account, sdk="boto3", **{**known, "job_name": "b2t-2"}, **settings
    )
    assert run(*basics(aws), "b2t-3", "--skip-checks", *options) == 0
    by_sdk, by_boto, by_command = aws.sent
    assert by_sdk == announced
    for number, other in ((2, by_boto), (3, by_command)):
        assert renamed(other, f"b2t-{number}") == announced
    for field, value in WIRE[case].items():
        assert announced.get(field) == value, field


def renamed(request, name):
    return json.loads(json.dumps(request).replace(name, "b2t-1"))


@pytest.mark.parametrize("wished", [None, False])
def test_the_sdk_reports_nothing_home_unless_its_user_wishes(wished):
    modules = {} if wished is None else {"TelemetryOptOut": wished}
    session = SimpleNamespace(sagemaker_config={"SageMaker": {"PythonSDK": {"Modules": modules}}})
    _no_telemetry(session)
    assert modules["TelemetryOptOut"] is (wished is None)


def test_the_sdk_looks_for_that_wish_where_it_is_put():
    schema = pytest.importorskip("sagemaker.config.config_schema")
    assert schema.TELEMETRY_OPT_OUT_PATH == "SageMaker.PythonSDK.Modules.TelemetryOptOut"


@pytest.fixture(scope="session")
def sdk_v3():
    """A folder with SDK v3 that shadows v2 when it comes first on the path."""
    folder = Path(__file__).parents[2] / ".local" / "sagemaker-v3"
    if not (folder / "sagemaker" / "train").is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        done = subprocess.run(
            [*install, str(folder), *SDK_V3], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            pytest.skip(f"SDK v3 cannot be installed here: {done.stderr.strip()[-300:]}")
    return folder


def test_sdk_v3_sends_the_same_requests(aws, sdk_v3, tmp_path):
    known = {"role": ROLE, "image_uri": aws.image_uri, "job_name": "b2t-1"}
    announced = {
        case: launch_training_job(BUCKET, dry_run=True, **known, **settings).request
        for case, (_, settings) in CASES.items()
    }
    script = Path(__file__).parents[1] / "support" / "send_with_sdk_v3.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(announced),
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(sdk_v3), str(CODE_FOLDER), str(script.parents[1])]),
            "SAGEMAKER_VALIDATE_ROLE": "false",
            "SAGEMAKER_USER_CONFIG_OVERRIDE": str(telemetry_off(tmp_path)),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sent = json.loads(done.stdout.splitlines()[-1])
    for request in sent.values():  # the API's own default, which v3 spells out
        assert request["OutputDataConfig"].pop("CompressionType", "GZIP") == "GZIP"
    assert sent == announced


def test_a_bare_launch_checks_first_and_launches(aws, sdk_v2, capsys):
    assert run(*basics(aws), "b2t-1") == 0
    said = capsys.readouterr()
    assert "Checked: 0 errors, 0 warnings" in said.err
    assert "Price: $" in said.err
    assert "--watch b2t-1" in said.out
    assert [request["TrainingJobName"] for request in aws.sent] == ["b2t-1"]


def test_errors_found_by_the_checks_prevent_the_launch(aws, capsys):
    assert run(*basics(aws), "b2t-1", "--s3-data-prefix", "nowhere") == 1
    said = capsys.readouterr()
    assert "error: There is no SESSION/data_*.hdf5" in said.err
    assert "Nothing was launched" in said.out
    assert aws.sent == []


def test_check_only_checks(aws, capsys):
    assert run(*basics(aws), "b2t-1", "--check") == 0
    assert aws.sent == []


def test_the_role_of_the_stack_and_the_last_pushed_image_are_the_defaults(
    aws, sdk_v2, monkeypatch, tmp_path
):
    pushed = tmp_path / "image_uri"
    pushed.write_text(f"{aws.image_uri}\n")
    monkeypatch.setattr("brain_to_text.launch.launch.LAST_IMAGE", pushed)
    assert run("--s3-bucket", BUCKET) == 0
    assert aws.sent[0]["RoleArn"] == ROLE
    assert aws.sent[0]["AlgorithmSpecification"]["TrainingImage"] == aws.image_uri


def test_a_role_may_be_given_by_name(aws):
    launch_training_job(
        BUCKET,
        account=aws.account,
        sdk="boto3",
        role="brain-to-text-training",
        image_uri=aws.image_uri,
    )
    assert aws.sent[0]["RoleArn"] == ROLE
    with pytest.raises(JobError, match="does not exist"):
        launch_training_job(BUCKET, account=aws.account, role="nobody", image_uri=aws.image_uri)


def test_dry_run_asks_aws_nothing_and_says_what_is_missing(aws, capsys, monkeypatch):
    monkeypatch.setattr("brain_to_text.launch.launch.LAST_IMAGE", "/nowhere")
    monkeypatch.setattr(front_door, "AwsAccount", None)
    assert run("--s3-bucket", BUCKET, "--dry-run") == 0
    said = capsys.readouterr()
    request = json.loads(said.out)
    assert "--role" in request["RoleArn"]
    assert "build_and_push.sh" in request["AlgorithmSpecification"]["TrainingImage"]
    assert "Price:" in said.err


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--s3-bucket is needed"),
        (["--s3-bucket", "b-1", "--spott"], "did you mean --spot?"),
        (["--s3-bucket", "b-1", "--seed"], "--seed needs a value"),
        (["--s3-bucket", "b-1", "stray"], "unexpected argument: stray"),
        (["--s3-bucket", "b-1", "--tag", "x"], "is not NAME=VALUE"),
    ],
)
def test_wrong_usage_ends_with_code_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_an_error_is_one_line_and_code_1(aws, capsys):
    assert run("--s3-bucket", "NOT-A-BUCKET") == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_sweep_is_launched_around_the_job(aws, tmp_path, capsys):
    spec = tmp_path / "sweep.yaml"
    spec.write_text("parameters: {lr_max: {min: 0.001, max: 0.01}}")
    assert run(*basics(aws), "b2t-sweep", "--tune", spec) == 0
    assert "--sweep b2t-sweep" in capsys.readouterr().out
    sweeps = aws.client("sagemaker").list_hyper_parameter_tuning_jobs()
    names = [s["HyperParameterTuningJobName"] for s in sweeps["HyperParameterTuningJobSummaries"]]
    assert names == ["b2t-sweep"]
    assert aws.sent == []


# --- jobs that exist


def launched(aws, name="b2t-1"):
    launch_training_job(
        BUCKET,
        account=aws.account,
        sdk="boto3",
        role=ROLE,
        image_uri=aws.image_uri,
        job_name=name,
        num_training_batches=1000,
    )


def test_list_describe_and_stop(aws, capsys):
    launched(aws)
    assert run("--list") == 0
    assert "b2t-1" in capsys.readouterr().out
    assert run("--describe", "b2t-1") == 0
    described = capsys.readouterr()
    assert json.loads(described.out)["TrainingJobName"] == "b2t-1"
    assert run("--stop", "b2t-1") == 1  # the emulation completes jobs at once
    assert "nothing to stop" in capsys.readouterr().err
    assert run("--describe", "b2t-none") == 1
    assert "There is no training job b2t-none" in capsys.readouterr().err


class Script:
    """A job that goes through given states, and logs given lines on the way."""

    def __init__(self, aws, states, lines=(), **description):
        self.states, self.lines, self.polls = list(states), list(lines), 0
        self.logs = aws.client("logs")
        client = aws.client("sagemaker")
        original = client.describe_training_job

        def describe(TrainingJobName):
            answer = copy.deepcopy(original(TrainingJobName=TrainingJobName))
            status = self.states[min(self.polls, len(self.states) - 1)]
            self.polls += 1
            self.log()
            answer.update(TrainingJobStatus=status, **description)
            return answer

        client.describe_training_job = describe

    def log(self):
        if self.polls == 1:
            self.logs.create_log_group(logGroupName=LOG_GROUP)
            for host in ("algo-1-1700000000", "algo-2-1700000000"):
                self.logs.create_log_stream(logGroupName=LOG_GROUP, logStreamName=f"b2t-1/{host}")
        share = self.lines[self.polls - 1 : self.polls]
        for host, text in share:
            self.logs.put_log_events(
                logGroupName=LOG_GROUP,
                logStreamName=f"b2t-1/{host}-1700000000",
                logEvents=[{"timestamp": int(time.time() * 1000), "message": text}],
            )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_watching_shows_phases_each_line_once_and_a_bar(aws):
    launched(aws)
    lines = [
        ("algo-1", "Train batches: 1000"),
        ("algo-1", "Train batch 400: loss: 3.21 grad norm: 2.1 time: 0.500"),
        ("algo-2", "a line of the second host \x1b[2J"),
        ("algo-1", "Val batch 400: DER (avg): 0.7654 CTC Loss (avg): 4.32 time: 12.345"),
        ("algo-1", "Train batch 600: loss: 3.01 grad norm: 2.1 time: 0.500"),
    ]
    Script(
        aws,
        ["InProgress"] * 5 + ["Completed"],
        lines,
        TrainingTimeInSeconds=3600,
        BillableTimeInSeconds=1200,
        EnableManagedSpotTraining=True,
    )
    out, bar = io.StringIO(), Terminal()
    state = watch("b2t-1", aws.account, out=out, bar=bar, sleep=lambda _: None)
    printed = out.getvalue().splitlines()
    assert printed[0].endswith("Starting: Preparing the instances for training")
    assert printed[1:] == [
        lines[0][1],
        lines[1][1],
        "algo-2: a line of the second host  [2J",
        lines[3][1],
        lines[4][1],
    ]
    assert "step 601/1,000  loss 3.01  best DER 0.7654  3 min left" in bar.getvalue()
    assert state.exit_code == 0
    assert "Spot savings: 67 %" in state.summary()


@pytest.mark.parametrize("status, code", [("Completed", 0), ("Failed", 3), ("Stopped", 4)])
def test_waiting_ends_with_a_code_that_says_how(aws, status, code, capsys, monkeypatch):
    launched(aws)
    Script(aws, [status], FailureReason="AlgorithmError: Trial 3 is damaged.\nCause: x")
    assert run("--watch", "b2t-1") == code
    said = capsys.readouterr().out
    assert f"b2t-1: {status}" in said
    assert "Why: AlgorithmError: Trial 3 is damaged. Cause: x" in said


def test_ctrl_c_leaves_the_job_running_and_says_how_to_come_back(aws, capsys, monkeypatch):
    launched(aws)
    Script(aws, ["InProgress"])

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupted)
    monkeypatch.setattr(
        front_door.watch,
        "__kwdefaults__",
        {**front_door.watch.__kwdefaults__, "sleep": interrupted},
    )
    assert run("--watch", "b2t-1") == 130
    said = capsys.readouterr().err
    assert "b2t-1 goes on without you" in said and "--watch b2t-1" in said and "--stop" in said


def test_losing_sight_of_aws_for_a_moment_is_survived(aws):
    from botocore.exceptions import EndpointConnectionError

    launched(aws)
    Script(aws, ["InProgress", "InProgress", "Completed"])
    client = aws.client("sagemaker")
    scripted, calls = client.describe_training_job, []

    def flaky(**place):
        calls.append(place)
        if len(calls) in (2, 3):
            raise EndpointConnectionError(endpoint_url="https://sagemaker")
        return scripted(**place)

    client.describe_training_job = flaky
    bar = io.StringIO()
    state = watch("b2t-1", aws.account, out=io.StringIO(), bar=bar, sleep=lambda _: None)
    assert state.status == "Completed"
    assert "Lost sight of b2t-1" in bar.getvalue()


def test_watching_gives_up_when_aws_stays_silent_and_says_the_job_is_safe(aws):
    launched(aws)
    Script(aws, ["InProgress"])
    assert job_state("b2t-1", aws.account).status == "InProgress"
    client = aws.client("sagemaker")
    scripted, calls = client.describe_training_job, []

    def silent(**place):
        from botocore.exceptions import EndpointConnectionError

        calls.append(place)
        if len(calls) > 1:
            raise EndpointConnectionError(endpoint_url="https://sagemaker")
        return scripted(**place)

    client.describe_training_job = silent
    with pytest.raises(JobError, match="the job is not affected"):
        watch("b2t-1", aws.account, out=io.StringIO(), bar=io.StringIO(), sleep=lambda _: None)


# --- fetching


def archived(**files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name.replace("__", "/"))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


LOG = b"""\
15 10:40:12: Val batch 1500: DER (avg): 0.7654 CTC Loss (avg): 4.32 time: 12.3
15 10:50:12: Val batch 3000: DER (avg): 0.7001 CTC Loss (avg): 4.11 time: 12.3
"""


def test_fetching_unpacks_model_and_outputs_and_shows_the_results(aws, tmp_path, capsys):
    launched(aws)
    s3, root = aws.client("s3"), "sagemaker-outputs/b2t-1"
    model = archived(checkpoint__best_checkpoint=b"w", training_log=LOG)
    s3.put_object(Bucket=BUCKET, Key=f"{root}/output/model.tar.gz", Body=model)
    outputs = archived(**{"metrics.jsonl": b"{}"})
    s3.put_object(Bucket=BUCKET, Key=f"{root}/output/output.tar.gz", Body=outputs)
    assert run("--fetch", "b2t-1", "--to", tmp_path / "job") == 0
    assert (tmp_path / "job/model/checkpoint/best_checkpoint").read_bytes() == b"w"
    assert (tmp_path / "job/output/metrics.jsonl").read_bytes() == b"{}"
    said = capsys.readouterr().out
    assert "best  3,000     0.7001" in said
    assert f"evaluate_model.py --model {tmp_path / 'job/model'} --s3-bucket {BUCKET}" in said
    assert run("--fetch", "b2t-1", "--to", tmp_path / "job") == 1
    assert "exists already" in capsys.readouterr().err


def test_fetching_a_running_job_brings_its_log(aws, tmp_path, capsys):
    launched(aws)
    aws.client("s3").put_object(
        Bucket=BUCKET, Key="sagemaker-outputs/b2t-1/logs/training_log", Body=LOG
    )
    assert run("--fetch", "b2t-1", "--to", tmp_path / "job") == 0
    assert (tmp_path / "job/logs/training_log").read_bytes() == LOG
    assert "There is no model yet" in capsys.readouterr().out


def test_fetching_a_local_job_needs_only_its_bucket(aws, tmp_path):
    aws.client("s3").put_object(
        Bucket=BUCKET,
        Key="sagemaker-outputs/local-1/output/model.tar.gz",
        Body=archived(training_log=LOG),
    )
    assert run("--fetch", "local-1", "--s3-bucket", BUCKET, "--to", tmp_path / "job") == 0
    assert (tmp_path / "job/model/training_log").read_bytes() == LOG


def test_fetching_a_job_of_this_machine_needs_only_its_name(aws, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("brain_to_text.launch.fetch.LOCAL_JOBS", tmp_path / "notes")
    monkeypatch.setattr("brain_to_text.launch.launch.run_locally", lambda request, _: "b2t-here")
    here = ("--instance-type", "local", "--job-name", "b2t-here", "--image-uri", "image:1")
    assert run("--s3-bucket", BUCKET, *here, "--skip-checks") == 0
    assert "--fetch b2t-here" in capsys.readouterr().out
    assert run("--fetch", "b2t-here", "--to", tmp_path / "job") == 1
    assert "it has not ended, or it failed" in capsys.readouterr().err
    root, s3 = "sagemaker-outputs/b2t-here/output", aws.client("s3")
    s3.put_object(Bucket=BUCKET, Key=f"{root}/model.tar.gz", Body=archived(training_log=LOG))
    packed_by_local_mode = archived(**{"data__report.html": b"page", "success": b""})
    s3.put_object(Bucket=BUCKET, Key=f"{root}/output.tar.gz", Body=packed_by_local_mode)
    assert run("--fetch", "b2t-here", "--to", tmp_path / "job") == 0
    assert (tmp_path / "job/output/report.html").read_bytes() == b"page"
    assert f"--s3-bucket {BUCKET} --s3-data-prefix data/" in capsys.readouterr().out


@pytest.mark.parametrize("plugin, bridged", [("v5.1.0", True), ("v2.40.0", False), ("", False)])
def test_local_mode_gets_a_compose_that_the_sdk_knows(tmp_path, monkeypatch, plugin, bridged):
    said = f"echo Docker Compose version {plugin}" if plugin else "exit 1"
    (tmp_path / "docker").write_text(f"#!/bin/sh\n{said}\n")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/nowhere")
    with _compose_for_the_sdk():
        found = shutil.which("docker-compose")
        assert bool(found) == bridged
    assert os.environ["PATH"].startswith(str(tmp_path))
    assert shutil.which("docker-compose") is None


def test_fetching_a_job_that_left_nothing(aws, tmp_path, capsys):
    launched(aws)
    assert run("--fetch", "b2t-1", "--to", tmp_path / "job") == 1
    assert "There is nothing under s3://" in capsys.readouterr().err


def test_an_unsafe_archive_is_refused(aws, tmp_path, capsys):
    launched(aws)
    aws.client("s3").put_object(
        Bucket=BUCKET,
        Key="sagemaker-outputs/b2t-1/output/model.tar.gz",
        Body=archived(**{"../../escaped": b"x"}),
    )
    assert run("--fetch", "b2t-1", "--to", tmp_path / "job") == 1
    assert "is not unpacked" in capsys.readouterr().err
    assert not (tmp_path / "escaped").exists()
