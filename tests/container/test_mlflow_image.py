"""The image with MLflow's client: a job in it logs into MLflow's file store."""

import json

import pytest
from support.engine import docker

pytestmark = [pytest.mark.docker, pytest.mark.slow]


def test_it_holds_the_client_and_says_so(image_with_mlflow):
    labels = json.loads(docker("inspect", image_with_mlflow))[0]["Config"]["Labels"]
    assert labels["brain-to-text.mlflow"] == "yes"
    docker("run", "--rm", image_with_mlflow, "pip", "check")


def test_a_job_logs_into_mlflow(make_job, image_with_mlflow):
    variables = {
        "MLFLOW_TRACKING_URI": "file:///opt/ml/checkpoints/mlflow",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_RUN_NAME": "in-a-container",
    }
    result = make_job(image=image_with_mlflow, variables=variables).run()
    assert result.exit_code == 0, result.log
    assert "MLflow run" in result.log and "WARNING" not in result.log
    (run,) = (result.base / "checkpoints/mlflow").glob("*/*/tags/mlflow.runName")
    assert run.read_text() == "in-a-container"
    metrics = run.parents[1] / "metrics"
    assert (metrics / "train/loss").read_text().split()[-1] == "5"
    assert (metrics / "validation/der").exists()
    assert (run.parents[1] / "params/dataset.batch_size").read_text() == "4"
    assert (run.parents[1] / "artifacts/report.html").exists()
