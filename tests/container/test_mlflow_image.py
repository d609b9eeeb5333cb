"""The image with MLflow's client: a job in it logs into a real server."""

import contextlib
import json

import pytest
from support.engine import container_host, docker
from support.mlflow_server import MlflowRest, serve_mlflow

pytestmark = [pytest.mark.docker, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    with contextlib.ExitStack() as stack:
        folder = tmp_path_factory.mktemp("mlflow")
        try:
            url = stack.enter_context(serve_mlflow(folder, container_host()))
        except RuntimeError as problem:
            pytest.skip(str(problem))
        yield url


def test_it_holds_the_client_and_says_so(image_with_mlflow):
    labels = json.loads(docker("inspect", image_with_mlflow))[0]["Config"]["Labels"]
    assert labels["brain-to-text.mlflow"] == "yes"
    docker("run", "--rm", image_with_mlflow, "pip", "check")


def test_a_job_logs_into_a_server(make_job, image_with_mlflow, server):
    variables = {"MLFLOW_TRACKING_URI": server, "MLFLOW_RUN_NAME": "in-a-container"}
    result = make_job(image=image_with_mlflow, variables=variables).run()
    assert result.exit_code == 0, result.log
    assert "MLflow run" in result.log and "WARNING" not in result.log
    (run,) = MlflowRest(server).runs("brain-to-text")
    assert (run["info"]["run_name"], run["info"]["status"]) == ("in-a-container", "FINISHED")
    steps = {m["key"]: m["step"] for m in run["data"]["metrics"]}
    assert steps["train/loss"] == 5 and "validation/der" in steps
    assert run["params"]["dataset.batch_size"] == "4"
