"""The guide's recipes for the SageMaker SDKs, run as they stand, from an empty HOME, on the wire.

They must ask SageMaker for what the launcher asks; what may differ is listed in `MAY_DIFFER`.
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from brain_to_text.config_reader import SCHEMA_DEFAULTS, load_config
from brain_to_text.launch.request import CODE_FOLDER
from brain_to_text.launch.submit import launch_training_job
from brain_to_text.log_lines import METRIC_DEFINITIONS
from support.aws_emulation import ACCOUNT, BUCKET, ROLE, emulated_aws, ready_to_train

pytestmark = pytest.mark.aws

TOP = CODE_FOLDER.parent
# --no-deps: everything they need for training jobs is there already, for v2
SDK_V3 = ("sagemaker-train==1.27.0", "sagemaker-core==2.27.0", "nest-asyncio==1.6.0")
# The launcher names the job's log location, the recipes leave it to the job, which names the same.
# ModelTrainer makes up the job's name and has no switch for the profiler, which is off unless asked
# for in accounts of today; it spells out the API's own default compression.
MAY_DIFFER = {
    "Estimator": {"HyperParameters.output-s3-uri"},
    "ModelTrainer": {
        "HyperParameters.output-s3-uri",
        "TrainingJobName",
        "ProfilerConfig.DisableProfiler",
        "OutputDataConfig.CompressionType",
        "EnableManagedSpotTraining",
        "EnableInterContainerTrafficEncryption",
        "EnableNetworkIsolation",
    },
}


@pytest.fixture
def aws(monkeypatch):
    with emulated_aws(monkeypatch) as emulated:
        ready_to_train(emulated, monkeypatch)
        yield emulated


def blocks():
    """The Python blocks of the guide's section on the SDK: what they share, then each recipe."""
    text = (CODE_FOLDER / "README_SAGEMAKER.md").read_text(encoding="utf-8")
    section = text.split("### With the SageMaker SDK instead")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def run(aws, home, *parts, packages=()):
    """Run blocks as one program in a process of its own; every request it sent."""
    home.mkdir()
    program = "\n".join(parts).replace("YOUR-BUCKET", BUCKET).replace("YOUR-ACCOUNT", ACCOUNT)
    environment = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
    environment |= {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(map(str, packages)),
        # nothing leaves this machine: the SDKs report home unless a settings file forbids it
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program.replace("IMAGE-URI", aws.image_uri)],
        cwd=TOP,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return aws.sent


def leaves(value, path=""):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}" if path else name)
    else:
        yield path, json.dumps(value, sort_keys=True)


def split_config(request):
    """A request without its configuration, and that configuration as the trainer reads it."""
    request = copy.deepcopy(request)
    given = request["HyperParameters"]
    keys = {name: given.pop(name) for name in list(given) if "-" not in name}
    name = given.pop("config-file").strip('"')
    return request, load_config(None if name == SCHEMA_DEFAULTS else CODE_FOLDER / name, keys)


def differing(sent):
    """Fields that differ from the launcher's request for a job with that checkpoint location."""
    image = sent["AlgorithmSpecification"]["TrainingImage"]
    job = sent["CheckpointConfig"]["S3Uri"].split("/")[-2]
    ours = launch_training_job(BUCKET, dry_run=True, role=ROLE, image_uri=image, job_name=job)
    (our_request, our_config), (request, config) = split_config(ours.request), split_config(sent)
    assert config == our_config
    return {path for path, _ in set(leaves(our_request)) ^ set(leaves(request))}


def test_the_estimator_and_the_tuner_around_it_send_the_launchers_request(aws, tmp_path):
    pytest.importorskip("sagemaker.estimator", reason="SDK v2 is not installed")
    shared, estimator, tuner, _ = blocks()
    single, sweep = run(aws, tmp_path / "home", shared, estimator, tuner)
    assert differing(single) == MAY_DIFFER["Estimator"]
    definition = sweep["TrainingJobDefinition"]
    algorithm, alone = definition["AlgorithmSpecification"], single["AlgorithmSpecification"]
    assert algorithm["TrainingImage"] == alone["TrainingImage"]
    assert algorithm["MetricDefinitions"] == list(METRIC_DEFINITIONS)
    for name in ("OutputDataConfig", "StoppingCondition", "RoleArn"):
        assert definition[name] == single[name], name
    assert definition["HyperParameterTuningResourceConfig"] == single["ResourceConfig"]
    assert "CheckpointConfig" not in definition
    fixed = definition["StaticHyperParameters"]
    assert {k: fixed[k] for k in single["HyperParameters"]} == single["HyperParameters"]
    config = sweep["HyperParameterTuningJobConfig"]
    objective = config["HyperParameterTuningJobObjective"]
    assert objective == {"Type": "Minimize", "MetricName": "validation:best_DER"}
    assert objective["MetricName"] in [metric["Name"] for metric in METRIC_DEFINITIONS]
    ranges = config["ParameterRanges"]
    (rate,) = ranges["ContinuousParameterRanges"]
    assert (rate["Name"], rate["ScalingType"]) == ("lr_max", "Logarithmic")
    (units,) = ranges["CategoricalParameterRanges"]
    assert units["Name"] == "model.n_units"


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


def test_model_trainer_sends_the_launchers_request(aws, tmp_path, sdk_v3):
    shared, _, _, trainer = blocks()
    (sent,) = run(aws, tmp_path / "home", shared, trainer, packages=[sdk_v3])
    assert sent["TrainingJobName"].startswith("b2t-trainer")
    assert differing(sent) <= MAY_DIFFER["ModelTrainer"]
