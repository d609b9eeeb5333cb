"""Launching against an emulated account: what is asked for is what goes over the wire."""

import contextlib
import copy
import io
import json
import os
import shutil
import sys
import tarfile
import time

import launch_sagemaker_job as front_door
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from brain_to_text.config_reader import load_config
from brain_to_text.errors import JobError
from brain_to_text.launch.request import CODE_FOLDER, DEFAULT_CONFIG
from brain_to_text.launch.submit import launch_training_job
from brain_to_text.launch.watch import LOG_GROUP, watch
from support.aws_emulation import (
    BUCKET,
    ROLE,
    assert_no_credentials,
    emulated_aws,
    launcher_policy,
    log_in,
    ready_to_train,
)

pytestmark = pytest.mark.aws

# Options, the same as keyword arguments, and what the request then holds by dotted path.
OPTIONS = {
    "a spot job in a VPC": (
        "--spot --max-run-hours 30 --max-wait-hours 40 --subnets subnet-1 subnet-2 "
        "--security-group-ids sg-1 --encrypt-traffic --output-kms-key k1 --volume-kms-key k2 "
        "--mlflow-tracking-uri https://mlflow.example.org --env A=b --tag t=v",
        {
            "spot": True,
            "max_run_hours": 30.0,
            "max_wait_hours": 40.0,
            "subnets": ("subnet-1", "subnet-2"),
            "security_group_ids": ("sg-1",),
            "encrypt_traffic": True,
            "output_kms_key": "k1",
            "volume_kms_key": "k2",
            "mlflow_tracking_uri": "https://mlflow.example.org",
            "environment": {"A": "b"},
            "tags": {"t": "v"},
        },
        {
            "EnableManagedSpotTraining": True,
            "StoppingCondition": {"MaxRuntimeInSeconds": 108000, "MaxWaitTimeInSeconds": 144000},
            "CheckpointConfig.S3Uri": f"s3://{BUCKET}/sagemaker-outputs/b2t-1/checkpoints",
            "VpcConfig": {"SecurityGroupIds": ["sg-1"], "Subnets": ["subnet-1", "subnet-2"]},
            "EnableInterContainerTrafficEncryption": True,
            "OutputDataConfig.KmsKeyId": "k1",
            "ResourceConfig.VolumeKmsKeyId": "k2",
            "Environment": {
                "A": "b",
                "S3_KMS_KEY_ID": "k1",
                "MLFLOW_TRACKING_URI": "https://mlflow.example.org",
                "MLFLOW_EXPERIMENT_NAME": "brain-to-text",
                "MLFLOW_RUN_NAME": "b2t-1",
            },
            "Tags": [{"Key": "project", "Value": "brain-to-text"}, {"Key": "t", "Value": "v"}],
        },
    ),
    "settings and a channel": (
        "--data-channel fastfile --batch-size 32 --model.n_units 768 --retries 0 "
        "--keep-alive-minutes 10",
        {
            "data_channel": "fastfile",
            "batch_size": 32,
            "overrides": {"model.n_units": 768},
            "retries": 0,
            "keep_alive_minutes": 10,
        },
        {
            "AlgorithmSpecification.TrainingInputMode": "FastFile",
            "HyperParameters.dataset.batch_size": "32",
            "HyperParameters.model.n_units": None,  # the schema's default
            "RetryStrategy": None,
            "ResourceConfig.KeepAlivePeriodInSeconds": 600,
        },
    ),
}


@pytest.fixture
def aws(monkeypatch):
    with emulated_aws(monkeypatch) as emulated:
        ready_to_train(emulated, monkeypatch)
        monkeypatch.setattr(front_door, "AwsAccount", lambda *_: emulated.account)
        monkeypatch.setattr("brain_to_text.launch.watch.POLL_SECONDS", 0.0)
        yield emulated


NOT_KEYS = ("s3-bucket", "s3-data-prefix", "output-s3-uri", "config-file")


class Copy(io.StringIO):
    """Keeps what is written to another stream."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def write(self, text):
        self.stream.write(text)
        return super().write(text)


def run(*arguments):
    """The exit code of a command, of whose output no line holds a credential."""
    out, err = Copy(sys.stdout), Copy(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = front_door.main([str(argument) for argument in arguments])
    assert_no_credentials(out.getvalue() + err.getvalue())
    return code


def basics(aws):
    return ["--s3-bucket", BUCKET, "--role", ROLE, "--image-uri", aws.image_uri, "--job-name"]


@pytest.mark.parametrize("case", OPTIONS)
def test_command_function_and_dry_run_make_the_same_request_on_the_wire(aws, case, capsys):
    options, settings, fields = OPTIONS[case]
    known = {"role": ROLE, "image_uri": aws.image_uri, "job_name": "b2t-1"}
    assert run(*basics(aws), "b2t-1", "--dry-run", *options.split()) == 0
    announced = json.loads(capsys.readouterr().out)
    launch_training_job(BUCKET, account=aws.account, **known, **settings)
    assert run(*basics(aws), "b2t-2", "--skip-checks", *options.split()) == 0
    by_function, by_command = aws.sent
    assert by_function == announced
    assert renamed(by_command, "b2t-2") == announced
    for path, value in fields.items():
        section, _, name = path.partition(".")
        found = announced.get(section)
        assert (found.get(name) if name else found) == value, path


def renamed(request, name):
    return json.loads(json.dumps(request).replace(name, "b2t-1"))


def test_a_bare_launch_checks_first_and_errors_prevent_it(aws, capsys):
    assert run(*basics(aws), "b2t-1", "--s3-data-prefix", "nowhere") == 1
    printed = capsys.readouterr()
    assert "error: There is no SESSION/data_*.hdf5" in printed.err
    assert "Nothing was launched" in printed.out and aws.sent == []
    assert run(*basics(aws), "b2t-1") == 0
    printed = capsys.readouterr()
    assert "Checked: 0 errors, 0 warnings" in printed.err and "Price: $" in printed.err
    assert "--watch b2t-1" in printed.out
    assert run(*basics(aws), "b2t-1") == 1  # the name is taken
    assert "ResourceInUse" in (again := capsys.readouterr().err) and "another --job-name" in again
    assert [request["TrainingJobName"] for request in aws.sent] == ["b2t-1"]


@pytest.mark.parametrize("action", ["--check", "--dry-run", "--skip-checks"])
def test_what_the_service_would_refuse_is_said_at_once_and_aws_is_not_asked(
    aws, capsys, monkeypatch, action
):
    monkeypatch.setattr(aws.account, "client", None)
    wrong = ["--retries", 99, "--instance-type", "ml.g5.3xlarge"]
    assert run(*basics(aws), "no_underscores", *wrong, action) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    for said in ("is 'no_underscores'", "is '99'", "nearest: ml.g5.xlarge, ml.g5."):
        assert said in line


def test_the_role_of_the_stack_and_the_last_pushed_image_are_the_defaults(
    aws, monkeypatch, tmp_path, capsys
):
    pushed = tmp_path / "image_uri"
    pushed.write_text(f"{aws.image_uri}\n")
    monkeypatch.setattr("brain_to_text.launch.submit.LAST_IMAGE", pushed)
    assert run("--s3-bucket", BUCKET, "--skip-checks") == 0
    assert f"the last one pushed from this clone ({aws.image_uri})" in capsys.readouterr().err
    assert aws.sent[0]["RoleArn"] == ROLE
    assert aws.sent[0]["AlgorithmSpecification"]["TrainingImage"] == aws.image_uri


def test_a_role_may_be_given_by_name(aws, capsys):
    assert run(*basics(aws), "b2t-1", "--skip-checks", "--role", "brain-to-text-training") == 0
    assert aws.sent[0]["RoleArn"] == ROLE
    assert run(*basics(aws), "b2t-1", "--role", "nobody") == 1
    assert "looking up the role nobody" in capsys.readouterr().err


def test_dry_run_asks_aws_nothing_and_says_what_is_missing(aws, capsys, monkeypatch):
    monkeypatch.setattr("brain_to_text.launch.submit.LAST_IMAGE", "/nowhere")
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
        (["--s3-bucket", "b-1", "--to", "there"], "where --fetch JOB puts"),
        (["--s3-bucket", "b-1", "--dry-run", "--wait"], "--watch JOB follows one"),
        (["--s3-bucket", "b-1", "--seed"], "--seed needs a value"),
        (["--s3-bucket", "b-1", "stray"], "Argument 'stray' was not understood"),
        (["--s3-bucket", "b-1", "--tag", "a=b", "--tag", "a=c"], "--tag a is given twice"),
        (["--s3-bucket", "b-1", "--tag", "x"], "is not NAME=VALUE"),
    ],
)
def test_wrong_usage_ends_with_code_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


# --- jobs that exist


def launched(aws, name="b2t-1"):
    launch_training_job(
        BUCKET,
        account=aws.account,
        role=ROLE,
        image_uri=aws.image_uri,
        job_name=name,
        num_training_batches=1000,
    )


def test_describe_and_stop(aws, capsys):
    launched(aws)
    assert run("--describe", "b2t-1") == 0
    assert json.loads(capsys.readouterr().out)["TrainingJobName"] == "b2t-1"
    assert run("--stop", "b2t-1") == 1  # the emulation completes jobs at once
    assert "nothing to stop" in capsys.readouterr().err
    assert run("--describe", "b2t-none") == 1
    assert "There is no training job b2t-none" in capsys.readouterr().err


def test_the_list_holds_this_projects_jobs_whose_warm_instances_are_given_back(aws, capsys):
    assert run("--list") == 0
    assert "No training jobs of this project" in capsys.readouterr().out
    launched(aws, "any-name")
    other = {**aws.sent[0], "TrainingJobName": "b2t-of-another-project", "Tags": []}
    aws.client("sagemaker").create_training_job(**other)
    assert run(*basics(aws), "b2t-2", "--keep-alive-minutes", "360", "--skip-checks") == 0
    assert run("--list") == 0
    listed = capsys.readouterr().out
    assert "any-name" in listed and "another-project" not in listed
    assert "--release b2t-2" in listed
    assert run("--release", "b2t-2") == 0
    for name, told in (("any-name", "launched without a warm pool"), ("b2t-2", "is terminated")):
        assert run("--release", name) == 1
        assert told in capsys.readouterr().err


def test_a_debug_shell_says_how_to_get_in(aws, capsys):
    assert run(*basics(aws), "b2t-1", "--debug-shell", "--skip-checks") == 0
    assert aws.sent[0]["RemoteDebugConfig"] == {"EnableRemoteDebug": True}
    said = capsys.readouterr().out
    assert "aws ssm start-session --target sagemaker-training-job:b2t-1_algo-1" in said


def test_credentials_that_a_service_repeats_are_not_printed(aws, capsys):
    secrets = [os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]

    def repeat(**_):
        raise ClientError({"Error": {"Code": "Bad", "Message": " ".join(secrets)}}, "Any")

    launched(aws)
    for service in ("iam", "s3", "ecr", "sagemaker", "logs", "pricing", "service-quotas", "kms"):
        aws.account.client(service).meta.events.register("before-call", repeat)
    commands = [[*basics(aws), "b2t-2", "--check"], ["--list"]]
    for action in ("--watch", "--describe", "--stop", "--release", "--fetch"):
        commands.append([action, "b2t-1"])
    for command in commands:
        run(*command)
        assert "***" in capsys.readouterr().err, command


# --- what was checked is what runs


@pytest.fixture
def edited(monkeypatch, tmp_path):
    """A copy of code/ to edit, which the launcher takes for its own."""
    shutil.copytree(CODE_FOLDER, tmp_path / "code", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CODE_FOLDER.parent / "docker", tmp_path / "docker")
    for room, name, place in (
        ("request", "CODE_FOLDER", tmp_path / "code"),
        ("image", "REPOSITORY", tmp_path),
    ):
        monkeypatch.setattr(f"brain_to_text.launch.{room}.{name}", place)
    return tmp_path / "code"


def test_units_edited_in_code_are_trained(aws, edited):
    """Without a rebuild: the configuration travels with the request."""
    path = edited / DEFAULT_CONFIG
    path.write_text(path.read_text().replace("n_units: 1024", "n_units: 1536"))
    assert run(*basics(aws), "b2t-1") == 0
    sent = aws.sent[0]["HyperParameters"]
    dotted = {name: text for name, text in sent.items() if name not in NOT_KEYS}
    assert sent["model.n_units"] == "1536" and load_config(None, dotted) == load_config(path)


def test_a_touched_file_of_the_trainer_is_refused_by_name(aws, edited, capsys):
    with (edited / "train_model_sagemaker.py").open("a") as file:
        file.write("# touched\n")
    assert run(*basics(aws), "b2t-1") == 1
    said = capsys.readouterr()
    assert (
        "other code than is here (code/train_model_sagemaker.py): run ./build_and_push" in said.err
    )
    assert "Nothing was launched" in said.out
    assert run(*basics(aws), "b2t-1", "--accept-code-difference") == 0
    assert "warning: The image was made of other code" in capsys.readouterr().err
    assert len(aws.sent) == 1


# --- rights


@pytest.mark.parametrize(
    "action, arguments, told",
    [
        ("sagemaker:CreateTrainingJob", [], "not authorized to perform: sagemaker:CreateTraining"),
        ("sagemaker:AddTags", [], "not authorized to perform: sagemaker:AddTags"),
        ("iam:PassRole", [], "not authorized to perform: iam:PassRole"),
        ("iam:GetRole", ["--s3-bucket", BUCKET, "--role", "mine"], "looking up the role mine"),
        ("sagemaker:Search", ["--list"], "not authorized to perform: sagemaker:Search"),
        ("sagemaker:DescribeTrainingJob", ["--watch", "b2t-0"], "DescribeTrainingJob"),
        ("s3:GetObject", ["--fetch", "b2t-0"], "downloading s3://"),
    ],
)
def test_without_an_action_of_the_policy_one_sentence_names_it(
    aws, monkeypatch, tmp_path, action, arguments, told, capsys
):
    launched(aws, "b2t-0")
    log_in(aws, monkeypatch, launcher_policy(without=action))
    where = ["--to", tmp_path / "job"] if "--fetch" in arguments else []
    assert run(*(arguments or [*basics(aws), "b2t-1"]), *where) == 1
    text = capsys.readouterr().err
    assert told in text and "launcher_policy.json" in text


def test_a_deny_of_the_organisation_is_not_blamed_on_the_policy(aws, capsys):
    condition = {"Bool": {"sagemaker:NetworkIsolation": "false"}}
    deny = {"Effect": "Deny", "Action": "sagemaker:CreateTrainingJob", "Resource": "*"}
    aws.organisation = [{"Statement": [{**deny, "Condition": condition}]}]
    assert run(*basics(aws), "b2t-1") == 1
    text = capsys.readouterr().err
    assert "your organisation forbids it" in text and "launcher_policy.json" not in text


class Script:
    """A job that goes through given states, and logs given lines on the way."""

    def __init__(self, aws, states, lines=(), **description):
        self.states, self.lines, self.polls = list(states), list(lines), 0
        self.logs = aws.client("logs")
        client = aws.account.client("sagemaker")
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
    state = watch("b2t-1", aws.account, out=out, bar=bar)
    printed = out.getvalue().splitlines()
    assert printed[0].endswith("Starting: Preparing the instances for training")
    assert printed[1:] == [
        lines[0][1],
        lines[1][1],
        r"algo-2: a line of the second host \x1b[2J",
        lines[3][1],
        lines[4][1],
    ]
    assert "step 601/1,000  loss 3.01  best DER 0.7654  3 min left" in bar.getvalue()
    assert state.status == "Completed"
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
    assert run("--watch", "b2t-1") == 130
    said = capsys.readouterr().err
    assert "b2t-1 goes on without you" in said and "--watch b2t-1" in said and "--stop" in said


class Flaky:
    """SageMaker's description of a job, whose calls of these numbers do not get through."""

    def __init__(self, aws, lost):
        client = aws.account.client("sagemaker")
        self.calls, self.lost, self.scripted = 0, lost, client.describe_training_job
        client.describe_training_job = self

    def __call__(self, **place):
        self.calls += 1
        if self.calls in self.lost:
            raise EndpointConnectionError(endpoint_url="https://sagemaker")
        return self.scripted(**place)


def test_losing_sight_of_aws_for_a_moment_is_survived(aws):
    launched(aws)
    Script(aws, ["InProgress", "InProgress", "Completed"])
    Flaky(aws, (2, 3))
    bar = io.StringIO()
    assert watch("b2t-1", aws.account, out=io.StringIO(), bar=bar).status == "Completed"
    assert "Lost sight of b2t-1" in bar.getvalue()


def test_watching_gives_up_when_aws_stays_silent_and_says_the_job_is_safe(aws):
    launched(aws)
    Script(aws, ["InProgress"])
    Flaky(aws, range(2, 100))
    with pytest.raises(JobError, match="the job is not affected"):
        watch("b2t-1", aws.account, out=io.StringIO(), bar=io.StringIO())


# --- fetching


def archived(**files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name.replace("__", "/"))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def left(aws, name, content, job="b2t-1"):
    """Put what a job left below its outputs."""
    key = f"sagemaker-outputs/{job}/{name}"
    aws.client("s3").put_object(Bucket=BUCKET, Key=key, Body=content)


LOG = b"""\
15 10:40:12: Val batch 1500: DER (avg): 0.7654 CTC Loss (avg): 4.32 time: 12.3
15 10:50:12: Val batch 3000: DER (avg): 0.7001 CTC Loss (avg): 4.11 time: 12.3
"""


def test_fetching_unpacks_model_and_outputs_and_shows_the_results(aws, tmp_path, capsys):
    launched(aws)
    model = archived(checkpoint__best_checkpoint=b"w", training_log=LOG)
    left(aws, "output/model.tar.gz", model)
    left(aws, "output/output.tar.gz", archived(**{"metrics.jsonl": b"{}"}))
    assert run("--fetch", "b2t-1", "--to", tmp_path / "job") == 0
    assert (tmp_path / "job/model/checkpoint/best_checkpoint").read_bytes() == b"w"
    assert (tmp_path / "job/output/metrics.jsonl").read_bytes() == b"{}"
    said = capsys.readouterr().out
    assert "best  3,000     0.7001" in said
    assert f"evaluate_model.py --model {tmp_path / 'job/model'} --s3-bucket {BUCKET}" in said
    assert run("--fetch", "b2t-1", "--to", tmp_path / "job") == 1
    assert "exists already" in capsys.readouterr().err


def test_fetching_needs_no_ended_job_and_none_that_sagemaker_knows(aws, tmp_path, capsys):
    launched(aws)
    Script(aws, ["InProgress"])
    left(aws, "logs/training_log", LOG)
    assert run("--fetch", "b2t-1", "--to", tmp_path / "job") == 0
    assert (tmp_path / "job/logs/training_log").read_bytes() == LOG
    assert "There is no model yet" in capsys.readouterr().out
    left(aws, "output/model.tar.gz", archived(training_log=LOG), job="local-1")
    assert run("--fetch", "local-1", "--s3-bucket", BUCKET, "--to", tmp_path / "local") == 0
    assert (tmp_path / "local/model/training_log").read_bytes() == LOG
