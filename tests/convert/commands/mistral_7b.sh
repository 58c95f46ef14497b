# Mistral 7B's shape (arXiv 2310.06825) with the flags that Megatron-LM documents for Llama and Mistral.
TP=2
export CUDA_DEVICE_MAX_CONNECTIONS=1
torchrun --nproc-per-node=8 --nnodes=4 pretrain_gpt.py \
  --tensor-model-parallel-size $TP --pipeline-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer \
  --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 \
  --group-query-attention --num-query-groups 8 --seq-length 4096 --max-position-embeddings 32768 \
  --position-embedding-type rope --rotary-base 1000000 --no-rope-fusion --swiglu --disable-bias-linear \
  --normalization RMSNorm --norm-epsilon 1e-5 --untie-embeddings-and-output-weights \
  --attention-dropout 0 --hidden-dropout 0 --window-size 4096,0 --bf16 --seed 42 \
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizers/mistral --vocab-size 32000 \
  --data-path 30 /d/web_text_document 70 /d/code_text_document --split 100,0,0 \
  --micro-batch-size 2 --global-batch-size 256 --train-iters 1000 --lr 3e-4 --min-lr 3e-5 \
  --lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters 100 --lr-warmup-iters 20 \
  --save runs/mistral > log.txt 2>&1
