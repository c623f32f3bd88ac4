#!/usr/bin/env bash
# Everything that wants a GPU, in one call: checks, then the figures for the README.
#     bash examples/on_gpu.sh OUT [DATA]     # DATA: folder with sentiment/ and text/, see README
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
data=${2:-}
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader || echo "no GPU: this runs on the CPU"
git log -1 --format=%h
python -m pytest tests/test_gpu.py
python examples/memory_check.py "$out/memory"
time for stage in gpt sft rm ppo; do
    time python train_$stage.py --out_dir "$out/demo/$stage" \
        $([ $stage = gpt ] || echo --init "$out/demo/$([ $stage = sft ] && echo gpt || echo sft)") \
        $([ $stage = rm ] && echo --sft "$out/demo/sft") \
        $([ $stage = ppo ] && echo --reward "$out/demo/rm")
done
python -m nanorlhf evaluate --out "$out/demo"
# peers: TRL and NANOGPT are folders, as for `bench --vs`; each is left out where it is not given
vs=hf${TRL:+,trl=$TRL}${NANOGPT:+,nanogpt=$NANOGPT}
gpt2="--n_layer 12 --n_head 12 --d_model 768 --vocab_size 50257 --dtype bfloat16"
python -m nanorlhf bench $gpt2 --what limits train gen --batch_size 16 --seq_len 1024 --rows 256 \
    --prompt_tokens 64 --max_new_tokens 448 --vs "$vs" | tee "$out/bench.txt"
python -m nanorlhf bench $gpt2 --what ppo --rows 512 --prompt_tokens 64 --max_new_tokens 24 \
    --minibatches 8 --vs "$vs" | tee "$out/bench_ppo.txt"
[ -z "$data" ] && exit
reviews=$data/sentiment/rt_polarity.jsonl.gz
export LEXICON=$data/sentiment/vader_lexicon.txt
films=$out/films
python train_gpt.py --data "$data/text/childrens_classics.txt.gz" "$data/text/fairytales.txt.gz" \
    --vocab_size 8192 --block_size 512 --batch_size 64 --n_layer 12 --n_head 12 --d_model 768 \
    --learning_rate 6e-4 --short_steps 0 --dropout 0.1 --max_steps 1500 --out_dir "$films/gpt"
for model in sft judge; do
    python train_sft.py --data "$reviews" --init "$films/gpt" --out_dir "$films/$model" --epochs 2 \
        --batch_size 32 --learning_rate 1e-4 --dropout 0.1 --seed ${#model}
done
python train_rm.py --data "$reviews" --init "$films/sft" --out_dir "$films/rm" --epochs 1 \
    --batch_size 32 --learning_rate 3e-5 --eval_every 100 --save_every 100
for k in 0.3 0; do
    python train_ppo.py --data "$reviews" --init "$films/sft" --reward "$films/rm" --kl_coef $k \
        --gold examples/sentiment.py:lexicon --max_new_tokens 48 --max_steps 60 --batch_size 256 \
        --learning_rate 3e-5 --out_dir "$films/ppo_$k"
done
python examples/sentiment.py --data "$reviews" --models "$films/sft" "$films/ppo_0.3" \
    "$films/ppo_0" --reward "$films/rm" --judge "$films/judge"
