"""What is wrong with a Hugging Face folder is said by name, and nothing half-written is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_davinci.cli.convert_from_hf import import_model
from megatron_davinci.cli.convert_new import new_checkpoint
from megatron_davinci.cli.convert_to_hf import export
from megatron_davinci.convert.families import FAMILIES
from megatron_davinci.convert.hf_model import HFModel
from megatron_davinci.errors import CheckpointError, ConfigError, DataError
from megatron_davinci.train import checkpoint_files
from tests.cases import cases
from tests.convert import hf_models


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    hf_models.save(folder, "llama3", {"tie_word_embeddings": False})
    return folder


@pytest.fixture
def copy(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def edit(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not ...})
    )
    return folder


def retensor(folder: Path, change: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refused(kind: type[Exception], folder: Path, **options: Any) -> str:
    out = folder.parent / "ours"
    with pytest.raises(kind) as caught:
        import_model(folder, out, **options)
    assert not out.exists() and not list(folder.parent.glob(".*")), "nothing half-written"
    return str(caught.value)


def sizes(draw: Any) -> tuple[str, dict[str, Any]]:
    family = draw(st.sampled_from(["qwen2", "llama2", "qwen3", "mistral", "olmo2"]))
    groups, each, dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 5))
    changes: dict[str, Any] = {
        "num_attention_heads": groups * each,
        "num_key_value_heads": groups,
        "head_dim": dim,
        "hidden_size": groups * each * dim,
        "intermediate_size": draw(st.integers(1, 30)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(3, 200)),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_theta": draw(st.sampled_from([500.0, 10000.0, 1e6])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
    }
    if family in ("llama2", "qwen3", "olmo2"):
        changes["attention_bias"] = draw(st.booleans())
    scaling = draw(st.sampled_from([None, {"rope_type": "linear", "factor": 4.0}, hf_models.LLAMA3]))
    if scaling is not None:
        changes["rope_scaling"] = scaling
    return family, changes


@cases(12)
@given(drawn=st.composite(sizes)(), multiple=st.sampled_from([1, 2, 7, 128]))
def test_every_model_of_every_family_comes_back_to_the_bit(tmp_path_factory, drawn, multiple):
    family, changes = drawn
    folder = tmp_path_factory.mktemp("model")
    hf_models.save(folder / "hf", family, changes)
    import_model(folder / "hf", folder / "ours", vocab_multiple=multiple, verify=False)
    model = checkpoint_files.read(folder / "ours").manifest["model"]
    assert model["vocab_size"] % multiple == 0 and model["vocab_padding"] < multiple
    back = export(str(folder / "ours"), folder / "back", verify=False)
    expected, found = hf_models.weights(folder / "hf"), hf_models.weights(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    theirs, ours = (json.loads((one / "config.json").read_text()) for one in (folder / "hf", back))
    for key, value in changes.items():
        if key in ("rope_scaling", "rope_theta"):
            assert ours["rope_parameters"] == theirs["rope_parameters"]
        elif key in theirs:
            assert ours[key] == value == theirs[key], key
    shutil.rmtree(folder)


def test_an_architecture_that_is_not_supported_lists_those_that_are(copy):
    text = refused(ConfigError, edit(copy, model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"]))
    assert "'gpt_neox'" in text and "qwen3: Qwen3ForCausalLM" in text and "mistral" in text
    text = refused(ConfigError, edit(copy, model_type="olmo2", architectures=["OlmoForCausalLM"]))
    assert "['OlmoForCausalLM'], not Olmo2ForCausalLM" in text


def test_settings_that_cannot_be_built_are_all_listed(copy):
    text = refused(
        ConfigError,
        edit(
            copy,
            hidden_act="gelu",
            mlp_bias=True,
            rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
            intermediate_size=...,
        ),
    )
    for said in (
        "hidden_act: 'gelu'",
        "mlp_bias: True",
        "rope_type: 'yarn'",
        "intermediate_size: is not there",
    ):
        assert said in text
    edit(copy, hidden_act="silu", mlp_bias=False, rope_parameters=..., intermediate_size=40)
    assert "num_attention_heads (5)" in refused(ConfigError, edit(copy, num_attention_heads=5))


def test_code_in_the_folder_is_never_run(copy):
    mark = copy.parent / "it ran"
    (copy / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    text = refused(ConfigError, edit(copy, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}))
    assert "its own code, which is never run" in text and not mark.exists()


def test_quantised_weights(copy):
    text = refused(ConfigError, edit(copy, quantization_config={"quant_method": "fp8"}))
    assert "quantization_config: fp8" in text


def test_rope_by_kind_of_layer_is_not_taken_for_none(copy):
    by_kind = {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    text = refused(ConfigError, edit(copy, rope_parameters=by_kind))
    assert "rope_parameters: one for each kind of layer (full_attention), not one for all" in text


def test_more_layers_than_there_can_be(copy):
    text = refused(CheckpointError, edit(copy, num_hidden_layers=10**12))
    assert "missing: model.layers." in text and "of 1000000000000 layers" in text


def test_missing_extra_and_odd_tensors_are_named(copy):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.self_attn.k_proj.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(6)
        tensors["model.norm.weight"] = torch.ones(25)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)

    text = refused(CheckpointError, retensor(copy, change))
    assert "missing: model.layers.1.self_attn.k_proj.weight\n" in text
    assert "unexpected: model.layers.0.self_attn.q_norm.weight\n" in text
    assert "of another shape: model.norm.weight [25], not [24]\n" in text
    assert "inv_freq" not in text, "an old file's table of frequencies is no weight"


def test_a_mix_of_dtypes(copy):
    def half(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()

    text = refused(CheckpointError, retensor(copy, half))
    assert "bfloat16: 1 tensors, as model.norm.weight" in text and "--dtype float32" in text
    import_model(copy, copy.parent / "said", dtype="float32")

    def eighth(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)

    assert "float8_e4m3fn" in refused(CheckpointError, retensor(copy, eighth), dtype="float32")


def test_weights_too_large_for_a_dtype_and_weights_that_are_no_numbers(copy):
    def put(value: float) -> Any:
        return lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].view(-1)[:2].fill_(value)

    text = refused(CheckpointError, retensor(copy, put(-7e4)), dtype="float16", verify=False)
    assert (
        "model.layers.1.mlp.down_proj.weight: 2 values, the largest 7e+04" in text
        and "at most 6.55e+04" in text
    )
    import_model(copy, copy.parent / "wide", dtype="bfloat16", verify=False)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight: 2 values, the largest"):
        export(str(copy.parent / "wide"), copy.parent / "narrow", dtype="float16", verify=False)
    text = refused(CheckpointError, retensor(copy, put(float("nan"))))
    assert "down_proj.weight: 2 values are NaN or infinite" in text and "--skip-verify" in text
    import_model(copy, copy.parent / "as it is", dtype="float16", verify=False)


def test_settings_that_transformers_refuses_are_named(copy):
    text = refused(ConfigError, edit(copy, tie_word_embeddings="false"))
    assert "transformers does not take" in text and "tie_word_embeddings" in text


def test_a_bias_that_has_no_place_here(tmp_path):
    model = hf_models.build("llama2", {"attention_bias": True})
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.bias[3] = 0.5
    model.save_pretrained(tmp_path / "model")
    text = refused(CheckpointError, tmp_path / "model")
    assert "model.layers.1.self_attn.o_proj.bias is not zero" in text


def test_tied_embeddings_of_which_there_are_two(tmp_path):
    folder = tmp_path / "model"
    hf_models.save(folder, "qwen2")
    retensor(
        folder,
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    import_model(folder, tmp_path / "same")

    def other(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][7] += 1

    assert "lm_head.weight differs from model.embed_tokens.weight in rows 0 to 100" in refused(
        CheckpointError, retensor(folder, other)
    )


def test_what_others_import_beside_it_is_left_alone_and_what_a_killed_one_left_is_not(copy, tmp_path):
    left = tmp_path / "all" / ".one.partial" / "state"
    left.mkdir(parents=True)
    with new_checkpoint(tmp_path / "all" / "other") as other:
        (other / "state" / "weights").write_text("half")
        import_model(copy, tmp_path / "all" / "one", verify=False)
        assert (other / "state" / "weights").read_text() == "half"
        with pytest.raises(ConfigError, match="Another process is writing"):
            import_model(copy, tmp_path / "all" / "other", verify=False)
    with pytest.raises(ConfigError, match="is there already"):
        import_model(copy, tmp_path / "all" / "one", verify=False)
    checkpoint_files.read(tmp_path / "all" / "one")
    assert not left.exists() and not list((tmp_path / "all").glob(".*.lock"))


def test_a_download_that_was_interrupted(tmp_path):
    folder = tmp_path / "model"
    hf_models.build("llama2").save_pretrained(folder, max_shard_size="10KB")
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 2
    cut = folder / names[1]
    raw = cut.read_bytes()
    cut.write_bytes(raw[: len(raw) // 2])
    text = refused(CheckpointError, folder)
    assert "cut short" in text and names[1] in text and f"{len(raw):,} bytes" in text
    cut.rename(folder / f"{names[1]}.incomplete")
    text = refused(CheckpointError, folder)
    assert f"{names[1]}: missing, {names[1]}.incomplete is there" in text
    cut.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "Git LFS pointer" in refused(CheckpointError, folder)
    cut.write_bytes(raw)
    import_model(folder, tmp_path / "whole")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no safetensors file"),
        (b"\xff" * 100, "no safetensors file"),
        (b"\x02\0\0\0\0\0\0\0[]", "header"),
        (
            (70).to_bytes(8, "little")
            + b'{"model.norm.weight":{"dtype":"F32","shape":[9],"data_offsets":[0,8]}}',
            "model.norm.weight: 8 bytes for the shape [9] in F32",
        ),
    ],
)
def test_a_file_of_weights_that_is_none(copy, content, said):
    (copy / "model.safetensors").write_bytes(content)
    assert said in refused(CheckpointError, copy)


@pytest.mark.parametrize("whole", [True, False], ids=["shards are there", "shards are gone"])
def test_of_one_file_and_an_index_the_file_is_read_as_transformers_does(copy, tmp_path, whole):
    hf_models.build("llama3", {"tie_word_embeddings": False}, seed=1).save_pretrained(
        tmp_path / "old", max_shard_size="10KB"
    )
    for path in (tmp_path / "old").glob("model*"):
        if whole or path.suffix == ".json":
            shutil.copy(path, copy)
    expected = AutoModelForCausalLM.from_pretrained(copy).state_dict()
    tensors = HFModel.of(copy).tensors
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(tensors.read(name), expected[name])
    assert not whole or not torch.equal(expected[name], hf_models.weights(tmp_path / "old")[name])


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "."])
def test_an_index_that_leads_out_of_the_folder(copy, name):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert "outside of the folder" in refused(CheckpointError, copy)


def test_a_folder_where_a_file_of_weights_should_be(copy):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    (copy / "model-1.safetensors").mkdir()
    assert "model-1.safetensors: missing" in refused(CheckpointError, copy)


def test_pickled_weights_are_not_read(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "pickle can run any program" in refused(CheckpointError, copy)
    assert "no config.json" in refused(CheckpointError, copy.parent / "..")
    assert "no folder" in refused(CheckpointError, copy / "nowhere")


@pytest.mark.parametrize("given, window", [(32, 32), (..., 4096)], ids=["given", "transformers' own"])
def test_a_window_limits_the_length(copy, given, window):
    edit(
        copy,
        model_type="mistral",
        architectures=["MistralForCausalLM"],
        sliding_window=given,
        rope_parameters=...,
        max_position_embeddings=8192,
    )
    found = HFModel.of(copy)
    assert found.model["max_sequence_length"] == window and f"sliding_window ({window})" in found.left[0]


SAID = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "max_window_layers": 1},
        {"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["full_attention"] * 2},
        {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
        {"num_key_value_heads": None},
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "olmo2", "mistral"])
def test_what_config_json_does_not_say_is_what_transformers_takes(family, said):
    given = {"model_type": family, **SAID, **said}
    if family == "mistral" and None in said.values():
        given["num_key_value_heads"] = 64  # its class takes no null
    theirs = AutoConfig.for_model(**given)
    ours, _, problems = FAMILIES[family].model(given)
    assert not problems
    assert ours["num_query_groups"] == theirs.num_key_value_heads
    assert ours["head_dim"] in (None, getattr(theirs, "head_dim", None))
    assert ours["norm_epsilon"] == theirs.rms_norm_eps
    assert ours["tie_embeddings"] == theirs.tie_word_embeddings
    assert ours["rope_base"] == theirs.rope_parameters["rope_theta"]
    if family in ("qwen2", "qwen3", "mistral"):
        slides = family == "mistral" or "sliding_attention" in theirs.layer_types
        assert ours["max_sequence_length"] == (theirs.sliding_window if slides else 8192)


ROPE = {"rope_type": "default", "rope_theta": 5e5}
ORIGINAL = "original_max_position_embeddings"
WITHOUT = {key: value for key, value in hf_models.LLAMA3.items() if key != ORIGINAL}


@pytest.mark.parametrize(
    "said",
    [
        {"rope_parameters": ROPE, "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 2e4},
        {"rope_parameters": ROPE, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": ROPE, "rope_scaling": None, "rope_theta": 2e4},
        {"rope_scaling": WITHOUT | {ORIGINAL: 16}, ORIGINAL: 32},
        {"rope_scaling": WITHOUT},
        {"rope_parameters": WITHOUT | {"rope_theta": 300.0}},
    ],
)
def test_of_several_words_on_rope_those_hold_that_transformers_takes(said):
    config = {**SAID, "model_type": "llama", **said}
    theirs = AutoConfig.for_model(**json.loads(json.dumps(config))).rope_parameters
    ours, _, problems = FAMILIES["llama"].model(config)
    scaling = ours["rope_scaling"] or {"kind": "default"}
    assert not problems
    assert (ours["rope_base"], scaling["kind"]) == (theirs["rope_theta"], theirs["rope_type"])
    assert scaling.get("factor") == theirs.get("factor")
    assert scaling.get("original_max_sequence_length") == theirs.get(ORIGINAL)


def test_a_stretch_that_was_added_by_hand_is_not_passed_over():
    _, _, problems = FAMILIES["llama"].model({**SAID, "rope_scaling": WITHOUT, ORIGINAL: 32})
    assert problems == [f"rope_scaling.{ORIGINAL}: is not there"], "it is where transformers does not look"
    yarn = {"type": "yarn", "factor": 4.0, ORIGINAL: 32768}
    _, _, problems = FAMILIES["qwen2"].model({**SAID, "rope_parameters": ROPE, "rope_scaling": yarn})
    assert problems == ["rope_scaling.rope_type: 'yarn', not 'default', 'linear' or 'llama3'"]


# ---- tokens


def write_tokenizer(folder: Path, tokens: list[str]) -> Path:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(models.WordLevel({name: id_ for id_, name in enumerate(tokens)}, unk_token=tokens[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(tokens[0], special=True)])
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_that_is_larger_than_the_embedding(copy):
    write_tokenizer(copy, [f"t{n}" for n in range(105)])
    text = refused(ConfigError, copy)
    assert "ids up to 104" in text and "ids up to 100" in text
    # Extended, ids 101 to 104 would be tokens with rows that nobody has written.
    new = write_tokenizer(copy.parent / "new", [f"t{n}" for n in range(107)])
    assert "ids up to 104" in refused(ConfigError, copy, extend_with=new)


@pytest.mark.parametrize("how", ["mean", "normal", "subwords", "zeros"])
def test_a_vocabulary_is_extended(copy, tmp_path, how):
    # 99 tokens, 101 rows: two are spare. Three new tokens take both and one more.
    write_tokenizer(copy, [f"t{n}" for n in range(99)])
    new = write_tokenizer(tmp_path / "new", [f"t{n}" for n in range(99)] + ["x", "y", "z"])
    import_model(copy, tmp_path / "ours", extend_with=new, new_tokens=how, vocab_multiple=8)
    model = checkpoint_files.read(tmp_path / "ours").manifest["model"]
    assert (model["vocab_size"], model["vocab_padding"]) == (104, 2)
    found = hf_models.weights(export(str(tmp_path / "ours"), tmp_path / "back"))
    before = hf_models.weights(copy)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, now = before[name], found[name]
        assert now.shape == (102, 24) and torch.equal(now[:99], old[:99])
        mean = old[:99].mean(0)
        if how == "mean":
            torch.testing.assert_close(now[99:], mean.expand(3, 24))
        elif how == "zeros":
            assert not now[99:].any()
        elif how == "subwords":  # neither is in the old vocabulary: t0, its unknown token
            torch.testing.assert_close(now[99:], old[:1].expand(3, 24))
        else:
            assert (now[99:] - mean).abs().max() < 6 * old[:99].std(0).max()
            assert len(now[99:].unique(dim=0)) == 3


def test_new_tokens_without_a_tokenizer_that_has_them(copy, tmp_path):
    with pytest.raises(ConfigError, match="--extend-with"):
        import_model(copy, tmp_path / "ours", new_tokens="subwords")


def test_a_tokenizer_that_does_not_extend_the_models_own(copy, tmp_path):
    write_tokenizer(copy, ["a", "b", "c"])
    new = write_tokenizer(tmp_path / "new", ["a", "c", "b", "d"])
    text = refused(DataError, copy, extend_with=new)
    assert "'b': 1, now 2" in text
    assert "name a folder that has a tokenizer.json" in refused(
        DataError, copy, extend_with=tmp_path / "none"
    )
