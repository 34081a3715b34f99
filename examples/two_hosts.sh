#!/usr/bin/env bash
# Tuning on two hosts. Each runs the same command and names the same storage; they share the trials, and each ends with
# the winner in a cache of its own. Printed are what each found, and how many candidates each process timed of the one
# study that they share.
#
# Here the hosts are two processes with a cache each, and the storage is a journal file. On two real hosts it is a file
# that both see, or a database: --storage postgresql://tuner@db/tuning. Times are comparable between equal devices only;
# two processes on one machine take turns at its device.
set -euo pipefail

TRIALS=${TRIALS:-16}
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

tune_on() { # name of the host
  HSA_COMPILE_CACHE_DIR="$work/$1" "$PYTHON" -m hsa_compile tune --device cpu --op forward --seq-len 512 \
    --heads 4 --kv-heads 1 --head-dim 16 --chunk-size 16 --top-k 4 --trials "$TRIALS" --timeout 60 \
    --storage "$work/study.journal" \
    >"$work/$1.out" 2>"$work/$1.err" || { cat "$work/$1.err" >&2; return 1; }
}

tune_on first & first=$!
tune_on second & second=$!
wait "$first"
wait "$second"

for host in first second; do
  echo "$host host: $(grep '^hsa_forward ' "$work/$host.err")"
done

"$PYTHON" - "$work/study.journal" <<'PY'
import collections, sys
from hsa_compile.autotune.study.storage import open_storage
from hsa_compile.autotune.study.trials import SKIPPED

storage = open_storage(sys.argv[1])
for study in storage.get_all_studies():
    trials = storage.get_all_trials(study._study_id)
    timed = [trial for trial in trials if trial.state.is_finished() and SKIPPED not in trial.user_attrs]
    by = collections.Counter(trial.user_attrs["owner"]["pid"] for trial in timed)
    print(f"study {study.study_name}: {len(timed)} candidates, {' + '.join(map(str, by.values()))} by {len(by)} processes")
PY
