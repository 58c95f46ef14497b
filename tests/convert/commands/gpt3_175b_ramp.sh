#!/bin/bash
# The flags of Megatron-LM's former examples/pretrain_gpt3_175B.sh, which Slurm starts through a shell.
#SBATCH --nodes=128 --ntasks-per-node=8

HERE=`pwd`
BLEND="0.2 /data/one_text_document 0.3 /data/two_text_document 0.5 /data/three_text_document"

options=" \
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 \
    --num-layers 96 --hidden-size 12288 --num-attention-heads 96 \
    --seq-length 2048 --max-position-embeddings 2048 \
    --micro-batch-size 1 --global-batch-size 1536 --rampup-batch-size 16 16 5859375 \
    --train-samples 146484375 --lr-decay-samples 126953125 --lr-warmup-samples 183105 \
    --lr 6.0e-5 --min-lr 6.0e-6 --lr-decay-style cosine \
    --log-interval 10 --eval-iters 40 --eval-interval 1000 \
    --data-path ${BLEND} --vocab-file gpt-vocab.json --merge-file gpt-merges.txt \
    --save-interval 1000 --save /runs/gpt3 --load /runs/gpt3 --split 98,2,0 \
    --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 \
    --tensorboard-dir /runs/gpt3/tb --fp16 --activations-checkpoint-method uniform "

run_cmd="python -u ${HERE}/pretrain_gpt.py $@ ${options}"

srun -l --container-image image --output=$HERE/logs/%x_%j.log sh -c "${run_cmd}"
