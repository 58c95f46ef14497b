"""What levers that act on a GPU only say to Megatron-Core, and that they are refused where they would be ignored."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_davinci.config import validate
from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.platform.backends import choose_backends
from tests.config import small
from tests.ranks import run_ranks

SIZES = {"hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}


def config(**changes):
    changes.setdefault("train", {})
    changes["train"] = {"precision": "bf16", **changes["train"]}
    return validate(small.settings(model=SIZES, **changes), "test")


def said_to_megatron(changes):
    from megatron.core.optimizer import optimizer_config

    from megatron_davinci.model.build import transformer_config
    from megatron_davinci.optim import build
    from megatron_davinci.train import step

    made, settings = config(**changes), {}
    # Megatron-Core compares versions of a Transformer Engine that is not here.
    optimizer_config.is_te_min_version = lambda *_: True

    class DDP:
        config, params_with_grad, zero_grad_buffer = None, (), None

        def __init__(self, mcore, ddp, chunk, **_):
            settings.update({f"ddp.{name}": value for name, value in vars(ddp).items()})

    class Chunk:
        config = transformer_config(made, transformer_engine=True)

        def parameters(self):
            import torch

            yield torch.zeros(1)

        no_sync = start_grad_sync = None

    step.DistributedDataParallel = DDP
    DDP.no_sync = DDP.start_grad_sync = None
    step.wrap_model([Chunk()], made)
    build.choose_backends = lambda **_: choose_backends(on_cuda=False)
    build.get_megatron_optimizer = lambda mcore, *_, **__: settings.update(
        {f"optimizer.{name}": value for name, value in vars(mcore).items()}
    )
    build.build_optimizer(made, [Chunk()])
    settings.update({f"model.{name}": value for name, value in vars(Chunk.config).items()})
    return {name: str(value) for name, value in settings.items()}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"train": {"low_precision": {"recipe": "delayed", "amax_history": 16}}},
            {"model.fp8": "hybrid", "model.fp8_recipe": "delayed", "model.fp8_param": "False",
             "model.fp8_amax_history_len": "16", "model.fp8_amax_compute_algo": "max",
             "optimizer.fp8_recipe": "None"},
        ),
        (
            {"train": {"low_precision": {"recipe": "current", "parameters": True}}},
            {"model.fp8": "hybrid", "model.fp8_recipe": "tensorwise", "model.fp8_param": "True",
             "ddp.fp8_param_gather": "True", "optimizer.fp8_recipe": "tensorwise",
             "model.use_cpu_initialization": "False",
             "ddp.reuse_grad_buf_for_mxfp8_param_ag": "False"},
        ),
        (
            {"train": {"low_precision": {"recipe": "mxfp8", "parameters": True}, "micro_batch_size": 2}},
            {"model.fp8": "e4m3", "model.fp8_recipe": "mxfp8", "ddp.reuse_grad_buf_for_mxfp8_param_ag": "True",
             "optimizer.reuse_grad_buf_for_mxfp8_param_ag": "True"},
        ),
        ({"train": {"low_precision": {"recipe": "block"}}}, {"model.fp8": "e4m3", "model.fp8_recipe": "blockwise"}),
        (
            {"train": {"low_precision": {"recipe": "nvfp4", "keep_last_layers": 1}}},
            {"model.fp8": "None", "model.fp4": "e2m1", "model.fp4_recipe": "nvfp4",
             "model.first_last_layers_bf16": "True", "model.num_layers_at_start_in_bf16": "0",
             "model.num_layers_at_end_in_bf16": "1"},
        ),
        ({"train": {"cuda_graphs": True}}, {"model.cuda_graph_impl": "local", "model.cuda_graph_scope": "[]"}),
        ({"train": {"deterministic": True}}, {"model.deterministic_mode": "True"}),
        (
            {"parallel": {"tensor": 2, "sequence": True, "overlap_tensor": True}},
            {"model.tp_comm_overlap": "True"},
        ),
        (
            {"optimizer": {"cpu_offload": 0.5}},
            {"optimizer.optimizer_cpu_offload": "True", "optimizer.optimizer_offload_fraction": "0.5",
             "optimizer.use_precision_aware_optimizer": "True", "optimizer.overlap_cpu_optimizer_d2h_h2d": "True"},
        ),
        (
            {"parallel": {"overlap_gradient_reduce": True, "overlap_parameter_gather": True,
                          "optimizer_instances": 2}},
            {"ddp.overlap_param_gather": "True", "ddp.num_distributed_optimizer_instances": "2",
             "optimizer.overlap_param_gather": "True"},
        ),
        ({}, {"model.fp8": "None", "model.cuda_graph_impl": "none", "optimizer.optimizer_cpu_offload": "False"}),
    ],
)  # fmt: skip
def test_each_lever_is_said_in_megatron_cores_words(changes, expected):
    said = run_ranks(1, said_to_megatron, changes)[0]
    assert {name: said[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"train": {"low_precision": {"recipe": "current", "backend": "transformer_engine"}}},
            "train.low_precision.backend: transformer_engine acts in Transformer Engine's layers only",
        ),
        ({"train": {"cuda_graphs": True}}, "train.cuda_graphs acts on CUDA only"),
        (
            {"optimizer": {"cpu_offload": 1.0}},
            "optimizer.cpu_offload wants Transformer Engine, but the platform is cpu",
        ),
        (
            {"parallel": {"tensor": 2, "sequence": True, "overlap_tensor": True}},
            "parallel.overlap_tensor acts in",
        ),
    ],
)
def test_a_lever_that_would_be_ignored_here_is_an_error(changes, said):
    with pytest.raises(EnvironmentProblem, match=said):
        choose_backends(on_cuda=False, **config(**changes).backend_arguments())


def test_all_of_them_at_once():
    asked = config(
        train={"low_precision": {"recipe": "current", "parameters": True}, "cuda_graphs": True},
        optimizer={"cpu_offload": 1.0},
        backends={"optimizer": "apex"},
    )  # fmt: skip
    with pytest.raises(EnvironmentProblem) as caught:
        choose_backends(on_cuda=False, **asked.backend_arguments())
    assert len(str(caught.value.found).splitlines()) == 4


def test_deterministic_mode_sets_what_libraries_read():
    code = (
        "import os, torch; from megatron_davinci.platform.deterministic import be_deterministic; be_deterministic(); "
        "print(torch.are_deterministic_algorithms_enabled(), os.environ['CUBLAS_WORKSPACE_CONFIG'], "
        "os.environ['NCCL_ALGO'], os.environ['NVTE_ALLOW_NONDETERMINISTIC_ALGO'])"
    )
    environment = {**os.environ, "NCCL_ALGO": "Ring"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.stdout.split() == ["True", ":4096:8", "Ring", "0"], done.stderr


def tensor_overlap(changes, modern):
    import types

    from megatron_davinci.model.levers import start_tensor_overlap

    asked = {}
    base = types.ModuleType("transformer_engine.pytorch.module.base")
    base.initialize_ub = lambda **settings: asked.update(settings)
    if modern:
        base.UserBufferQuantizationMode = types.SimpleNamespace(NONE="none", FP8="fp8")
    module = types.ModuleType("transformer_engine.pytorch.module")
    module.base = base
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[module.__name__], sys.modules[base.__name__] = module, base
    start_tensor_overlap(config(**changes))
    return asked


def test_tensor_overlap_gives_transformer_engine_its_buffers():
    changes = {
        "parallel": {"tensor": 2, "sequence": True, "overlap_tensor": True},
        "train": {"micro_batch_size": 2},
    }
    expected = {"shape": [32, 64], "tp_size": 2, "bootstrap_backend": "nccl"}
    assert run_ranks(1, tensor_overlap, changes, True)[0] == {**expected, "quantization_modes": ["none"]}
    changes["train"]["low_precision"] = {"recipe": "current"}
    assert run_ranks(1, tensor_overlap, changes, False)[0] == {**expected, "use_fp8": True}
