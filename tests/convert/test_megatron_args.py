"""A launch command of Megatron-LM becomes a valid configuration; every flag of it ends in exactly one class."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.config import load_config
from megatron_davinci.convert import megatron_flags
from megatron_davinci.convert.megatron_args import import_megatron
from megatron_davinci.errors import ConfigError
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.plan import plan_run

COMMANDS = Path(__file__).parent / "commands"
BASE = {
    "--num-layers": "4", "--hidden-size": "256", "--num-attention-heads": "4", "--seq-length": "128",
    "--max-position-embeddings": "128", "--micro-batch-size": "2", "--global-batch-size": "8", "--train-iters": "100",
    "--lr": "1e-3", "--vocab-size": "1000", "--data-path": "/d/web_text_document", "--save": "/runs/a",
}  # fmt: skip
LLAMA = {
    "--normalization": "RMSNorm", "--swiglu": "", "--position-embedding-type": "rope", "--disable-bias-linear": "",
    "--attention-dropout": "0", "--hidden-dropout": "0", "--split": "100,0,0", "--most-recent-k": "3",
}  # fmt: skip


def translated(flags=None, *, without=(), vocab_size=None, **known):
    every = {name: value for name, value in (BASE | (flags or {})).items() if name not in without}
    text = "\n".join(f"{name} {value}" for name, value in every.items())
    return import_megatron(text, "args.sh", known, vocab_size)


def published(name, vocab_size=None):
    return import_megatron((COMMANDS / name).read_text(), name, {}, vocab_size)


def lost(result):
    return {
        entry.flag.split()[0] if "not given" not in entry.flag else entry.flag: entry for entry in result.lost
    }


def refusal(flags=None, **keywords) -> str:
    with pytest.raises(ConfigError) as caught:
        translated(flags, **keywords)
    assert caught.value.where == "args.sh"
    return str(caught.value)


# ---- what Megatron-LM publishes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "vocabulary", "parameters"),
    [
        ("llama3_8b.sh", None, 8_030_261_248),  # as Meta's weights have
        ("mistral_7b.sh", None, 7_241_732_096),  # as Mistral's have
        ("llama32_1b.sh", 128_256, 1_235_814_400),  # as Meta's have
        # GPT shapes with SwiGLU for GELU and RMSNorm for LayerNorm: h, layers, 4 h, vocabulary in closed form.
        ("gpt_345m.txt", None, 24 * (4 + 3 * 4) * 1024**2 + 24 * (3 + 2) * 1024 + 1024 + 50304 * 1024),
        ("gpt3_857m.sh", None, 24 * (4 + 3 * 4) * 1536**2 + 24 * (3 + 2) * 1536 + 1536 + 51200 * 1536),
        (
            "gpt3_175b_ramp.sh",
            None,
            96 * (4 + 3 * 4) * 12288**2 + 96 * (3 + 2) * 12288 + 12288 + 51200 * 12288,
        ),
    ],
)
def test_published_commands_translate(name, vocabulary, parameters, tmp_path):
    result = published(name, vocabulary)
    (tmp_path / "config.yaml").write_text(result.as_yaml())
    config = load_config(tmp_path / "config.yaml")
    assert config == result.config
    plan = plan_run(config, config.parallel.model_ranks)
    assert plan.parameters == config.model.parameters() == parameters


def test_what_llama3_8b_loses_is_what_is_not_here():
    result = published("llama3_8b.sh")
    assert {"--normalization", "--swiglu", "--position-embedding-type"} <= {
        e.flag.split()[0] for e in result.idle
    }
    assert set(lost(result)) == {
        "--decoupled-lr", "--decoupled-min-lr", "--grad-reduce-in-bf16", "--exit-duration-in-mins",
        "--mock-data", "--tiktoken-pattern",
        "--split", "--profile", "--profile-step-start", "--profile-step-end",
        "--most-recent-k (not given)",
    }  # fmt: skip
    assert all(entry.do for entry in result.lost)


def test_levers_go_over():
    result = published("llama3_8b.sh")
    low = result.config.train.low_precision
    assert (low.recipe, low.backend, low.parameters, low.amax_history) == (
        "delayed",
        "transformer_engine",
        True,
        1024,
    )
    assert result.config.parallel.overlap_parameter_gather
    flags = {
        "--recompute-granularity": "full", "--recompute-method": "block", "--recompute-num-layers": "2",
        "--qk-layernorm": "", "--deterministic-mode": "",
    }  # fmt: skip
    config = translated(flags).config
    assert config.train.recompute.model_dump(exclude={"modules"}) == {
        "granularity": "full",
        "method": "block",
        "layers": 2,
    }
    assert config.model.qk_norm and config.train.deterministic
    chosen = translated({"--recompute-granularity": "selective", "--recompute-modules": "mlp moe_act"})
    assert chosen.config.train.recompute.modules == ["mlp"]
    assert "moe_act cannot be recomputed alone" in str(chosen.lost)
    assert "uniform or block" in refusal({"--recompute-granularity": "full"})


def test_a_gpt_is_said_to_become_another_model():
    said = "\n".join(map(str, published("gpt_345m.txt").lost))
    for other in ("LayerNorm", "learned_absolute", "GELU", "--disable-bias-linear", "--fp16"):
        assert other in said


def test_the_ramp_of_gpt3_175b_is_megatron_cores_own():
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    stages = published("gpt3_175b_ramp.sh").config.curriculum
    ours, theirs = (
        Schedule(stages, 2048),
        RampupBatchsizeNumMicroBatchesCalculator(1536, 1, 1, False, 1, 16, 16, 5_859_375),
    )
    assert len(ours.segments) > 90
    for segment in ours.segments:
        for sample in (segment.first_sample, segment.end_sample - segment.batch):
            theirs.update(sample, consistency_check=False)
            assert theirs.get_current_global_batch_size() == segment.batch, sample
    assert 146_484_375 - 1536 < ours.total_samples <= 146_484_375


# ---- sections --------------------------------------------------------------------------------------------


def test_a_plain_command_carries_everything():
    result = translated(LLAMA)
    assert result.lost == []
    model, train = result.config.model, result.config.curriculum[0]
    assert (model.num_query_groups, model.head_dim, model.ffn_hidden_size) == (4, None, 640)
    assert (model.vocab_size, model.norm_epsilon, model.tie_embeddings) == (1024, 1e-5, True)
    assert (model.qkv_bias, model.dropout) == (False, 0.0)
    assert train.tokens == 100 * 8 * 128
    assert result.config.optimizer.beta2 == 0.999  # Megatron-LM's default, not ours
    assert result.config.train.precision == "fp32"
    assert str(result.config.run.directory) == "/runs/a"


MUON = {"--muon-momentum": "0.9", "--muon-num-ns-steps": "6", "--muon-extra-scale-factor": "0.2"}


def test_muon_is_muon_with_what_megatron_lm_leaves_out():
    result = translated(LLAMA | MUON | {"--optimizer": "dist_muon", "--muon-scale-mode": "spectral"})
    optimizer = result.config.optimizer
    assert (optimizer.kind, result.config.parallel.distributed_optimizer) == ("muon", True)
    assert optimizer.muon.model_dump() == {
        "momentum": 0.9, "nesterov": False, "rounds": 6, "update_rms": 0.2
    }  # fmt: skip
    assert [entry.flag for entry in result.lost] == ["(a part of --optimizer)"]

    flags = {"--optimizer": "muon", "--muon-use-nesterov": "", "--muon-scale-mode": "unit_rms_norm"}
    result = translated(LLAMA | flags | {"--tensor-model-parallel-size": "2", "--muon-no-split-qkv": ""})
    optimizer = result.config.optimizer
    assert (optimizer.kind, result.config.parallel.distributed_optimizer) == ("muon", False)
    assert (optimizer.muon.nesterov, optimizer.muon.update_rms) == (True, 1.0)
    assert {entry.flag for entry in result.lost} == {
        "(a part of --optimizer)", "--muon-scale-mode unit_rms_norm", "--muon-no-split-qkv",
        "--muon-tp-mode blockwise (not given)",
    }  # fmt: skip


def test_muons_flags_do_nothing_beside_adam():
    result = translated(LLAMA | MUON)
    assert (result.config.optimizer.kind, result.lost) == ("adamw", [])
    assert {entry.flag.split()[0] for entry in result.idle} >= set(MUON)


def test_flags_go_where_the_table_says():
    flags = {
        "--kv-channels": "32", "--ffn-hidden-size": "512", "--rotary-base": "500000", "--init-method-std": "0.01",
        "--layernorm-epsilon": "1e-6", "--group-query-attention": "", "--num-query-groups": "2", "--add-qkv-bias": "",
        "--untie-embeddings-and-output-weights": "", "--tensor-model-parallel-size": "2", "--sequence-parallel": "",
        "--pipeline-model-parallel-size": "2", "--context-parallel-size": "2", "--use-distributed-optimizer": "",
        "--overlap-grad-reduce": "", "--distributed-timeout-minutes": "5", "--bf16": "", "--seed": "7",
        "--save-interval": "50", "--eval-interval": "25", "--eval-iters": "3", "--log-interval": "2",
        "--weight-decay": "0.3", "--adam-beta1": "0.8", "--adam-beta2": "0.9", "--adam-eps": "1e-7",
        "--clip-grad": "2",
        "--tensorboard-dir": "tb", "--valid-data-path": "/d/held_text_document", "--exit-interval": "60",
        "--tokenizer-type": "HuggingFaceTokenizer", "--tokenizer-model": "/t", "--reset-attention-mask": "",
        "--reset-position-ids": "", "--eod-mask-loss": "", "--load": "/runs/a",
    }  # fmt: skip
    result = translated(LLAMA | flags)
    config = result.config
    assert result.lost == []
    assert config.model.model_dump() | {
        "head_dim": 32, "ffn_hidden_size": 512, "rope_base": 5e5, "init_std": 0.01, "norm_epsilon": 1e-6,
        "num_query_groups": 2, "qkv_bias": True, "tie_embeddings": False,
    } == config.model.model_dump()  # fmt: skip
    parallel = config.parallel
    assert (parallel.tensor, parallel.pipeline, parallel.context, parallel.sequence) == (2, 2, 2, True)
    assert (parallel.distributed_optimizer, parallel.overlap_gradient_reduce, parallel.timeout_seconds) == (
        True,
        True,
        300,
    )
    assert config.optimizer.model_dump(
        exclude={"kind", "muon", "no_weight_decay", "cpu_offload", "moments"}
    ) == {
        "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-7, "weight_decay": 0.3, "clip_grad_norm": 2.0
    }  # fmt: skip
    assert (config.run.seed, config.checkpoint.every_steps, config.checkpoint.keep) == (7, 50, 3)
    assert (config.evaluation.every_steps, config.evaluation.sequences) == (25, 3 * 8)
    assert (config.logging.every_steps, config.logging.tensorboard) == (2, True)
    assert (config.train.precision, config.train.micro_batch_size, config.train.stop_after_steps) == (
        "bf16",
        2,
        60,
    )
    assert (str(config.data.tokenizer), config.data.sequence_length) == ("/t", 128)
    assert {name: str(path) for name, path in config.data.validation.items()} == {
        "held": "/d/held_text_document"
    }
    transforms = config.curriculum[0].transforms
    assert (transforms.document_mask, transforms.reset_positions) == (True, True)


@pytest.mark.parametrize(
    ("vocabulary", "divisible", "tensor", "rows"),
    [(50257, 128, 1, 50304), (50257, 128, 4, 50688), (50304, 128, 1, 50304), (7, 1, 2, 8), (1, 128, 1, 128)],
)
def test_the_vocabulary_is_padded_as_megatron_lm_pads_it(vocabulary, divisible, tensor, rows):
    flags = {
        "--vocab-size": vocabulary,
        "--make-vocab-size-divisible-by": divisible,
        "--tensor-model-parallel-size": tensor,
    }
    assert translated(flags).config.model.vocab_size == rows


@pytest.mark.parametrize(
    ("words", "mixture"),
    [
        ("/a/x", {"x": "1"}),
        ("0.3 /a/x 0.7 /a/y", {"x": "0.3", "y": "0.7"}),
        ("30 /a/x_text_document 10 /b/x_text_document", {"x": "0.75", "x-2": "0.25"}),
        ("1 /a/x 2 /a/y", {"x": "1/3", "y": "2/3"}),
        ("1 /a/x 1 /a/y 2 /a/x", {"x": "0.75", "y": "0.25"}),
    ],
)
def test_weights_become_shares(words, mixture):
    result = translated(LLAMA | {"--data-path": words})
    assert (result.config.curriculum[0].mixture, result.lost) == (mixture, [])


def test_sources_without_weights_are_not_silently_equal():
    result = translated(LLAMA | {"--data-path": "/a/x /a/y"})
    assert sum(Fraction(share) for share in result.config.curriculum[0].mixture.values()) == 1
    assert "equal shares" in str(*result.lost)


@pytest.mark.parametrize(
    ("flags", "stages"),
    [
        ({}, [("main", 100, "linear", 1e-3, 0.0, 0)]),
        (
            {"--lr-decay-style": "constant", "--lr-warmup-iters": "7"},
            [("main", 100, "constant", 1e-3, None, 7)],
        ),
        (
            {
                "--lr-decay-style": "cosine",
                "--min-lr": "1e-4",
                "--lr-decay-iters": "60",
                "--lr-warmup-fraction": "0.1",
            },
            [("main", 60, "cosine", 1e-3, 1e-4, 6), ("end", 40, "constant", 1e-4, None, 0)],
        ),
        (
            {"--lr-decay-style": "WSD", "--lr-wsd-decay-style": "cosine", "--lr-wsd-decay-iters": "20"},
            [("stable", 80, "constant", 1e-3, None, 0), ("decay", 20, "cosine", 1e-3, 0.0, 0)],
        ),
        ({"--lr-decay-iters": "200"}, [("main", 100, "linear", 1e-3, 5e-4, 0)]),
    ],
)
def test_a_learning_rate_becomes_stages(flags, stages):
    result = translated(LLAMA | flags)
    found = [
        (s.name, s.tokens // (8 * 128), s.learning_rate.shape, s.learning_rate.peak, s.learning_rate.end,
         s.learning_rate.warmup_steps)
        for s in result.config.curriculum
    ]  # fmt: skip
    assert found == stages
    assert result.lost == []


def test_each_step_has_megatron_cores_learning_rate():
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    class Optimizer:
        param_groups = ({"max_lr": 1e-3, "min_lr": 1e-4},)

    result = translated(
        {
            "--lr-decay-style": "cosine",
            "--min-lr": "1e-4",
            "--lr-decay-iters": "80",
            "--lr-warmup-iters": "10",
        }
    )
    theirs = OptimizerParamScheduler(
        Optimizer(), init_lr=0.0, max_lr=1e-3, min_lr=1e-4, lr_warmup_steps=80, lr_decay_steps=640,
        lr_decay_style="cosine", start_wd=0, end_wd=0, wd_incr_steps=0, wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=False, wsd_decay_steps=None,
        lr_wsd_decay_style=None,
    )  # fmt: skip
    ours = Schedule(result.config.curriculum, 128)
    for step in range(100):
        # Theirs is asked after the step; the end of a stage is arrived at one step sooner here.
        theirs.num_steps = 8 * (step + 1)
        assert ours.at(8 * step).learning_rate == pytest.approx(theirs.get_lr({}), rel=0, abs=3e-5), step


# ---- contradictions and what is missing ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "without", "names"),
    [
        ({"--rampup-batch-size": "2 2 100"}, (), ["line 8: --train-iters", "line 13: --rampup-batch-size 2 2 100"]),
        ({"--train-samples": "800"}, (), ["--train-iters", "--train-samples", "exactly one"]),
        ({}, ("--train-iters",), ["--train-iters", "exactly one"]),
        ({"--lr-decay-samples": "800"}, (), ["--train-iters", "--lr-decay-samples"]),
        ({"--lr-warmup-samples": "8"}, (), ["--train-iters", "--lr-warmup-samples"]),
        ({"--lr-warmup-iters": "8", "--lr-warmup-fraction": "0.1"}, (), ["--lr-warmup-fraction"]),
        ({"--lr-warmup-iters": "100"}, (), ["--lr-warmup-iters", "shorter"]),
        ({"--min-lr": "1"}, (), ["--min-lr"]),
        ({"--bf16": "", "--fp16": ""}, (), ["--bf16", "--fp16"]),
        ({"--num-layers": "four"}, (), ["line 1: --num-layers four", "whole number"]),
        ({"--num-layers": "$LAYERS"}, (), ["$LAYERS is not known", "--set LAYERS=VALUE"]),
        ({"--hidden-size": ""}, (), ["--hidden-size", "a value"]),
        ({}, ("--hidden-size",), ["--hidden-size"]),
        ({}, ("--global-batch-size",), ["--global-batch-size"]),
        ({"--lr": "nan"}, (), ["--lr nan"]),
        ({"--split": "a,b"}, (), ["--split a,b"]),
        ({"--group-query-attention": ""}, (), ["--num-query-groups"]),
        ({"--tokenizer-type": "HuggingFaceTokenizer"}, ("--vocab-size",), ["--vocab-size N"]),
        ({"--step-batch-size-schedule": "0:4 1K:16"}, (), ["--step-batch-size-schedule", "--global-batch-size"]),
        ({"--tensor-model-parallel-size": "0"}, (), ["--tensor-model-parallel-size"]),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused_with_its_lines(flags, without, names):
    said = refusal(flags, without=without)
    for name in names:
        assert name in said


def test_all_problems_are_said_at_once():
    said = refusal({"--num-layers": "x", "--lr": "y", "--train-samples": "1"})
    assert all(name in said for name in ("--num-layers x", "--lr y", "--train-samples 1"))


@pytest.mark.parametrize(
    "text", ["", "echo hello\n", "python other.py --mode x\n", "torchrun pretrain_gpt.py\n"]
)
def test_no_command_is_refused(text):
    with pytest.raises(ConfigError, match="no launch command"):
        import_megatron(text, "run.sh")


def test_several_commands_are_refused():
    with pytest.raises(ConfigError, match="several") as caught:
        import_megatron("torchrun a.py --lr 1\ntorchrun a.py --lr 2\n", "run.sh")
    assert caught.value.found == "lines 1, 2"


# ---- nothing is lost -------------------------------------------------------------------------------------

BOOKABLE = [name for name, row in megatron_flags.FLAGS.items() if row.kind in ("fixed", "idle", "lost")]
FAMILIES = [family.name + "anything" for family in megatron_flags.families()]
names = st.one_of(
    st.sampled_from(BOOKABLE),
    st.sampled_from(FAMILIES),
    st.from_regex(r"--[a-z][a-z0-9-]{2,12}", fullmatch=True).filter(
        lambda name: megatron_flags.row(name) is None
    ),
)
values = st.lists(st.sampled_from(["1", "x", "0.5", "a/b", "-1"]), max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(names, values), max_size=12))
def test_every_flag_ends_in_exactly_one_class(extra):
    text = "\n".join([*(f"{n} {v}" for n, v in BASE.items()), *(" ".join((n, *v)) for n, v in extra)])
    result = import_megatron(text, "args.sh")
    booked = [*result.carried, *result.idle, *result.lost]
    given_ = Counter(n for n, _ in extra) + Counter(list(BASE))
    assert Counter(e.flag.split()[0] for e in booked if e.line and e.flag.startswith("--")) == given_
    unknown = {name for name, _ in extra if megatron_flags.row(name) is None}
    assert unknown <= set(lost(result)) | {e.flag.split()[0] for e in result.idle if "given again" in e.what}
    # A value that no flag takes is said as well.
    for name, listed in extra:
        row = megatron_flags.row(name)
        if row and row.values == 0:
            assert all(any(e.flag == value for e in result.lost) for value in listed)
    assert yaml.safe_load(result.as_yaml()) == result.settings


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"--num-layers-per-virtual-pipeline-stage": "1"}, {"parallel.virtual_pipeline": 2}),
        ({"--num-virtual-stages-per-pipeline-rank": "2"}, {"parallel.virtual_pipeline": 2}),
        ({"--decoder-first-pipeline-num-layers": "1"}, {"parallel.pipeline_layers": [1, 3]}),
        ({"--decoder-last-pipeline-num-layers": "1"}, {"parallel.pipeline_layers": [3, 1]}),
        ({"--qk-layernorm": ""}, {"model.qk_norm": True}),
        (
            {"--wandb-project": "p", "--wandb-exp-name": "n", "--wandb-entity": "e"},
            {"logging.wandb.project": "p", "logging.wandb.name": "n", "logging.wandb.entity": "e"},
        ),
    ],
)
def test_layouts_go_where_the_table_says(flags, expected):
    result = translated(LLAMA | {"--pipeline-model-parallel-size": "2"} | flags)
    assert result.lost == []
    for path, value in expected.items():
        found = result.config
        for name in path.split("."):
            found = getattr(found, name)
        assert found == value, path


def test_experts_come_over_with_what_balances_them():
    flags = {
        "--num-experts": "8", "--moe-router-topk": "2", "--moe-router-load-balancing-type": "seq_aux_loss",
        "--moe-aux-loss-coeff": "0.02", "--moe-z-loss-coeff": "1e-3", "--moe-ffn-hidden-size": "192",
        "--moe-shared-expert-intermediate-size": "96", "--moe-token-dispatcher-type": "alltoall",
        "--expert-model-parallel-size": "2", "--expert-tensor-parallel-size": "1", "--moe-grouped-gemm": "",
    }  # fmt: skip
    result = translated(LLAMA | flags)
    assert result.lost == []
    experts = result.config.model.experts
    assert experts.model_dump() | {
        "number": 8, "top_k": 2, "balance": "sequence", "balance_coefficient": 0.02, "router_z_loss": 1e-3,
        "shared_ffn_hidden_size": 96,
    } == experts.model_dump()  # fmt: skip
    parallel = result.config.parallel
    assert (parallel.expert, parallel.expert_tensor, parallel.expert_dispatcher) == (2, 1, "alltoall")
    assert result.config.model.ffn_hidden_size == 192
    unlike = translated(LLAMA | flags | {"--moe-router-pre-softmax": ""})
    assert set(lost(unlike)) == {"--moe-router-pre-softmax"}


def test_levers_that_contradict_the_layers_are_refused():
    pipeline = {"--pipeline-model-parallel-size": "2"}
    for flags in (
        {"--num-layers-per-virtual-pipeline-stage": "3"},
        {"--decoder-first-pipeline-num-layers": "5"},
        {"--num-layers-per-virtual-pipeline-stage": "1", "--num-virtual-stages-per-pipeline-rank": "2"},
    ):
        assert next(iter(flags)) in refusal(LLAMA | pipeline | flags)


def test_a_local_tokenizer_says_how_large_it_is(tmp_path):
    content = {"model": {"vocab": {"a": 0, "b": 1299}}, "added_tokens": [{"id": 1300, "content": "<eod>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    flags = {"--tokenizer-type": "HuggingFaceTokenizer", "--tokenizer-model": str(tmp_path)}
    result = translated(LLAMA | flags, without=["--vocab-size"])
    assert result.config.model.vocab_size == 1408 and result.lost == []
    assert str(result.config.data.tokenizer) == str(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    assert "--vocab-size N" in refusal(LLAMA | flags, without=["--vocab-size"])
    elsewhere = flags | {"--tokenizer-model": "meta-llama/Llama-3.1-8B"}
    assert "--vocab-size N" in refusal(LLAMA | elsewhere, without=["--vocab-size"])


def test_every_flag_that_the_table_carries_over_is_booked_by_the_translation():
    given_ = set()
    for name in ("llama3_8b.sh", "mistral_7b.sh", "gpt3_175b_ramp.sh", "gpt3_857m.sh"):
        given_ |= {entry.flag.split()[0] for entry in published(name).carried}
    for name, row in megatron_flags.FLAGS.items():
        if row.kind in ("copied", "translated") and name not in given_:
            result = None
            for value in ("1", "linear", "x"):
                try:
                    text = "\n".join(
                        f"{n} {v}" for n, v in (BASE | {name: "" if row.values == 0 else value}).items()
                    )
                    result = import_megatron(text, "args.sh")
                    break
                except ConfigError as error:
                    assert name in str(error)  # noqa: PT017
            if result:
                entries = [
                    e for e in [*result.carried, *result.idle, *result.lost] if e.flag.split()[0] == name
                ]
                assert entries, name
                assert "nothing that it applies to" not in entries[0].what, name


@pytest.mark.parametrize("name", [n for n, row in megatron_flags.FLAGS.items() if row.kind == "copied"])
def test_copied_flags_name_a_key_of_the_configuration(name):
    section, key = megatron_flags.FLAGS[name].what.split(".")
    assert key in type(getattr(translated().config, section)).model_fields


def test_what_is_not_carried_over_is_in_the_yaml_as_comments():
    result = translated({"--frobnicate": "3", "--fp16": ""})
    comments = [line for line in result.as_yaml().splitlines() if line.startswith("#")]
    for entry in result.lost:
        assert sum(entry.what in line and entry.flag in line for line in comments) == 1
    assert "# - line 13: --frobnicate 3: not a flag that is known here" in result.as_yaml()


def test_a_near_name_is_suggested():
    assert "--hidden-dropout" in lost(translated({"--hiden-dropout": "0"}))["--hiden-dropout"].do


def test_a_later_flag_wins_as_it_does_in_argparse():
    result = import_megatron("\n".join([f"{n} {v}" for n, v in BASE.items()] + ["--num-layers=6"]), "args.sh")
    assert result.config.model.num_layers == 6
    (before,) = [entry for entry in result.idle if "--num-layers" in entry.flag]
    assert (before.line, "line 13" in before.what) == (1, True)


def test_the_documentation_has_the_table():
    page = (Path(__file__).parents[2] / "docs" / "from-megatron-lm.md").read_text("utf-8")
    assert megatron_flags.table() in page, "paste what megatron_flags.table() returns"
