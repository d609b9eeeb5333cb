#!/usr/bin/env bash
# The main job on this machine: smoke data in a local S3 server -> our image under SageMaker local mode
# -> model.tar.gz.
#
#   ./local_run.sh [--cpu | --gpu] [--no-docker] [--steps N] [--base-image IMAGE]
#
#   --cpu, --gpu        default: the GPU if there is one
#   --no-docker         the toolkit's `train` on a folder shaped like /opt/ml, without a container
#   --steps N           stop after N training steps (default: what the smoke configuration says)
#   --base-image IMAGE  build on another Debian or Ubuntu image with Python >= 3.11 (or BASE_IMAGE=...)
#
# Needs Python >= 3.11 (PYTHON names another than python3); with Docker: an engine and Compose.
# Everything it makes is ignored by git: .venv/, .local/, a wheel in docker/wheels/.
# Exit code 0: trained and, without --steps, the decoder learned.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi

exec "${PYTHON:-python3}" tests/local_run.py "$@" # sets up .venv once its options are understood
