#!/usr/bin/env bash
# What only a GPU can tell, in one call of at most eight minutes, the most important first.
#
#   tests/benchmarks/gpu_day.sh             all parts, in the order below
#   tests/benchmarks/gpu_day.sh PART ...    only these
#   tests/benchmarks/gpu_day.sh --tiny      all of it in small on the CPU: does it still run?
#
#   versions   GPU, driver, torch, cuDNN, Triton
#   check      what a run finds out before it trains: the GRU's precision, the CTC kernel
#   train      a small run that is stopped, resumed and evaluated
#   full       the diphone configuration on trials of 850 bins
#   profile    one step: ms, ms until the host has launched it, kernels, waits, memory; where time goes
#   gru        the GRU's forms
#   tests      the tests that need a GPU
#
# Needs no network and no S3 client. PYTHON (default: .venv's, else python3) must have the packages
#   torch numpy h5py yaml jinja2 tqdm fsspec rapidfuzz pytest pytest_timeout
# Wheels of missing ones in WHEELS (default .local/wheels, filled by pip download) are used from there.
#
# A part that fails costs no other; the exit code is 1 if any did. A part for which no time is left is
# named and left out. Environment: OUT, where results go (default .local/gpu_day): summary.txt with the
# main lines, and a file for each part. WORK, data and models (default .local/gpu_day_work). BUDGET,
# seconds for all of it (480). DEVICE (cuda:0).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

known="versions check train full profile gru tests"
tiny=; parts=()
for word in "$@"; do
    case $word in
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        --tiny) tiny=1 ;;
        *)
            if [[ " $known " != *" $word "* ]]; then
                echo "$0: unknown part '$word': see $0 --help" >&2
                exit 2
            fi
            parts+=("$word")
            ;;
    esac
done
if [[ ${#parts[@]} -eq 0 ]]; then read -ra parts <<< "$known"; fi

python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
out=${OUT:-.local/gpu_day} work=${WORK:-.local/gpu_day_work} wheels=${WHEELS:-.local/wheels}
mkdir -p "$out" "$work"
export PYTHONUNBUFFERED=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
failed=0

if [[ $tiny ]]; then
    device=cpu budget=${BUDGET:-1800}  # the machine may be busy with other tests
    gru=(--units 16 --layers 2 --inputs 56 --batch-size 3 --frames 12 --rounds 1)
    size=(--n-units 16 --n-layers 2 --n-input-features 8 --batch-size 4 --bins 90 --rounds 1)
    smoke=(--electrodes 8 --sessions 2 --trials 10)
    full="sessions=2, train_trials=10, val_trials=2, test_trials=0, electrodes=8"
    trainer=(--model.n_units 16 --dataset.batch_size 4 --dataset.days_per_batch 2 --batches_per_train_log 1)
    steps=12 stop_after=2 full_steps=3 config=code/rnn_args_smoke.yaml pytest=(--collect-only)
else
    device=${DEVICE:-cuda:0} budget=${BUDGET:-480}
    gru=(--rounds 10) smoke=() trainer=(--batches_per_train_log 25) pytest=(--timeout 60)
    full="sessions=4, train_trials=40, val_trials=8, test_trials=0, electrodes=256, bins_per_phoneme=31.0"
    steps=400 stop_after=25 full_steps=150 config=code/rnn_args_diphone_sagemaker.yaml
    size=(--config "$config" --rounds 20)
fi

if compgen -G "$wheels/*.whl" > /dev/null; then
    "$python" -m pip install -q --no-index --no-deps --target "$work/packages" --upgrade "$wheels"/*.whl
    export PYTHONPATH=$work/packages${PYTHONPATH:+:$PYTHONPATH}
fi

# note RC SECONDS TITLE: one line of the summary
note() {
    printf '%-44s rc %3d  %4d s\n' "$3" "$1" "$2" | tee -a "$out/summary.txt"
    if [[ $1 -ne 0 ]]; then failed=1; fi
}

# step FILE TITLE COMMAND...: within the time that is left; its output to FILE, a line to the summary
step() {
    local file=$out/$1.txt title=$2 from=$SECONDS code=0 left=$((budget - SECONDS)); shift 2
    if [[ $left -lt 10 ]]; then note 124 0 "$title: no time left"; return; fi
    { echo; echo "=== $title"; echo "+ $*"; } >> "$file"
    timeout --kill-after=10 "$left" "$@" >> "$file" 2>&1 || code=$?
    note "$code" $((SECONDS - from)) "$title"
}

# said FILE PATTERN: the last lines of a part's output that matter
said() {
    { grep -E "$2" "$out/$1.txt" || true; } | tail -6 | cut -c1-200 | sed "s/^/    /" | tee -a "$out/summary.txt"
}

# run NAME DATA CONFIG OPTIONS...: a training command, in the array `command`
run() {
    command=("$python" code/train_model_sagemaker.py --data-dir "$work/$2" --config-file "$3"
        --model-dir "$work/$1/model" --output-data-dir "$work/$1/output"
        --checkpoint-dir "$work/$1/checkpoints" "${trainer[@]}" "${@:4}")
    rm -rf "${work:?}/$1"
}

part_versions() {
    if command -v nvidia-smi > /dev/null; then step versions "nvidia-smi" nvidia-smi; fi
    step versions "versions" "$python" -c '
import os, sys, torch
print(sys.version, torch.__version__, torch.version.cuda, torch.backends.cudnn.version(), os.cpu_count(), "CPUs")
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0), torch.cuda.get_arch_list())'
}

part_check() {
    step check "what a run checks before it trains" "$python" -c '
import sys; sys.path.insert(0, "code")
import torch
from brain_to_text.model import gpu_ctc, packed_gru
device = torch.device(sys.argv[1])
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    print("GRU in", dtype, packed_gru.reason_against(dtype, device) or "agrees with the CPU")
print("CTC kernel:", gpu_ctc.reason_against(device) or "agrees with torch")' "$device"
    said check "^GRU|^CTC"
}

part_train() {
    if [[ ! -f $work/smoke/trial_manifest.json.gz ]]; then
        step train "data: smoke" "$python" code/prepare_dataset.py synthesize "$work/smoke" "${smoke[@]}"
    fi
    local from=$SECONDS job code=0
    run small smoke code/rnn_args_smoke.yaml --batches_per_save 100 --num-training-batches "$steps"
    timeout --kill-after=60 $((budget - SECONDS)) "${command[@]}" >> "$out/train.txt" 2>&1 &
    job=$!
    until grep -q "Train batch $stop_after" "$work/small/model/training_log" 2> /dev/null; do
        if ! kill -0 "$job" 2> /dev/null; then break; fi
        sleep 0.1
    done
    kill -TERM "$job" 2> /dev/null || true
    wait "$job" || code=$?
    note "$code" $((SECONDS - from)) "train: stopped by SIGTERM"
    step train "train: the same, resumed to its end" "${command[@]}"
    step train "evaluate" "$python" code/evaluate_model.py --model "$work/small/model" \
        --data-dir "$work/smoke" --split val --output-dir "$work/evaluated"
    said train "Val batch|Finished|Resum|WARNING|ERROR|computes in|CTC runs"
}

part_full() {
    step full "data: full size" "$python" -c '
import sys; sys.path.insert(0, "code")
from brain_to_text.dataset.synthetic import SyntheticDataset, synthesize
from brain_to_text.storage.store import open_store
print(synthesize(open_store(sys.argv[1]), SyntheticDataset('"$full"')).summary(""))' "$work/full"
    run full_model full "$config" --num-training-batches "$full_steps" \
        --batches_per_val_step 100000 --try_largest_batches_first true
    step full "train: full size" "${command[@]}"
    said full "Train batch|largest batch|CTC runs|ERROR"
}

part_profile() {
    step profile "one step's counts and profile" "$python" tests/benchmarks/bench_step.py \
        --device "$device" "${size[@]}" --counts
    said profile "ms per step|until the host|kernels|waits of the host|peak memory"
}

part_gru() {
    step gru "the GRU's forms" "$python" tests/benchmarks/bench_gru.py --device "$device" "${gru[@]}"
    said gru " ms "
}

part_tests() {
    step tests "tests that need a GPU" "$python" -m pytest -q --noconftest -p pytest_timeout -p no:cacheprovider -m gpu "${pytest[@]}" \
        tests/unit/test_{gpu_ctc,packed_gru,train_step}.py
}

echo "${parts[*]} on $device, at most $budget s" | tee -a "$out/summary.txt"
for part in "${parts[@]}"; do "part_$part"; done
echo "all of it in $SECONDS s" | tee -a "$out/summary.txt"
exit "$failed"
