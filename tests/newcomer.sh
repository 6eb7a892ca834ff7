#!/usr/bin/env bash
# What a new user does, with the commands of the README alone: demo, evaluation of its model, comparison, report, a
# run on data of one's own that Ctrl-C stops and --resume goes on with, a wheel in an empty environment.
#
#   tests/newcomer.sh           the short form, which the suite runs: a demo of three steps, and no wheel
#   tests/newcomer.sh --full    the demo in full length, easy-VQA from its package, the wheel: about 15 minutes
#
# Where the last line is not "newcomer: all is well", the line before says what failed. What was made is kept in the
# folder that NEWCOMER_FOLDER names, if it does.
set -euo pipefail
full=false; [ "${1:-}" = --full ] && full=true
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
work=${NEWCOMER_FOLDER:-}
[ -n "$work" ] || { work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; }
mkdir -p "$work"; cd "$work"
export PYTHONPATH=  # nothing but what is installed
vigos() { "$python" -m vigos "$@"; }
step() { echo "--- $*"; }
fail() { echo "newcomer: $*" >&2; exit 1; }
trap 'fail "line $LINENO: exit status $?"' ERR

step "the first screen"
vigos --version; vigos doctor
[ "$(vigos train --help | wc -L)" -le 100 ] || fail "help in a pipe is wider than 100 columns"
LANG=C LC_ALL=C NO_COLOR=1 vigos --help > help.txt; grep -q train help.txt
if vigos train --learning-rate fast 2> error.txt; then fail "a wrong value is taken"; fi
[ "$(wc -l < error.txt)" = 1 ] || fail "a wrong value is more than one line: $(cat error.txt)"

step "the demo"
if $full; then
  vigos demo --output-dir demo
else
  "$python" -c 'from vigos.cli import main; from vigos.study import demo
demo.QUICK = demo.DemoSize(steps=3, examples_a_step=8, triplets=12)
main()' demo --quick --output-dir demo
fi

step "its model, evaluated as the documentation says, agrees with the demo within the interval"
vigos eval --model demo/train/merged --data demo/world/test.jsonl --output-dir demo/train/eval --temperature 1 --max-new-tokens 96
"$python" - <<'PYTHON'
import json
from vigos.eval.results import EvaluationResult
low, high = EvaluationResult.load("demo/after.jsonl").summary()["accuracy_interval"]
lowest, highest = json.load(open("demo/train/eval/summary.json"))["accuracy_interval"]
assert low <= highest and lowest <= high, (low, high, lowest, highest)
PYTHON
vigos compare demo/before.jsonl demo/after.jsonl
vigos report demo
[ -s demo/report.html ] || fail "no report"

step "a run on other data, stopped by Ctrl-C and gone on with"
if $full; then
  "$python" - <<'PYTHON'
import json
from pathlib import Path
from easy_vqa import get_train_image_paths, get_train_questions
paths, (questions, answers, ids) = get_train_image_paths(), get_train_questions()
rows = [{"problem": q, "answer": a, "images": [str(Path(paths[i]).resolve())], "problem_id": str(n)}
        for n, (q, a, i) in enumerate(zip(questions, answers, ids))][:64]
Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
PYTHON
  data=(--data train.jsonl --allow-outside-root true)
else
  vigos world generate mine --split train --n 64 --seed 5
  data=(--data mine/train.jsonl)
fi
run=(train --model builtin "${data[@]}" --output-dir run --use-cpu true --max-steps 40 --save-steps 2
  --per-device-train-batch-size 4 --gradient-accumulation-steps 1 --max-completion-length 48 --report-to none)
"$python" -m vigos "${run[@]}" > run.txt 2>&1 & process=$!
until [ -d run/checkpoint-2 ] || ! kill -0 $process 2> /dev/null; do sleep 0.2; done
kill -INT $process || { cat run.txt; fail "the run ended before Ctrl-C"; }
wait $process && code=0 || code=$?
[ $code = 130 ] || { cat run.txt; fail "Ctrl-C ended in $code"; }
grep -q -e "--resume auto" run.txt || { cat run.txt; fail "Ctrl-C does not say how to go on"; }
last=$("$python" -c 'import json; print([json.loads(l)["step"] for l in open("run/metrics.jsonl")][-1])')
vigos "${run[@]}" --max-steps $((last + 2)) --resume auto
"$python" - "$last" <<'PYTHON'
import json, sys
steps = [line["step"] for line in map(json.loads, open("run/metrics.jsonl")) if "grad_norm" in line]
assert steps == list(range(1, int(sys.argv[1]) + 3)), steps
PYTHON
vigos report run

if $full; then
  step "a wheel in an empty environment"
  "$python" -m pytest -q -p no:cacheprovider "$root/tests/test_install.py"
fi
echo "newcomer: all is well"
