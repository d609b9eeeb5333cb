#!/usr/bin/env bash
# Build the training image and push it to ECR; the last line printed is the digest URI for the launcher.
#
#   ./build_and_push.sh [--repository NAME] [--region R] [--tag T] [--no-push]
#                       [--base-image IMAGE] [--cpu] [--mlflow] [--kms-key ID] [--require-clean]
#
#   --repository NAME   ECR repository (default brain-to-text-training); created if it does not exist
#   --region R          default: AWS_REGION, AWS_DEFAULT_REGION or the profile's
#   --tag T             default: the git revision, with -dirty-HASH when code/ or docker/ has changes
#   --no-push           only build; needs no AWS account
#   --base-image IMAGE  another Debian or Ubuntu image with Python >= 3.11 (or BASE_IMAGE=...)
#   --cpu               torch without CUDA, for tests
#   --mlflow            with MLflow's client, for launch_sagemaker_job.py --mlflow-tracking-uri
#   --kms-key ID        encrypt a new repository with this key instead of AES-256
#   --require-clean     refuse to push a tree with uncommitted changes
#
# Needs Python >= 3.11 (PYTHON names another than python3), a Docker engine and, to push, AWS
# credentials that may use ECR. A tag that is already in the repository is not built or pushed again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    sed -n '2,19s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi

"${PYTHON:-python3}" tests/set_up.py
exec .venv/bin/python docker/push_image.py "$@"
