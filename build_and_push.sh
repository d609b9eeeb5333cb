#!/usr/bin/env bash
# Build the training image and push it to ECR; the last line printed is the digest URI for the launcher.
#
#   ./build_and_push.sh [--repository NAME] [--region R] [--tag T] [--no-push]
#                       [--base-image IMAGE] [--cpu] [--mlflow]
#
#   --repository NAME   ECR repository (default brain-to-text-training); created if it does not exist
#   --region R          default: AWS_REGION, AWS_DEFAULT_REGION or the profile's
#   --tag T             default: the git revision, with -dirty-HASH when code/ or docker/ has changes
#   --no-push           only build, for this machine's processor; needs no AWS account
#   --base-image IMAGE  another Debian or Ubuntu image with Python >= 3.11 (or BASE_IMAGE=...)
#   --cpu               torch without CUDA, for tests (TORCH_CPU_INDEX names another index of wheels)
#   --mlflow            with MLflow's client, for launch_sagemaker_job.py --mlflow-tracking-uri
#
# Needs bash, git, a Docker engine and, to push, the AWS command line with credentials that may use
# ECR. A tag that is already in the repository is not built or pushed again.
# Exit code: 0 done, 1 failed (one sentence says why), 2 wrong usage, 3 no Docker engine that can build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

LIFECYCLE='{"rules": [{"rulePriority": 1, "description": "drop untagged images after 14 days",
  "selection": {"tagStatus": "untagged", "countType": "sinceImagePushed", "countUnit": "days",
  "countNumber": 14}, "action": {"type": "expire"}}]}'

say() { printf '==> %s\n' "$*" >&2; }
fail() { printf 'build_and_push: %s\n' "$*" >&2; exit 1; }
usage() { printf 'build_and_push: %s; see ./build_and_push.sh --help.\n' "$*" >&2; exit 2; }
last_line() { sed -e '/^WARNING/d' -e '/^[[:space:]]*$/d' -e 's/\.*$//' "$1" | tail -n 1; }
sha256=(sha256sum)
command -v sha256sum > /dev/null || sha256=(shasum -a 256) # macOS

# --- options

repository=brain-to-text-training region='' tag='' base_image=${BASE_IMAGE:-}
push=yes torch=cuda mlflow=no
while [[ $# -gt 0 ]]; do
    [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
    case $1 in
    --repository | --region | --tag | --base-image)
        [[ -n ${2:-} ]] || usage "$1 needs a value"
        name=${1#--}
        printf -v "${name//-/_}" %s "$2"
        shift
        ;;
    --no-push) push=no ;;
    --cpu) torch=cpu ;;
    --mlflow) mlflow=yes ;;
    -h | --help)
        sed -n '2,19s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) usage "there is no option '$1'" ;;
    esac
    shift
done

# --- what this script leaves on the machine: nothing but .local/image_uri

scratch=$(umask 077 && mktemp -d "${TMPDIR:-/tmp}/build-and-push-XXXXXX")
child=''
# The registry's password lies in the scratch folder while an image is pushed, and lives for hours.
trap 'rm -rf "$scratch"' EXIT
stopped() {
    rm -rf "$scratch"
    [[ -z $child ]] || kill "$child" 2> /dev/null || true
    exit $((128 + $1))
}
trap 'stopped 1' HUP
trap 'stopped 2' INT
trap 'stopped 15' TERM

run() { # in the background, so that a signal is answered at once and not when the command ends
    "$@" &
    child=$!
    local code=0
    wait "$child" || code=$?
    child=''
    return "$code"
}

# --- the engine

# The first docker on PATH that reaches the engine and can build with BuildKit against it: a newer
# client needs its buildx plugin for that, an older one beside it may do without.
find_docker() {
    local client versions reasons=''
    while read -r client; do
        versions=$("$client" version --format '{{.Client.Version}} {{.Server.Version}}' 2> /dev/null) || versions=''
        if [[ $versions != *' '[0-9]* ]]; then
            reasons+="; $client does not reach a Docker engine: start it"
        elif [[ ${versions%%.*} -lt 23 ]] || "$client" buildx version > /dev/null 2>&1; then
            docker=$client
            return
        else
            reasons+="; $client ${versions% *} has no buildx plugin to build on engine ${versions#* }:"
            reasons+=" install docker-buildx, or put the engine's own client first on PATH"
        fi
    done < <(type -ap docker | awk '!seen[$0]++')
    reasons=${reasons:-"; no docker command was found: install Docker"}
    printf 'build_and_push: %s.\n' "${reasons#; }" >&2
    exit 3
}

# --- what the image is made of

# "SHA-256  path" of files that go into the image: those that .dockerignore lets through.
listing() {
    find "$@" -type f -not -path '*/__pycache__/*' -not -name '*.pyc' -not -name '*.whl' \
        -not -path '*/.mypy_cache/*' -not -path '*/.ruff_cache/*' -print0 |
        xargs -0 "${sha256[@]}" | LC_ALL=C sort -k 2
}

# {"code/FILE":"first 16 digits"}: the launcher holds its own files against this label.
fingerprints() {
    local locks=(docker/requirements_sagemaker.txt docker/requirements_sagemaker_torch.txt)
    [[ $mlflow == no ]] || locks+=(docker/requirements_sagemaker_mlflow.txt)
    listing code docker/*.py "${locks[@]}" > "$scratch/listing" 2> "$scratch/unread" ||
        fail "what the image is made of cannot be read: $(last_line "$scratch/unread")."
    ! grep -q '["\\]' "$scratch/listing" ||
        fail 'a file name below code/ has a quote or a backslash: rename it.'
    printf '{%s}' "$(sed 's/^\(.\{16\}\).\{48\}  \(.*\)$/"\2":"\1"/' "$scratch/listing" | paste -s -d , -)"
}

# The git revision, with -dirty when what the image is made of has uncommitted changes.
source_revision() {
    local head
    if ! head=$(git rev-parse HEAD 2> /dev/null); then
        printf unknown
    elif [[ -n $(git status --porcelain -- code docker LICENSE) ]]; then
        printf '%s-dirty' "$head"
    else
        printf '%s' "$head"
    fi
}

# Tags are immutable: every revision, every change and every kind of image needs one of its own.
default_tag() {
    [[ $revision != unknown ]] || fail 'this folder is not a git repository: name the image with --tag.'
    tag=${revision:0:12}
    if [[ $revision == *-dirty ]]; then
        tag+=-dirty-$(listing code docker LICENSE | "${sha256[@]}" | cut -c 1-8)
        say "The tree has uncommitted changes: the tag says so ($tag)."
    fi
    [[ $torch == cuda ]] || tag+=-cpu
    [[ $mlflow == no ]] || tag+=-mlflow
}

# The authorities that this machine trusts: a proxy's own may be among them.
certificates() {
    local path
    for path in "${PIP_CERT:-}" "${SSL_CERT_FILE:-}" "${REQUESTS_CA_BUNDLE:-}" "${CURL_CA_BUNDLE:-}" \
        /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem; do
        if [[ -n $path && -f $path ]]; then
            printf '%s' "$path"
            return
        fi
    done
}

build() { # build NAME [PLATFORM]
    local bundle label settings command=(build) driver=docker
    label=$(fingerprints)
    settings=(--file docker/Dockerfile --progress plain --tag "$1"
        --build-arg "TORCH_VARIANT=$torch" --build-arg "MLFLOW=$mlflow"
        --build-arg "REVISION=$revision"
        --build-arg "CREATED=$(date -u +%Y-%m-%dT%H:%M:%SZ)"
        --label "brain-to-text.code-fingerprints=$label")
    [[ -z ${2:-} ]] || settings+=(--platform "$2")
    [[ -z $base_image ]] || settings+=(--build-arg "BASE_IMAGE=$base_image")
    [[ -z ${TORCH_CPU_INDEX:-} ]] || settings+=(--build-arg "TORCH_CPU_INDEX=$TORCH_CPU_INDEX")
    if "$docker" buildx version > /dev/null 2>&1; then
        # whatever the builder: into the engine, and in Docker's own format, which SageMaker takes
        command=(buildx build)
        settings+=(--output "type=docker,oci-mediatypes=false")
        driver=$("$docker" buildx inspect | sed -n 's/^Driver: *//p' | head -n 1)
    fi
    # The host's network, so that a package proxy on this machine's loopback serves the build too;
    # a builder in a container may not have it.
    [[ $driver != docker ]] || settings+=(--network host)
    bundle=$(certificates)
    [[ -z $bundle ]] || settings+=(--secret "id=ca_bundle,src=$bundle")

    # SageMaker wants one plain manifest, not an index with attestations
    export DOCKER_BUILDKIT=1 BUILDX_NO_DEFAULT_ATTESTATIONS=1
    local log=$scratch/build.log code=0
    mkfifo "$scratch/output"
    tee "$log" < "$scratch/output" >&2 &
    local copier=$!
    run "$docker" "${command[@]}" "${settings[@]}" . > "$scratch/output" 2>&1 || code=$?
    wait "$copier"
    rm "$scratch/output"
    [[ $code == 0 ]] || fail "$(build_problem "$log")"
}

build_problem() {
    local unreachable='failed to (do request|resolve|fetch|copy|authorize)|manifest unknown'
    unreachable+='|pull access denied|not found: manifest|error getting credentials'
    if grep -q 'load metadata' "$1" && grep -qE "$unreachable" "$1"; then
        local wanted=${base_image:-$(sed -n 's/^ARG BASE_IMAGE=//p' docker/Dockerfile)}
        printf '%s' "the base image $wanted cannot be pulled from here:" \
            ' give one that this engine has, any Debian or Ubuntu with Python >= 3.11,' \
            ' with --base-image IMAGE or BASE_IMAGE=IMAGE.'
        return
    fi
    # the step's own error, not the frame around it
    local said
    said=$(grep -iw error "$1" | grep -v 'executor failed' | tail -n 1 || true)
    printf 'docker build failed: %s' "${said:-$(last_line "$1")}"
}

# --- AWS

ask() { # ask SERVICE OPERATION ...: the answer as text; what went wrong is in $scratch/aws
    aws "$@" --output text 2> "$scratch/aws"
}

refused() { # the last `ask` failed: say why and end
    local code said
    code=$(sed -n 's/.*An error occurred (\([^)]*\)) when calling the \([A-Za-z]*\) operation\( ([^)]*)\)\{0,1\}: \(.*\)/\2: \1: \4/p' "$scratch/aws")
    said=${code:-$(last_line "$scratch/aws")}
    case $said in
    *'locate credentials'* | *'config profile'* | *'artial credentials'*)
        fail "no AWS credentials ($said): run \`aws configure\`, or set AWS_PROFILE, then try again."
        ;;
    *SSO* | *sso* | *ExpiredToken* | *'oken has expired'*)
        fail "the AWS login has ended ($said): run \`aws sso login\`, or set new keys, then try again."
        ;;
    esac
    [[ -z $code ]] || fail "AWS refused $said (code/README_SAGEMAKER.md lists the permissions that are needed)."
    fail "AWS cannot be reached: $said."
}

# Sets `registry`; the repository is created if and only if it does not exist.
ensure_repository() {
    local uri
    if ! uri=$(ask ecr describe-repositories --repository-names "$repository" --query 'repositories[0].repositoryUri'); then
        grep -q RepositoryNotFoundException "$scratch/aws" || refused
        uri=$(ask ecr create-repository --repository-name "$repository" --image-tag-mutability IMMUTABLE \
            --image-scanning-configuration scanOnPush=true --encryption-configuration encryptionType=AES256 \
            --query repository.repositoryUri) || refused
        ask ecr put-lifecycle-policy --repository-name "$repository" \
            --lifecycle-policy-text "$LIFECYCLE" > /dev/null || refused
        say "Created the ECR repository $repository (immutable tags, scan on push, encrypted)."
    fi
    registry=${uri%%/*}
}

# Sets `digest` to that of the tag in ECR; to nothing when it is not there.
find_pushed() {
    if ! digest=$(ask ecr describe-images --repository-name "$repository" --image-ids "imageTag=$tag" --query 'imageDetails[0].imageDigest'); then
        grep -q ImageNotFoundException "$scratch/aws" || refused
        digest=''
    fi
}

# With a configuration of Docker's that holds this login alone and lies in the scratch folder: neither
# the user's own nor a key chain, where `docker login` may put it, ever learns the password.
push_image() {
    local login=$scratch/login authorization
    authorization=$(ask ecr get-authorization-token --query 'authorizationData[0].authorizationToken') || refused
    # the user's own configuration may say which engine
    DOCKER_HOST=${DOCKER_HOST:-$("$docker" context inspect --format '{{.Endpoints.docker.Host}}' 2> /dev/null || true)}
    if [[ -n $DOCKER_HOST ]]; then export DOCKER_HOST; else unset DOCKER_HOST; fi
    mkdir "$login"
    printf '{"auths": {"%s": {"auth": "%s"}}}\n' "$registry" "$authorization" > "$login/config.json"
    say "Pushing $1."
    run "$docker" --config "$login" push "$1" 2> "$scratch/push" >&2 ||
        fail "pushing $1 failed: $(last_line "$scratch/push")."
    rm -r "$login"
}

# --- the work

find_docker
command -v git > /dev/null || fail 'no git command was found: install git.'
revision=$(source_revision)
[[ -n $tag ]] || default_tag

if [[ $push == no ]]; then
    say "Building $repository:$tag; nothing will be pushed."
    build "$repository:$tag"
    printf '%s\n' "$repository:$tag"
    exit 0
fi

command -v aws > /dev/null || fail 'the AWS command line (aws) was not found: install it, or only build with --no-push.'
region=${region:-${AWS_REGION:-${AWS_DEFAULT_REGION:-$(aws configure get region || true)}}}
[[ -n $region ]] || fail 'no AWS region: give --region, or set AWS_REGION.'
export AWS_REGION=$region AWS_DEFAULT_REGION=$region AWS_PAGER=''
identity=$(ask sts get-caller-identity --query '[Account,Arn]') || refused
read -r account arn <<< "$identity"
say "Account $account, region $region, as $arn."
ensure_repository
find_pushed
image=$registry/$repository:$tag
if [[ -n $digest ]]; then
    say "$image is already there: nothing to build or push."
else
    say "Building $image for linux/amd64."
    build "$image" linux/amd64 # every SageMaker training instance with an NVIDIA GPU
    push_image "$image"
    find_pushed
fi
if [[ -z $digest ]]; then # what the engine noted when it pushed
    digest=$("$docker" image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$image" |
        grep -F "$registry/$repository@" | tail -n 1 | cut -d @ -f 2) ||
        fail "$image was pushed but the engine noted no digest: push it again."
fi
uri=$registry/$repository@$digest
mkdir -p .local
printf '%s\n' "$uri" > .local/image_uri
say 'The launcher takes this image by default; its digest URI:'
printf '%s\n' "$uri"
