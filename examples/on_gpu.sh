#!/usr/bin/env bash
# What wants a GPU, in parts: those that are named, or the first six, in under nine minutes.
#
#     bash examples/on_gpu.sh [PART ...] [OUT]
#     bash examples/on_gpu.sh speed compiled
#
# checks   that logits, decoding and the four stages are what they are on a CPU
# demo     the four stages and the ladder
# speed    generation, training and PPO at GPT-2's size, each beside its limit on this machine
# memory   what a stage takes, beside what `python -m nanorlhf memory` predicts
# resume   that a resumed run is the undisturbed one
# kl0      PPO without its KL penalty, behind the demo
#
# compiled what `speed` says of training, PPO and generation, with --compile
# peers    ours beside transformers, nanoGPT and TRL 1.10, as they are and compiled. The last two
#          are looked for in the folders peers/nanoGPT and peers/trl_1_10, see experiments/peers.py
#
# A part that fails or takes too long does not keep the others from running; each writes a file of
# its own to OUT. Needs the source tree, PyTorch, numpy, tiktoken, tqdm, pytest, matplotlib and
# transformers, nothing installed and no network. Without a GPU it runs on the CPU; SIZE=toy makes
# it small enough for that.
set -uo pipefail
cd "$(dirname "$0")/.."
asked="" folder=out/gpu
for word; do
    case $word in
        checks | demo | speed | memory | resume | kl0 | compiled | peers) asked+=" $word " ;;
        *) folder=$word ;;
    esac
done
asked=${asked:- checks demo speed memory resume kl0 }
[[ $asked == *" kl0 "* ]] && asked+=" demo "
out=$(mkdir -p "$folder" && cd "$folder" && pwd)
work=$(mktemp -d)
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
device=$($python -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')")

if [ "${SIZE:-}" = toy ]; then
    patience=10 # CPUs are slow, and may have other work
    gpt="--max_steps 20 --documents 300 --d_model 64 --n_head 2 --sample_tokens 8"
    sft="--max_steps 10 --demonstrations 300 --max_new_tokens 16"
    rm="--max_steps 4 --prompts 20 --heldout_prompts 20 --max_new_tokens 16"
    ppo="--max_steps 2 --batch_size 8 --minibatch_size 4 --eval_prompts 4 --max_new_tokens 16"
    evaluate="--prompts 8 --best_of_prompts 2 --max_new_tokens 16"
    size="--n_layer 1 --n_head 2 --d_model 32 --vocab_size 64 --batch_size 2 --seq_len 16"
    size+=" --repeats 1 --prompt_tokens 4 --max_new_tokens 8"
    train="" gen="--rows 4" long="--rows 4" steps="--rows 4 --minibatch_size 2"
else
    patience=1
    gpt="" sft="" rm="" ppo="" evaluate=""
    size="--n_layer 12 --n_head 12 --d_model 768 --vocab_size 50257 --dtype bfloat16"
    train="--batch_size 16 --seq_len 1024"
    gen="--rows 256 --prompt_tokens 64 --max_new_tokens 128"
    long="--rows 256 --prompt_tokens 64 --max_new_tokens 448"
    steps="--rows 512 --prompt_tokens 64 --max_new_tokens 64 --minibatch_size 64"
fi

part() { # NAME SECONDS: run the function of that name if it was asked for, say how it went
    [[ $asked == *" $1 "* ]] || return 0
    local start=$SECONDS code=0
    timeout --kill-after=5 $(($2 * patience)) bash -c "set -e; $(declare -f tests "$1"); $1" \
        >"$out/$1.txt" 2>&1 || code=$?
    echo "$1: exit status $code after $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

tests() { TEST_DEVICE=$device $python -m pytest --noconftest -p no:cacheprovider tests/test_device.py -k "$1"; }

checks() { tests "not resumed"; }

resume() { tests resumed; }

demo() {
    for stage in gpt sft rm ppo; do
        local start=$SECONDS
        case $stage in
            gpt) from="" flags=$gpt ;;
            sft) from="--init $work/gpt" flags=$sft ;;
            rm) from="--init $work/sft --sft $work/sft" flags=$rm ;;
            ppo) from="--init $work/sft --reward $work/rm" flags=$ppo ;;
        esac
        $python train_$stage.py --out_dir $work/$stage $from $flags
        echo "train_$stage.py: $((SECONDS - start)) s"
    done
    cp $work/ppo/metrics.csv $out/ppo_metrics.csv
    $python -m nanorlhf evaluate --out $work $evaluate
    cp $work/ladder.json $out
}

speed() {
    local code=0
    $python -m nanorlhf bench $size --what train $train || code=$?
    $python -m nanorlhf bench $size --what ppo $steps || code=$?
    $python -m nanorlhf bench $size --what gen $gen || code=$?
    $python -m nanorlhf bench $size --what gen $long || code=$?
    $python -m experiments.peers $size --what gen $gen || code=$?
    return $code
}

compiled() {
    local code=0
    $python -m nanorlhf bench $size --compile --what train $train || code=$?
    $python -m nanorlhf bench $size --compile --what ppo $steps || code=$?
    $python -m nanorlhf bench $size --compile --what gen $gen || code=$?
    return $code
}

peers() {
    local code=0 race="$python -m experiments.peers $size"
    for flag in --no-compile --compile; do
        $race $flag --what gen $gen || code=$?
        [ ! -d peers/nanoGPT ] || $race $flag --nanogpt peers/nanoGPT --what train $train || code=$?
        [ ! -d peers/trl_1_10 ] || $race $flag --trl peers/trl_1_10 --what ppo $steps || code=$?
    done
    return $code
}

memory() { $python -m pytest -s --noconftest -p no:cacheprovider tests/slow/test_memory.py; }

kl0() {
    $python train_ppo.py --init $work/sft --reward $work/rm --kl_coef 0 --out_dir $work/ppo_kl0 $ppo
    tail -1 $work/ppo_kl0/metrics.csv
}

export out work python device gpt sft rm ppo evaluate size train gen long steps
{
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || echo "no GPU"
    $python -c "import torch; print('torch', torch.__version__)"
    git log -1 --format="commit %h" 2>/dev/null || true
} | tee "$out/summary.txt"
part checks 80
part demo 150
part speed 170
part memory 70
part resume 30
part kl0 30
part compiled 240
part peers 540
rm -rf "$work"
! grep -v "exit status 0" "$out/summary.txt" | grep "exit status"
