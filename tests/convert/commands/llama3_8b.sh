#!/bin/bash
# The flags of Megatron-LM's examples/llama/train_llama3_8b_h100_fp8.sh, arranged anew.
SAVE_TO=${1:-"checkpoints/llama3_8b"}
DATA=${2:-"MOCK"}
NODES=1
GPUS=8
RANKS=$(($NODES * $GPUS))
PRECISION="fp8"
LENGTH=8192

mkdir -p "$(dirname "$SAVE_TO")"

LAUNCH=(--nproc_per_node $GPUS --nnodes $NODES --node_rank ${NODE_RANK:-0}
        --master_addr ${MASTER_ADDR:-localhost} --master_port 29500)

MODEL=(
    --use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
    --num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128
    --seq-length $LENGTH --max-position-embeddings ${LENGTH}
    --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0   # RoPE
    --attention-dropout 0.0 --hidden-dropout 0.0 --swiglu --normalization RMSNorm
    --init-method-std 0.0134 --attention-backend fused --apply-layernorm-1p
    --untie-embeddings-and-output-weights --disable-bias-linear
)
OPTIMIZATION=(
    --micro-batch-size 1 --global-batch-size 128
    --train-samples 1953125000 --lr-decay-samples 1949218748 --lr-warmup-samples 3906252
    --lr 0.00015 --min-lr 0.00001 --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5
    --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95
    --bf16 --grad-reduce-in-bf16 --cross-entropy-loss-fusion --calculate-per-token-loss
    --manual-gc --empty-unused-memory-level 1 --exit-duration-in-mins 235
)
EXTRA=()
if [[ "$PRECISION" == "fp8" ]]; then
    EXTRA+=(
        "--fp8-format hybrid"
        "--fp8-amax-history-len 1024"
        "--fp8-amax-compute-algo max"
        "--fp8-param-gather"
    )
fi
LAYOUT=(--tensor-model-parallel-size 1 --context-parallel-size 1
        --sequence-parallel)
SHARDING=(--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
OPTIMIZATION+=("${SHARDING[@]}")

INPUT=()
if [[ "$DATA" == "MOCK" ]] || [[ -z "$DATA" ]]; then
    INPUT+=("--mock-data" "--tokenizer-type NullTokenizer")
else
    INPUT+=("--data-path $DATA" "--tokenizer-type HuggingFaceTokenizer" "--tokenizer-model $3")
fi
INPUT+=("--vocab-size 128256" "--data-cache-path ${PWD}/cache" "--tiktoken-pattern v2" "--split '99,1,0'"
        "--no-create-attention-mask-in-dataloader" "--no-mmap-bin-files" "--num-workers 1")

RECORD=(
    --log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput
    --profile --profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist
    --distributed-timeout-minutes 60 --save "$SAVE_TO" --load "$SAVE_TO" --tensorboard-dir "logs/llama3_8b"
)

if [ ! -f pretrain_gpt.py ]; then
    echo "not in the folder of Megatron-LM"
    exit 1
fi

torchrun ${LAUNCH[@]} pretrain_gpt.py \
    ${MODEL[@]} ${OPTIMIZATION[@]} \
    ${EXTRA[@]} ${LAYOUT[@]} ${INPUT[@]} \
    ${RECORD[@]}
