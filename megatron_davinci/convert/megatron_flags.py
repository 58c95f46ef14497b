"""Megatron-LM's flags, one row each: what it becomes here, why it has no effect, or why it is not carried over.

Names, arities and defaults follow NVIDIA's Megatron-LM, `megatron/training/arguments.py` and the configuration
classes that it makes flags of (2026-08), with names that older launch scripts still use.
"""

# ruff: noqa: E501  (one row a line)
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["copied", "translated", "fixed", "idle", "lost"]
MANY = -1
"""An arity: any number of values."""


@dataclass(frozen=True)
class Flag:
    """A row.

    Attributes:
        name: The flag.
        values: How many it takes; `MANY` for any number.
        kind: `copied` to one key; `translated` to one or more, with other flags; `fixed`: one value is what the
            model has, another is not carried over; `idle`: no effect here; `lost`: not carried over.
        what: The key, or what it becomes, or why it does not.
        do: For `fixed` and `lost`: what to do instead.
        has: For `fixed`: the values that the model has.
        absent: For `fixed`: the value that its absence means, if the model does not have that one.
    """

    name: str
    values: int
    kind: Kind
    what: str
    do: str = ""
    has: tuple[str, ...] = ()
    absent: str = ""


_KERNEL = "chooses a kernel, not what is computed"
_FASTER = "no effect on results; not a setting here"
_SHOWN = "progress, TensorBoard and the report show it, or need no setting"
_LAUNCHER = "the launcher's: give it to torchrun or Slurm as before"
_MEMORY = "saves memory; there is no such setting here"
_FITS = "`davinci plan` estimates whether it fits without"
_ELSE = "another model; it cannot be trained here"
WEIGHTS = "`davinci convert from-megatron`, then checkpoint.initial_weights"
_SHARDS = "name or tokenise the data as sources; docs/from-megatron-lm.md says how"

# One line a flag: name, values, kind, what; then do, has, absent where they apply.
_ROWS: tuple[tuple[object, ...], ...] = (
    # The model.
    ("--num-layers", 1, "copied", "model.num_layers"),
    ("--hidden-size", 1, "copied", "model.hidden_size"),
    ("--num-attention-heads", 1, "copied", "model.num_attention_heads"),
    ("--ffn-hidden-size", 1, "copied", "model.ffn_hidden_size"),
    ("--kv-channels", 1, "copied", "model.head_dim"),
    ("--max-position-embeddings", 1, "copied", "model.max_sequence_length"),
    ("--norm-epsilon", 1, "copied", "model.norm_epsilon"),
    ("--init-method-std", 1, "copied", "model.init_std"),
    ("--rotary-base", 1, "copied", "model.rope_base"),
    ("--group-query-attention", 0, "translated", "model.num_query_groups"),
    ("--num-query-groups", 1, "translated", "model.num_query_groups"),
    ("--untie-embeddings-and-output-weights", 0, "translated", "model.tie_embeddings"),
    ("--add-qkv-bias", 0, "translated", "model.qkv_bias"),
    ("--disable-bias-linear", 0, "translated", "model.qkv_bias"),
    ("--attention-dropout", 1, "translated", "model.dropout"),
    ("--hidden-dropout", 1, "translated", "model.dropout"),
    ("--vocab-size", 1, "translated", "model.vocab_size, padded"),
    ("--padded-vocab-size", 1, "translated", "model.vocab_size"),
    ("--make-vocab-size-divisible-by", 1, "translated", "model.vocab_size, times the tensor-parallel ranks"),
    ("--normalization", 1, "fixed", "the model has RMSNorm", "expect another model than the command's", ("RMSNorm",), "LayerNorm"),
    ("--position-embedding-type", 1, "fixed", "the model has RoPE", "expect another model than the command's", ("rope",), "learned_absolute"),
    ("--swiglu", 0, "fixed", "the model has SwiGLU, a third matrix in every MLP", "expect more parameters, or take two thirds of model.ffn_hidden_size", ("",), "GELU"),
    ("--use-rotary-position-embeddings", 0, "idle", "the model has RoPE"),
    ("--no-position-embedding", 0, "idle", "the model has no learned positions"),
    ("--rotary-percent", 1, "fixed", "RoPE turns every channel of a head", "expect another model than the command's", ("1.0", "1", "1.")),
    ("--rotary-interleaved", 0, "lost", "RoPE turns pairs of distant channels", "convert checkpoints that need it"),
    ("--rotary-seq-len-interpolation-factor", 1, "fixed", "RoPE is stretched by model.rope_scaling", "model.rope_scaling: {kind: linear, factor: ...}", ("1",)),
    ("--use-rope-scaling", 0, "lost", "RoPE is scaled by model.rope_scaling", "model.rope_scaling: {kind: llama3, ...}"),
    ("--rope-scaling-factor", 1, "lost", "RoPE is scaled by model.rope_scaling", "factor in model.rope_scaling"),
    ("--rope-type", 1, "fixed", "the model has plain RoPE", "expect another model than the command's", ("rope",)),
    ("--apply-layernorm-1p", 0, "idle", "stores the same weight less 1; no decay falls on norms here"),
    ("--qk-layernorm", 0, "translated", "model.qk_norm"),
    ("--attention-softmax-in-fp32", 0, "idle", "softmax is in fp32 anyway"),
    ("--apply-query-key-layer-scaling", 0, "idle", "a numerical aid for fp16"),
    ("--no-query-key-layer-scaling", 0, "idle", "a numerical aid for fp16"),
    ("--apply-residual-connection-post-layernorm", 0, "lost", "residuals are taken before the norm", "expect another model"),
    ("--fp32-residual-connection", 0, "lost", "residuals are in the precision of training", "train.precision: fp32"),
    ("--embedding-init-method-std", 1, "lost", "embeddings begin with model.init_std", "one standard deviation for all"),
    ("--init-method-xavier-uniform", 0, "lost", "weights begin normally distributed", "set model.init_std"),
    ("--openai-gelu", 0, "lost", "the model has SwiGLU", "expect another model than the command's"),
    ("--squared-relu", 0, "lost", "the model has SwiGLU", "expect another model than the command's"),
    ("--quick-geglu", 0, "lost", "the model has SwiGLU", "expect another model than the command's"),
    ("--window-size", MANY, "lost", "attention is over the whole sample", "expect another model than the command's"),
    ("--window-attn-skip-freq", 1, "lost", "attention is over the whole sample", "expect another model"),
    ("--softmax-scale", 1, "lost", "scores are divided by the root of a head's channels", "expect another model"),
    ("--multi-latent-attention", 0, "lost", _ELSE, "use Megatron-LM for it"),
    ("--q-lora-rank", 1, "lost", _ELSE, "use Megatron-LM for it"),
    ("--kv-lora-rank", 1, "lost", _ELSE, "use Megatron-LM for it"),
    ("--qk-head-dim", 1, "lost", _ELSE, "use Megatron-LM for it"),
    ("--qk-pos-emb-head-dim", 1, "lost", _ELSE, "use Megatron-LM for it"),
    ("--v-head-dim", 1, "lost", _ELSE, "use Megatron-LM for it"),
    ("--is-hybrid-model", 0, "lost", _ELSE, "use Megatron-LM for it"),
    ("--num-experts", 1, "translated", "model.experts.number"),
    ("--moe-router-topk", 1, "translated", "model.experts.top_k"),
    ("--moe-router-load-balancing-type", MANY, "translated", "model.experts.balance"),
    ("--moe-aux-loss-coeff", MANY, "translated", "model.experts.balance_coefficient"),
    ("--moe-z-loss-coeff", 1, "translated", "model.experts.router_z_loss"),
    ("--moe-ffn-hidden-size", 1, "translated", "model.ffn_hidden_size"),
    ("--moe-shared-expert-intermediate-size", 1, "translated", "model.experts.shared_ffn_hidden_size"),
    ("--moe-token-dispatcher-type", 1, "translated", "parallel.expert_dispatcher"),
    ("--moe-grouped-gemm", 0, "idle", _KERNEL),
    ("--moe-permute-fusion", 0, "idle", _KERNEL),
    ("--moe-per-layer-logging", 0, "idle", _SHOWN),
    ("--use-mcore-models", 0, "idle", "the model is Megatron-Core's"),
    ("--use-legacy-models", 0, "lost", "the model is Megatron-Core's", "none; checkpoints differ"),
    ("--transformer-impl", 1, "translated", "backends.layers"),
    ("--spec", MANY, "lost", "the layers are this package's", "set backends.layers"),
    # Data.
    ("--seq-length", 1, "copied", "data.sequence_length"),
    ("--data-path", MANY, "translated", "data.sources, curriculum.0.mixture"),
    ("--train-data-path", MANY, "translated", "data.sources, curriculum.0.mixture"),
    ("--valid-data-path", MANY, "translated", "data.validation"),
    ("--test-data-path", MANY, "lost", "there is no test set beside data.validation", "add it to data.validation"),
    ("--split", 1, "translated", "nothing, if all is for training"),
    ("--data-args-path", 1, "lost", "the file is not read", _SHARDS),
    ("--per-split-data-args-path", 1, "lost", "the file is not read", _SHARDS),
    ("--mock-data", 0, "lost", "there is no mock data; the source's path is to be filled in", _SHARDS),
    ("--data-cache-path", 1, "idle", "the order of windows is computed and has no cache"),
    ("--data-impl", 1, "fixed", "sources are memory-mapped Megatron datasets", _SHARDS, ("mmap",)),
    ("--no-mmap-bin-files", 0, "idle", "how files are read; not a setting here"),
    ("--mmap-warmup", 0, "idle", "how files are read; not a setting here"),
    ("--num-workers", 1, "idle", "data.loader has settings of its own"),
    ("--num-dataset-builder-threads", 1, "idle", "there is nothing to build"),
    ("--dataloader-type", 1, "fixed", "windows come in one computed order", "none is needed", ("single",)),
    ("--reset-attention-mask", 0, "translated", "curriculum.0.transforms.document_mask"),
    ("--reset-position-ids", 0, "translated", "curriculum.0.transforms.reset_positions"),
    ("--eod-mask-loss", 0, "translated", "curriculum.0.transforms.document_mask, with --reset-attention-mask"),
    ("--dataloader-inter-document-masking", 0, "lost", "said otherwise here", "curriculum.0.transforms.document_mask: true"),
    ("--no-create-attention-mask-in-dataloader", 0, "idle", "no S x S mask is made"),
    ("--fim-data", 0, "lost", "it needs the sources named", "curriculum.0.transforms.fill_in_the_middle"),
    ("--tokenizer-type", 1, "translated", "data.tokenizer, model.vocab_size"),
    ("--tokenizer-model", 1, "translated", "data.tokenizer"),
    ("--vocab-file", 1, "lost", "a tokenizer is a folder with tokenizer.json", "make one of it; set data.tokenizer"),
    ("--merge-file", 1, "lost", "a tokenizer is a folder with tokenizer.json", "make one of it; set data.tokenizer"),
    ("--tiktoken-pattern", 1, "lost", "a tokenizer is a folder with tokenizer.json", "set data.tokenizer"),
    ("--vocab-extra-ids", 1, "lost", "the tokenizer has its own added tokens", "count them in --vocab-size"),
    # The curriculum.
    ("--micro-batch-size", 1, "copied", "train.micro_batch_size"),
    ("--global-batch-size", 1, "translated", "curriculum.*.global_batch_size"),
    ("--rampup-batch-size", 3, "translated", "curriculum.*.global_batch_size, as phases"),
    ("--step-batch-size-schedule", MANY, "translated", "curriculum.*.global_batch_size, as phases"),
    ("--decrease-batch-size-if-needed", 0, "lost", "a batch that does not divide is an error", "choose the size"),
    ("--train-iters", 1, "translated", "curriculum.*.tokens"),
    ("--train-samples", 1, "translated", "curriculum.*.tokens"),
    ("--lr", 1, "translated", "curriculum.*.learning_rate.peak"),
    ("--min-lr", 1, "translated", "curriculum.*.learning_rate.end"),
    ("--lr-decay-style", 1, "translated", "curriculum.*.learning_rate.shape"),
    ("--lr-decay-iters", 1, "translated", "curriculum.*.tokens: where a stage ends"),
    ("--lr-decay-samples", 1, "translated", "curriculum.*.tokens: where a stage ends"),
    ("--lr-warmup-iters", 1, "translated", "curriculum.0.learning_rate.warmup_steps"),
    ("--lr-warmup-samples", 1, "translated", "curriculum.0.learning_rate.warmup_steps"),
    ("--lr-warmup-fraction", 1, "translated", "curriculum.0.learning_rate.warmup_steps"),
    ("--lr-warmup-init", 1, "translated", "curriculum.0.learning_rate.warmup_from"),
    ("--lr-wsd-decay-style", 1, "translated", "curriculum.*.learning_rate.shape"),
    ("--lr-wsd-decay-iters", 1, "translated", "curriculum.*.tokens: where a stage ends"),
    ("--lr-wsd-decay-samples", 1, "translated", "curriculum.*.tokens: where a stage ends"),
    ("--decoupled-lr", 1, "lost", "embedding and output have the learning rate of all", "choose one learning rate"),
    ("--decoupled-min-lr", 1, "lost", "embedding and output have the learning rate of all", "choose one learning rate"),
    ("--override-opt_param-scheduler", 0, "idle", "the schedule is always the configuration's"),
    ("--override-opt-param-scheduler", 0, "idle", "the schedule is always the configuration's"),
    ("--use-checkpoint-opt_param-scheduler", 0, "lost", "the schedule is always the configuration's", "write it down"),
    ("--use-checkpoint-opt-param-scheduler", 0, "lost", "the schedule is always the configuration's", "write it down"),
    # The optimizer.
    ("--optimizer", 1, "fixed", "AdamW is written, or Muon", "expect another optimizer than the command's", ("adam", "muon", "dist_muon")),
    ("--muon-momentum", 1, "translated", "optimizer.muon.momentum"),
    ("--muon-use-nesterov", 0, "translated", "optimizer.muon.nesterov"),
    ("--muon-num-ns-steps", 1, "translated", "optimizer.muon.rounds"),
    ("--muon-extra-scale-factor", 1, "translated", "optimizer.muon.update_rms"),
    ("--muon-scale-mode", 1, "fixed", "updates are scaled by the root of the longer side",
     "choose optimizer.muon.update_rms and the learning rate anew", ("spectral",)),
    ("--muon-tp-mode", 1, "fixed", "parts of a matrix are orthogonalised as the whole that they are",
     "none: steps depend on the layout by rounding alone", ("duplicated", "distributed")),
    ("--muon-no-split-qkv", 0, "lost", "queries, keys and values are orthogonalised each by themselves", "none"),
    ("--muon-fp32-matmul-prec", 1, "idle", "matrices are orthogonalised in bf16 on GPUs"),
    ("--use-layer-wise-distributed-optimizer", 0, "translated", "parallel.distributed_optimizer"),
    ("--weight-decay", 1, "copied", "optimizer.weight_decay"),
    ("--adam-beta1", 1, "copied", "optimizer.beta1"),
    ("--adam-beta2", 1, "copied", "optimizer.beta2"),
    ("--adam-eps", 1, "copied", "optimizer.epsilon"),
    ("--clip-grad", 1, "copied", "optimizer.clip_grad_norm"),
    ("--start-weight-decay", 1, "lost", "weight decay is constant", "set optimizer.weight_decay"),
    ("--end-weight-decay", 1, "lost", "weight decay is constant", "set optimizer.weight_decay"),
    ("--weight-decay-incr-style", 1, "fixed", "weight decay is constant", "set optimizer.weight_decay", ("constant",)),
    ("--use-distributed-optimizer", 0, "translated", "parallel.distributed_optimizer"),
    ("--use-precision-aware-optimizer", 0, "lost", "state in dtypes that other flags name; ours are fp32 and 8 bits",
     "for less memory set optimizer.moments: fp8"),
    ("--main-params-dtype", 1, "fixed", "main weights are fp32", "none", ("fp32",)),
    ("--main-grads-dtype", 1, "fixed", "gradients are summed in fp32", "none: sums are more exact", ("fp32",)),
    ("--exp-avg-dtype", 1, "fixed", "moments are fp32 or 8 bits", "for less memory set optimizer.moments: fp8", ("fp32",)),
    ("--exp-avg-sq-dtype", 1, "fixed", "moments are fp32 or 8 bits", "for less memory set optimizer.moments: fp8", ("fp32",)),
    ("--optimizer-cpu-offload", 0, "translated", "optimizer.cpu_offload"),
    ("--optimizer-offload-fraction", 1, "translated", "optimizer.cpu_offload"),
    # Precision.
    ("--bf16", 0, "translated", "train.precision"),
    ("--fp16", 0, "lost", "there is no fp16; bf16 is written", "none: bf16 has fp32's range and needs no loss scale"),
    ("--loss-scale", 1, "idle", "bf16 needs no loss scale"),
    ("--initial-loss-scale", 1, "idle", "bf16 needs no loss scale"),
    ("--min-loss-scale", 1, "idle", "bf16 needs no loss scale"),
    ("--loss-scale-window", 1, "idle", "bf16 needs no loss scale"),
    ("--hysteresis", 1, "idle", "bf16 needs no loss scale"),
    ("--accumulate-allreduce-grads-in-fp32", 0, "idle", "gradients are summed in fp32 anyway"),
    ("--grad-reduce-in-bf16", 0, "lost", "gradients are summed in fp32", "none: sums are more exact, messages longer"),
    ("--fp8-format", 1, "translated", "train.low_precision.recipe, which decides it"),
    ("--fp8-recipe", 1, "translated", "train.low_precision.recipe"),
    ("--fp8-param-gather", 0, "translated", "train.low_precision.parameters"),
    ("--fp8-amax-history-len", 1, "translated", "train.low_precision.amax_history"),
    ("--fp8-amax-compute-algo", 1, "translated", "train.low_precision.amax_history"),
    ("--fp4-format", 1, "translated", "train.low_precision.recipe, which decides it"),
    ("--fp4-recipe", 1, "translated", "train.low_precision.recipe"),
    ("--first-last-layers-bf16", 0, "translated", "train.low_precision.keep_first_layers and keep_last_layers"),
    ("--num-layers-at-start-in-bf16", 1, "translated", "train.low_precision.keep_first_layers"),
    ("--num-layers-at-end-in-bf16", 1, "translated", "train.low_precision.keep_last_layers"),
    ("--calculate-per-token-loss", 0, "idle", "the loss is per token anyway"),
    ("--check-for-nan-in-loss-and-grad", 0, "idle", "a step whose gradient is not finite is seen anyway"),
    ("--no-check-for-nan-in-loss-and-grad", 0, "idle", "a step whose gradient is not finite is seen anyway"),
    ("--deterministic-mode", 0, "translated", "train.deterministic"),
    # The layout.
    ("--tensor-model-parallel-size", 1, "copied", "parallel.tensor"),
    ("--pipeline-model-parallel-size", 1, "copied", "parallel.pipeline"),
    ("--context-parallel-size", 1, "copied", "parallel.context"),
    ("--sequence-parallel", 0, "translated", "parallel.sequence"),
    ("--overlap-grad-reduce", 0, "translated", "parallel.overlap_gradient_reduce"),
    ("--overlap-param-gather", 0, "translated", "parallel.overlap_parameter_gather"),
    ("--tp-comm-overlap", 0, "translated", "parallel.overlap_tensor"),
    ("--num-distributed-optimizer-instances", 1, "translated", "parallel.optimizer_instances"),
    ("--distributed-timeout-minutes", 1, "translated", "parallel.timeout_seconds"),
    ("--distributed-backend", 1, "idle", "NCCL on GPUs, gloo on CPUs"),
    ("--num-layers-per-virtual-pipeline-stage", 1, "translated", "parallel.virtual_pipeline"),
    ("--num-virtual-stages-per-pipeline-rank", 1, "translated", "parallel.virtual_pipeline"),
    ("--pipeline-model-parallel-layout", 1, "lost", "layers are dealt by their numbers", "parallel.pipeline_layers"),
    ("--no-overlap-p2p-communication", 0, "idle", _FASTER),
    ("--decoder-first-pipeline-num-layers", 1, "translated", "parallel.pipeline_layers"),
    ("--decoder-last-pipeline-num-layers", 1, "translated", "parallel.pipeline_layers"),
    ("--expert-model-parallel-size", 1, "translated", "parallel.expert"),
    ("--expert-tensor-parallel-size", 1, "translated", "parallel.expert_tensor"),
    ("--use-torch-fsdp2", 0, "lost", "parameters are not sharded over data parallel ranks", "parallel.distributed_optimizer"),
    ("--use-megatron-fsdp", 0, "lost", "parameters are not sharded over data parallel ranks", "parallel.distributed_optimizer"),
    ("--data-parallel-sharding-strategy", 1, "lost", "parameters are not sharded over data parallel ranks", "parallel.distributed_optimizer"),
    ("--DDP-impl", 1, "idle", "gradients are summed by Megatron-Core's DistributedDataParallel"),
    ("--cp-comm-type", MANY, "idle", "keys and values are gathered"),
    ("--use-tp-pp-dp-mapping", 0, "lost", "ranks are laid out in one order", "none: results are the same"),
    # Memory and kernels.
    ("--recompute-activations", 0, "translated", "train.recompute.granularity: selective"),
    ("--recompute-granularity", 1, "translated", "train.recompute.granularity"),
    ("--recompute-method", 1, "translated", "train.recompute.method"),
    ("--recompute-num-layers", 1, "translated", "train.recompute.layers"),
    ("--recompute-modules", MANY, "translated", "train.recompute.modules"),
    ("--activations-checkpoint-method", 1, "lost", _MEMORY, _FITS),
    ("--checkpoint-activations", 0, "lost", _MEMORY, _FITS),
    ("--attention-backend", 1, "idle", _KERNEL),
    ("--use-flash-attn", 0, "idle", _KERNEL),
    ("--no-masked-softmax-fusion", 0, "idle", _KERNEL),
    ("--no-bias-gelu-fusion", 0, "idle", _KERNEL),
    ("--no-bias-swiglu-fusion", 0, "idle", _KERNEL),
    ("--no-bias-dropout-fusion", 0, "idle", _KERNEL),
    ("--no-rope-fusion", 0, "idle", _KERNEL),
    ("--no-persist-layer-norm", 0, "idle", _KERNEL),
    ("--no-gradient-accumulation-fusion", 0, "idle", _KERNEL),
    ("--cross-entropy-loss-fusion", 0, "idle", _KERNEL),
    ("--cross-entropy-fusion-impl", 1, "idle", _KERNEL),
    ("--use-cpu-initialization", 0, "idle", "initial weights do not depend on the layout here"),
    ("--manual-gc", 0, "idle", _FASTER),
    ("--manual-gc-interval", 1, "idle", _FASTER),
    ("--empty-unused-memory-level", 1, "idle", _FASTER),
    # The run.
    ("--seed", 1, "copied", "run.seed"),
    ("--save", 1, "translated", "run.directory"),
    ("--load", 1, "translated", "run.directory: an existing run goes on"),
    ("--save-interval", 1, "copied", "checkpoint.every_steps"),
    ("--most-recent-k", 1, "translated", "checkpoint.keep"),
    ("--ckpt-format", 1, "fixed", "checkpoints are torch_dist", "none is needed", ("torch_dist",)),
    ("--use-dist-ckpt", 0, "idle", "checkpoints are torch_dist"),
    ("--ckpt-fully-parallel-save", 0, "idle", _FASTER),
    ("--ckpt-fully-parallel-load", 0, "idle", _FASTER),
    ("--ckpt-assume-constant-structure", 0, "idle", _FASTER),
    ("--async-save", 0, "idle", "checkpoints are written in the background anyway"),
    ("--auto-detect-ckpt-format", 0, "idle", "there is one format"),
    ("--exit-on-missing-checkpoint", 0, "lost", "a run directory without a run begins one", "look before you start"),
    ("--no-load-optim", 0, "lost", "a run goes on with all of its state", WEIGHTS),
    ("--no-load-rng", 0, "lost", "a run goes on with all of its state", WEIGHTS),
    ("--no-save-optim", 0, "lost", "checkpoints hold all of a run's state", "for the weights alone checkpoint.export_hf"),
    ("--no-save-rng", 0, "idle", "what is random follows from run.seed and the sample"),
    ("--ckpt-step", 1, "lost", "a run goes on from its newest checkpoint", "`davinci train --branch RUN@STEP`"),
    ("--finetune", 0, "lost", "weights to begin with are converted first", WEIGHTS),
    ("--pretrained-checkpoint", 1, "lost", "weights to begin with are converted first", WEIGHTS),
    ("--exit-interval", 1, "translated", "train.stop_after_steps"),
    ("--exit-duration-in-mins", 1, "lost", "a run does not watch the clock", "train.stop_after_steps, or stop it by a signal"),
    ("--exit-signal-handler", 0, "idle", "a signal ends a run with a checkpoint anyway"),
    ("--eval-interval", 1, "copied", "evaluation.every_steps"),
    ("--eval-iters", 1, "translated", "evaluation.sequences: times the global batch size"),
    ("--log-interval", 1, "copied", "logging.every_steps"),
    ("--tensorboard-dir", 1, "translated", "logging.tensorboard: events lie in the run directory"),
    ("--log-throughput", 0, "idle", _SHOWN),
    ("--timing-log-level", 1, "idle", _SHOWN),
    ("--log-params-norm", 0, "lost", "the norm of the weights is not recorded", "none"),
    ("--log-num-zeros-in-grad", 0, "lost", "zeros are not counted", "none"),
    ("--wandb-project", 1, "translated", "logging.wandb.project"),
    ("--wandb-exp-name", 1, "translated", "logging.wandb.name"),
    ("--wandb-entity", 1, "translated", "logging.wandb.entity"),
    ("--wandb-save-dir", 1, "idle", "files lie in the run directory"),
    ("--profile", 0, "lost", "steps are profiled by the section profile", "profile.steps"),
    ("--logging-level", 1, "idle", _SHOWN),
    ("--enable-experimental", 0, "idle", "permits other flags, which stand here by themselves"),
    ("--no-one-logger", 0, "idle", "nothing is sent anywhere"),
    ("--yaml-cfg", 1, "lost", "the file is not read", "write its settings as flags"),
    ("--use-checkpoint-args", 0, "lost", "a checkpoint's arguments are not read", "write them as flags"),
)  # fmt: skip

# What begins like this and has no row of its own.
_FAMILIES: tuple[tuple[str, Kind, str, str], ...] = (
    ("--moe-", "lost", "experts have no such setting", "read model.experts in docs/reference/configuration.md"),
    ("--expert-", "lost", "experts have no such setting", "read parallel in docs/reference/configuration.md"),
    ("--mtp-", "lost", _ELSE, "use Megatron-LM for it"),
    ("--mamba-", "lost", _ELSE, "use Megatron-LM for it"),
    ("--hybrid-", "lost", _ELSE, "use Megatron-LM for it"),
    ("--heterogeneous-", "lost", _ELSE, "use Megatron-LM for it"),
    ("--encoder-", "lost", _ELSE, "use Megatron-LM for it"),
    ("--fp8-", "lost", "of FP8 that is no setting", "compare train.low_precision"),
    ("--fp4-", "lost", "of FP4 that is no setting", "compare train.low_precision"),
    ("--fim-", "lost", "it needs the sources named", "curriculum.0.transforms.fill_in_the_middle"),
    ("--yarn-", "lost", "RoPE is not scaled", "raise model.rope_base"),
    ("--muon-", "lost", "Muon has no such setting here", "optimizer.muon has its own"),
    ("--lion-", "lost", "the optimizer is AdamW", "leave it out"),
    ("--sgd-", "lost", "the optimizer is AdamW", "leave it out"),
    ("--fsdp-", "lost", "parameters are not sharded over data parallel ranks", "parallel.distributed_optimizer"),
    ("--megatron-fsdp-", "lost", "parameters are not sharded over data parallel ranks", "parallel.distributed_optimizer"),
    ("--deepspeed", "lost", "DeepSpeed's", "compare parallel and train in docs/reference/configuration.md"),
    ("--zero-", "lost", "DeepSpeed's", "parallel.distributed_optimizer"),
    ("--dist-ckpt-", "idle", "how checkpoints are written and read; not a setting here", ""),
    ("--inprocess-", "lost", "a run that ends is started again by its launcher", "docs/concepts/faults.md"),
    ("--otel-", "idle", "nothing is sent anywhere", ""),
    ("--inference-", "lost", "for inference", "export the model; docs/recipes/export-to-hf.md"),
    ("--rl-", "lost", "for reinforcement learning", "use Megatron-LM for it"),
    ("--grpo-", "lost", "for reinforcement learning", "use Megatron-LM for it"),
    ("--cuda-graph-", "lost", "layers are captured whole", "train.cuda_graphs, if all steps are alike"),
    ("--tp-comm-", "lost", "no such setting", "none: results are the same"),
    ("--ddp-", "lost", "no such setting", "none: results are the same"),
    ("--profile-", "lost", "steps are profiled by the section profile", "profile.steps"),
    ("--pytorch-profiler-", "lost", "steps are profiled by the section profile", "profile.steps"),
    ("--wandb-", "lost", "there is no such setting", "set logging.wandb"),
    ("--tensorboard-", "idle", _SHOWN, ""),
    ("--log-", "idle", _SHOWN, ""),
    ("--one-logger-", "idle", "nothing is sent anywhere", ""),
)  # fmt: skip

ALIASES = {
    "--layernorm-epsilon": "--norm-epsilon",
    "--persistent-save-interval": "--save-interval",
}
"""Other names of flags, by those in the table."""

FLAGS: dict[str, Flag] = {str(row[0]): Flag(*row) for row in _ROWS}  # type: ignore[arg-type]
"""The table by name."""


def families() -> Iterator[Flag]:
    """Rows for all flags that begin alike."""
    for name, kind, what, do in _FAMILIES:
        yield Flag(name, MANY, kind, what, do)


def row(name: str) -> Flag | None:
    """The row of a flag, by its own name, an alias or its family; None if nobody knows it."""
    known = FLAGS.get(ALIASES.get(name, name))
    return known or next((family for family in families() if name.startswith(family.name)), None)


def launcher(name: str) -> Flag:
    """The row of a flag that stands before the training script."""
    return Flag(name, MANY, "idle", _LAUNCHER)


def table() -> str:
    """The table as Markdown, for docs/from-megatron-lm.md."""
    classes = {
        "copied": "carried over",
        "translated": "carried over",
        "idle": "no effect",
        "lost": "not carried over",
    }
    lines = ["| flag | | to, or why | do |", "|---|---|---|---|"]
    for flag in [*FLAGS.values(), *families()]:
        name = f"`{flag.name}{'...' if flag.name.endswith('-') else ''}`"
        name += "".join(f", `{other}`" for other, of in ALIASES.items() if of == flag.name)
        what = flag.what
        if flag.kind in ("copied", "translated"):
            key, separator, rest = what.partition(next((m for m in (":", ",") if m in what), "\0"))
            what = f"`{key}`{separator}{rest}" if "." in key else what
        if flag.kind == "fixed":
            has = ", ".join(f"`{value}`" for value in flag.has if value) or "with it"
            verdict = f"only {has}" if flag.has != ("",) else "no effect"
            what += f"; without the flag Megatron-LM has {flag.absent}" if flag.absent else ""
        else:
            verdict = classes[flag.kind]
        lines.append(f"| {name} | {verdict} | {what} | {flag.do} |")
    return "\n".join(lines)
