# The flags of Megatron-LM's examples/gpt3, in the 857M shape of its first table and its newer batch schedule.
DATA_PATH=$5
GPT_MODEL_ARGS=(
    --num-layers 24
    --hidden-size 1536          # heads of 96 channels
    --num-attention-heads 16
    --seq-length 2048
    --max-position-embeddings 2048
    --attention-backend auto # Can use (flash/fused/unfused/local)
)
TRAINING_ARGS=(
    --micro-batch-size 1
    --global-batch-size 1536
    --step-batch-size-schedule "0:16 2.4B:320 4.8B:624 7.2B:928 9.6B:1232 12B:1536"
    --train-iters 100000
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 --clip-grad 1.0
    --fp16 --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-fraction .001 --lr-decay-iters 430000
)
torchrun --nproc_per_node 8 --nnodes 1 pretrain_gpt.py \
    ${GPT_MODEL_ARGS[@]} ${TRAINING_ARGS[@]} \
	--tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 \
    --data-path $DATA_PATH --vocab-file $3 --merge-file $4 --split 949,50,1 \
    --log-interval 100 --save-interval 10000 --eval-interval 1000 --save $1 --load $1 --eval-iters 10 \
    --tensorboard-dir $2
