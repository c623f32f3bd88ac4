#!/usr/bin/env bash
# Rounds of RLHF with a person in them: the newest policy answers, you judge on a page, a reward
# model learns from all that you have said so far, PPO starts from the SFT model again.
#
#   make loop                                  # you judge: open the address that is printed
#   make loop LABELER=simulated ROUNDS=2       # the embedded world's labeler judges, in minutes
#
# Round r is out/loop/r. A round that is finished is not run again; one that was interrupted goes on
# with the judgements that were given.
set -euo pipefail
ROUNDS=${ROUNDS:-2} LABELER=${LABELER:-} PROMPTS=${PROMPTS:-100} OUT=${OUT:-out} PYTHON=${PYTHON:-.venv/bin/python}
[ -z "$LABELER" ] || [ "$LABELER" = simulated ] || { echo "LABELER is empty or simulated" >&2; exit 2; }
policy=$OUT/sft judged=() ladder=()
for round in $(seq "$ROUNDS"); do
    here=$OUT/loop/$round
    judged+=("$here/judged.jsonl") ladder+=("round_$round=$here/ppo")
    if [ ! -e "$here/done" ]; then
        "$PYTHON" -m nanorlhf label "$policy" --to "$here/judged.jsonl" --prompts "$PROMPTS" \
            --seed "$round" --labeler "$LABELER" --once --port 0
        "$PYTHON" train_rm.py --data "${judged[@]}" --init "$OUT/sft" \
            --out_dir "$here/rm" --epochs 4 --learning_rate 2e-3 --warmup_steps 5 --folds 5
        "$PYTHON" train_ppo.py --init "$OUT/sft" --reward "$here/rm" --out_dir "$here/ppo"
        touch "$here/done"
    fi
    policy=$here/ppo
done
"$PYTHON" -m nanorlhf evaluate --out "$OUT" --models "${ladder[@]}" ${LABELER:+--labeler "$LABELER"}
