#!/usr/bin/env bash
# Everything that only a GPU can tell, in two calls of at most ten minutes.
#
#   tests/benchmarks/gpu_day.sh first     versions, GPU tests, the GRU's forms, the step, its profile
#   tests/benchmarks/gpu_day.sh second    real runs in bf16 and fp16, stop and resume, evaluation, full
#                                         size, sweeps
#   tests/benchmarks/gpu_day.sh PART ...  versions tests micro bench profile train fp16 evaluate full sweep
#   tests/benchmarks/gpu_day.sh --tiny    the parts in small on the CPU, in a minute: do they still run?
#
# Needs bash, a Python with this project's packages and a CUDA build of torch (PYTHON; default: .venv's,
# else python3), and pytest for the tests. No network. Every part has a time-out of its own, and one that
# fails costs no other; the exit code is 1 if any did.
#
# Environment: OUT, where results go (default .local/gpu_day): summary.txt, env.txt, tests.txt, bench.txt,
# profile.txt, train.txt. WORK, data and models (default .local/gpu_day_work). DEVICE (cuda:0).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

known=" versions tests micro bench profile train fp16 evaluate full sweep "
tiny=; parts=()
for word in "$@"; do
    case $word in
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        --tiny) tiny=1 ;;
        first) parts+=(versions tests micro bench profile) ;;
        second) parts+=(versions train fp16 evaluate full sweep) ;;
        *)
            if [[ $known != *" $word "* ]]; then
                echo "$0: unknown part '$word': see $0 --help" >&2
                exit 2
            fi
            parts+=("$word")
            ;;
    esac
done
if [[ ${#parts[@]} -eq 0 ]]; then
    parts=(versions tests micro bench profile)
    if [[ $tiny ]]; then parts=(versions tests micro profile train evaluate sweep); fi
fi

python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
out=${OUT:-.local/gpu_day}
work=${WORK:-.local/gpu_day_work}
mkdir -p "$out" "$work"
export PYTHONUNBUFFERED=1
began=$SECONDS failed=0

config=code/rnn_args_diphone_sagemaker.yaml
if [[ $tiny ]]; then
    device=cpu patience=6  # of a machine that is busy with other tests
    gru=(--units 16 --layers 2 --inputs 56 --batch-size 3 --frames 12 --rounds 1)
    size=(--units 16 --layers 2 --features 8 --batch-size 4 --bins 90 --rounds 1)
    smoke=(--electrodes 8 --sessions 2 --trials 10)
    large=("${smoke[@]}") steps=12 stop_after=2 full_steps=3 full_config=code/rnn_args_smoke.yaml
    trainer=(--model.n_units 16 --dataset.batch_size 4 --dataset.days_per_batch 2 --batches_per_train_log 1)
    full_trainer=("${trainer[@]}") validation=4
else
    device=${DEVICE:-cuda:0} patience=1
    gru=(--rounds 10)
    size=(--config "$config" --rounds 20)
    smoke=()
    large=(--electrodes 256 --sessions 4 --trials 40)
    steps=400 stop_after=25 full_steps=150 full_config=$config
    trainer=() full_trainer=(--batches_per_train_log 25) validation=480
fi

# note RC SECONDS TITLE: one line of the summary
note() {
    printf '%-44s rc %3d  %4d s\n' "$3" "$1" "$2" | tee -a "$out/summary.txt"
    if [[ $1 -ne 0 ]]; then failed=1; fi
}

# step FILE SECONDS TITLE COMMAND...: its output to FILE, one line to the summary, never fatal
step() {
    local file=$out/$1.txt limit=$(($2 * patience)) title=$3 from=$SECONDS code=0; shift 3
    { echo; echo "=== $title"; echo "+ $*"; } >> "$file"
    timeout --kill-after=10 "$limit" "$@" >> "$file" 2>&1 || code=$?
    note "$code" $((SECONDS - from)) "$title"
}

bench() { step bench "$1" "$2" "$python" tests/benchmarks/bench_step.py --device "$device" "${size[@]}" "${@:3}"; }

# run NAME: the trainer's command line on the smoke data, in the array `command`
run() {
    command=("$python" code/train_model_sagemaker.py --data-dir "$work/smoke"
        --config-file code/rnn_args_smoke.yaml --model-dir "$work/$1/model"
        --output-data-dir "$work/$1/output" --checkpoint-dir "$work/$1/checkpoints"
        --batches_per_save 100 --num-training-batches "$steps" "${trainer[@]}" "${@:2}")
}

# data NAME OPTIONS...: a synthetic dataset, once
data() {
    if [[ ! -f $work/$1/trial_manifest.json.gz ]]; then
        step train 240 "data: $1" "$python" code/prepare_dataset.py synthesize "$work/$1" "${@:2}"
    fi
}

# said NAME: what the run's log said that counts
said() {
    { grep -E "Val batch|Finished|Resum|WARNING|ERROR|CTC runs" "$work/$1/model/training_log" 2> /dev/null || true; } |
        tail -5 | cut -c1-160 | sed "s/^/    $1: /" | tee -a "$out/summary.txt"
}

part_versions() {
    if command -v nvidia-smi > /dev/null; then step env 30 "nvidia-smi" nvidia-smi; fi
    step env 60 "versions" "$python" -c '
import os, sys, torch
print(sys.version, torch.__version__, torch.version.cuda, torch.backends.cudnn.version(), os.cpu_count(), "CPUs")
try:
    import triton; print("triton", triton.__version__)
except ImportError as error: print(error)
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0), torch.cuda.get_arch_list())'
}

part_tests() {
    local files=(tests/unit/test_{gpu_ctc,packed_gru,train_step}.py)
    local collect=(); if [[ $tiny ]]; then collect=(--collect-only); fi
    step tests 300 "GPU-marked tests" "$python" -m pytest -q -p no:cacheprovider --timeout 120 -m gpu "${collect[@]}" "${files[@]}"
}

part_micro() {
    step bench 240 "the GRU's forms" "$python" tests/benchmarks/bench_gru.py --device "$device" "${gru[@]}"
}

part_bench() {
    bench 120 "step against the plain recipe"
    if [[ $tiny ]]; then return; fi
    bench 100 "step, torch's CTC" --ctc-kernel torch
    bench 100 "step, equal lengths" --lengths equal
    bench 120 "step with data, hours" --with-data --project
}

part_profile() {
    step profile 150 "one step's counts and profile" "$python" tests/benchmarks/bench_step.py --device "$device" "${size[@]}" --counts
}

part_train() {
    data smoke "${smoke[@]}"
    local from=$SECONDS job code=0
    rm -rf "${work:?}/bf16"
    run bf16
    timeout --kill-after=120 $((120 * patience)) "${command[@]}" >> "$out/train.txt" 2>&1 &
    job=$!
    for _ in $(seq $((600 * patience))); do  # stopped once some steps are done
        if grep -q "Train batch $stop_after" "$work/bf16/model/training_log" 2> /dev/null; then break; fi
        if ! kill -0 "$job" 2> /dev/null; then break; fi
        sleep 0.1
    done
    kill -TERM "$job" 2> /dev/null || true
    wait "$job" || code=$?
    note "$code" $((SECONDS - from)) "train: stopped by SIGTERM"
    step train 150 "train: the same, resumed to its end" "${command[@]}"
    said bf16
}

part_fp16() {
    data smoke "${smoke[@]}"
    local each
    for each in "fp16 --amp_dtype float16 --ema_decay 0.99" "fp32 --use_amp false --allow_tf32 false"; do
        read -ra each <<< "$each"
        rm -rf "${work:?}/${each[0]}"
        run "${each[@]}"
        step train 120 "train: ${each[0]}" "${command[@]}"
        said "${each[0]}"
        if [[ $tiny ]]; then break; fi
    done
}

part_evaluate() {
    local on devices=("$device")
    if [[ ! $tiny ]]; then devices+=(cpu); fi
    for on in "${devices[@]}"; do
        step train 120 "evaluate on $on" "$python" code/evaluate_model.py --model "$work/bf16/model" \
            --data-dir "$work/smoke" --split val --output-dir "$work/evaluated_${on%%:*}" --device "$on"
    done
}

part_full() {
    data full "${large[@]}"
    rm -rf "${work:?}/full_model"
    step train 200 "full size" "$python" code/train_model_sagemaker.py --data-dir "$work/full" \
        --config-file "$full_config" --model-dir "$work/full_model/model" \
        --output-data-dir "$work/full_model/output" --checkpoint-dir "$work/full_model/checkpoints" \
        --num-training-batches "$full_steps" --batches_per_val_step 100000 \
        --try_largest_batches_first true "${full_trainer[@]}"
    { grep -E "Train batch|largest batch|CTC runs" "$work/full_model/model/training_log" 2> /dev/null || true; } |
        tail -4 | cut -c1-200 | sed 's/^/    full: /' | tee -a "$out/summary.txt"
}

part_sweep() {
    bench 150 "validation" --validation "$validation"
    if [[ $tiny ]]; then return; fi
    bench 100 "step, float16" --amp-dtype float16
    bench 120 "step, TF32" --amp-dtype off --tf32
    bench 150 "compile on and off" --compile
    bench 150 "batches and lengths" --sweep --ours-only
    bench 120 "16 GB: batch 64, 1800 bins, bidirectional" --batch-size 64 --bins 1800 --lengths equal \
        --bidirectional --amp-dtype float16 --sweep --ours-only
}

echo "parts: ${parts[*]} on $device" | tee -a "$out/summary.txt"
for part in "${parts[@]}"; do
    case $part in
        versions) part_versions ;;
        tests) part_tests ;;
        micro) part_micro ;;
        bench) part_bench ;;
        profile) part_profile ;;
        train) part_train ;;
        fp16) part_fp16 ;;
        evaluate) part_evaluate ;;
        full) part_full ;;
        sweep) part_sweep ;;
    esac
done
echo "all of it in $((SECONDS - began)) s" | tee -a "$out/summary.txt"
exit "$failed"
