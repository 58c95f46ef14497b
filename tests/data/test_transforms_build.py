"""From a configuration to what its stages do to samples; and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_davinci.config import validate
from megatron_davinci.config.transform_checks import recorded
from megatron_davinci.data import Batches, Curriculum, Journal, MixRecord
from megatron_davinci.data.transforms import stage_transforms
from megatron_davinci.data.transforms.build import DocumentBegins
from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.planned import open_sources, pool_sizes, stage_record
from tests.tiny import LENGTH
from tests.transforming import (
    EOD,
    FILLING,
    FIRST_CHANGED,
    PREFIX,
    TRANSFORMS,
    by_hand,
    transformed_settings,
    write_documents,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("transforms")
    transformed_settings(root)
    return root


def configured(root, transforms=None, **sources):
    """The run's configuration; `sources` are changes of them."""
    settings = transformed_settings(root, transforms)
    for name, changes in sources.items():
        settings["data"]["sources"][name] = {**settings["data"]["sources"][name], **changes}
    return validate(settings, where="test")


def opened(config):
    sources = open_sources(config)
    schedule = Schedule(config.curriculum, LENGTH)
    pools = pool_sizes(config, sources)
    records = [stage_record(config, schedule, stage, pools) for stage in range(len(config.curriculum))]
    curriculum = Curriculum(
        {name: source.num_windows for name, source in sources.items()}, config.run.seed, records
    )
    return sources, curriculum


@pytest.mark.parametrize(
    "transforms",
    [
        {"prompt_loss_weight": 0.5},
        {"prompt_loss_weight": 1},
        {"metadata_prefix": {}},
        {"fill_in_the_middle": {**FILLING, "spm_fraction": 0}},
        {"fill_in_the_middle": FILLING, "document_mask": True},
        TRANSFORMS,
    ],
    ids=["prompt 0.5", "prompt 1", "metadata", "PSM", "PSM and SPM", "all"],
)
def test_samples_are_those_built_by_hand(root, transforms):
    config = configured(root, transforms)
    sources, curriculum = opened(config)
    ns = np.arange(FIRST_CHANGED, FIRST_CHANGED + 64)
    read = Batches(curriculum, sources).read(ns)
    plain, changed = stage_transforms(config, sources)
    assert plain is None
    found = changed.apply(curriculum, ns, read.tokens, read.loss_mask)
    cut = 0
    for row, n in enumerate(ns.tolist()):
        tokens, weights, more = by_hand(sources, curriculum, n, transforms, config.run.seed)
        assert found.tokens[row].tolist() == tokens
        assert found.weights[row].tolist() == weights
        cut += more
    assert found.cut == cut
    lengthens = {"metadata_prefix", "fill_in_the_middle"} & set(transforms)
    assert (cut > 0) == bool(lengthens) == changed.lengthens
    # Something was done: this is not how the samples were read.
    assert lengthens == set() or not np.array_equal(found.tokens, read.tokens)
    assert not np.array_equal(found.weights, read.loss_mask)


def test_nothing_is_built_where_nothing_is_to_be_done(root):
    config = configured(root, {"prompt_loss_weight": 0, "document_mask": True})
    assert stage_transforms(config, open_sources(config)) == [None, None]


def test_a_window_begins_a_document_where_the_file_says_so(root):
    config = configured(root)
    sources = open_sources(config)
    begins = DocumentBegins(sources, {"web": EOD})
    tokens = np.fromfile(root / "data" / "web" / "shard-00000.bin", np.uint16)
    found = [begins("web", window) for window in range(sources["web"].num_windows)]
    wanted = [w == 0 or tokens[w * LENGTH - 1] == EOD for w in range(len(found))]
    assert found == wanted and 0 < sum(found[1:]) < len(found) - 1


def test_sentinels_may_be_given_by_their_ids(root):
    names = ("prefix_token", "suffix_token", "middle_token")
    by_id = {**FILLING, **{name: PREFIX + k for k, name in enumerate(names)}}
    first, second = (configured(root, {"fill_in_the_middle": filling}) for filling in (FILLING, by_id))
    sources, curriculum = opened(first)
    ns = np.arange(FIRST_CHANGED, FIRST_CHANGED + 8)
    read = Batches(curriculum, sources).read(ns)
    named, numbered = (
        stage_transforms(config, sources)[1].apply(curriculum, ns, read.tokens, None)
        for config in (first, second)
    )
    assert np.array_equal(named.tokens, numbered.tokens)


# ---- the journal -----------------------------------------------------------------------------------------


def test_the_journal_says_what_is_done_to_samples(root, tmp_path):
    config = configured(root)
    plain, changed = (
        stage_record(config, Schedule(config.curriculum, LENGTH), stage, {}) for stage in range(2)
    )
    assert plain.transforms == {}
    assert changed.transforms == {
        "prompt_loss_weight": 0.5,
        "metadata_prefix": {"fraction": 0.75, "metadata": {"code": "U: c\n", "web": "U: w\n"}},
        "fill_in_the_middle": {**FILLING, "spm_fraction": 0.5},
    }
    journal = Journal.open(tmp_path / "journal.jsonl")
    journal.append(plain)
    journal.append(changed)
    assert Journal.open(tmp_path / "journal.jsonl").mixes == (plain, changed)
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert "transforms" not in lines[0] and lines[1]["transforms"] == changed.transforms


def test_sources_are_recorded_however_they_were_named(root):
    by_domain = {**FILLING, "sources": [], "domains": ["programs"]}
    config = configured(root, {"fill_in_the_middle": by_domain}, code={"domain": "programs"})
    found = recorded(config.curriculum[1], config.data)
    assert found == recorded(configured(root, {"fill_in_the_middle": FILLING}).curriculum[1], config.data)


def test_a_record_without_transforms_digests_as_it_did_before_there_were_any():
    journal = Journal.in_memory()
    journal.append(MixRecord(0, "a", {"web": "1"}))
    assert journal.digest() == "42bec091eed749c265328a49cd358eb7"


def test_a_record_of_other_transforms_is_another_record():
    journal = Journal.in_memory()
    journal.append(MixRecord(0, "a", {"web": "1"}))
    with pytest.raises(DataError, match="rewrite the past"):
        journal.append(MixRecord(0, "a", {"web": "1"}, {"document_mask": True}))
    with pytest.raises(DataError, match="A journal record is wrong"):
        MixRecord(0, "a", {"web": "1"}, ["document_mask"])


# ---- what is refused -------------------------------------------------------------------------------------


def filling(**changes):
    return {"fill_in_the_middle": {**FILLING, **changes}}


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ({"prompt_loss_weight": 1.1}, "prompt_loss_weight.*less than or equal to 1"),
        ({"prompt_loss_weight": -0.1}, "prompt_loss_weight.*greater than or equal to 0"),
        ({"prompt_loss_weight": 0.125}, "two decimals at most; found 0.125"),
        ({"prompt_loss_weight": True}, "should be a number"),
        ({"metadata_prefix": {"fraction": 0}}, "fraction.*greater than 0"),
        ({"metadata_prefix": {"share": 1}}, "unknown key"),
        (filling(rate=1.5), "rate.*less than or equal to 1"),
        (filling(sources=["cod"]), r"fill_in_the_middle.sources: unknown cod; there are code, qa, web"),
        (filling(domains=["prose"]), r"fill_in_the_middle.domains: unknown prose"),
        (filling(sources=[]), "needs `sources` or `domains`"),
        (filling(prefix_token=264), "prefix_token: 264 is not in the vocabulary; model.vocab_size is 264"),
        (filling(prefix_token=-1), "its name in the tokenizer, or its id; found -1"),
        (filling(prefix_token=""), "its name in the tokenizer, or its id"),
        (filling(prefix_token=FILLING["suffix_token"]), "have to differ"),
    ],
)
def test_the_configuration_refuses(root, transforms, message):
    with pytest.raises(ConfigError, match=message):
        configured(root, transforms)


def test_a_stage_that_mixes_none_of_the_sources_is_refused(root):
    settings = transformed_settings(root, filling())
    settings["curriculum"][1]["mixture"] = {"qa": 1, "code": 0}
    with pytest.raises(ConfigError, match="the stage mixes no source of code"):
        validate(settings, where="test")


def test_metadata_needs_a_tokenizer_and_some_source_that_has_it(root):
    settings = transformed_settings(root, {"metadata_prefix": {}})
    settings["data"]["tokenizer"] = None
    with pytest.raises(ConfigError, match="is not set, and metadata is text"):
        validate(settings, where="test")
    with pytest.raises(ConfigError, match="no source of the stage has metadata"):
        configured(root, {"metadata_prefix": {}}, web={"metadata": None}, code={"metadata": None})
    settings = transformed_settings(root, filling())
    settings["data"]["tokenizer"] = None
    with pytest.raises(ConfigError, match="has no id; give the id"):
        validate(settings, where="test")


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("<|fim|>", "A token is not in the vocabulary"),
        ("a", "a piece of ordinary text"),
        ("<|endoftext|>", "cannot mean two things"),
        (EOD, "cannot mean two things"),
        (PREFIX + 1, "cannot mean two things"),
    ],
)
def test_a_sentinel_is_a_token_of_its_own(root, token, message):
    config = configured(root, filling(prefix_token=token))
    with pytest.raises(ConfigError, match=message) as caught:
        stage_transforms(config, open_sources(config))
    assert "curriculum.1.transforms.fill_in_the_middle" in str(caught.value)


def test_metadata_leaves_room_for_text(root):
    with pytest.raises(ConfigError, match="at least 1 character"):
        configured(root, {"metadata_prefix": {}}, web={"metadata": ""})
    config = configured(root, {"metadata_prefix": {}}, web={"metadata": "x" * LENGTH})
    with pytest.raises(ConfigError, match="leave room for a document"):
        stage_transforms(config, open_sources(config))


def test_a_tokenizer_beyond_the_models_vocabulary_is_refused(root):
    settings = transformed_settings(root, {"metadata_prefix": {}})
    sources = open_sources(validate(settings, where="test"))
    settings["model"] = {**settings["model"], "vocab_size": 128}
    with pytest.raises(ConfigError, match="not in the model's vocabulary"):
        stage_transforms(validate(settings, where="test"), sources)
    settings = transformed_settings(root, filling())
    settings["model"] = {**settings["model"], "vocab_size": 258}
    config = validate(settings, where="test")
    with pytest.raises(ConfigError, match="A token is not in the vocabulary"):
        stage_transforms(config, sources)


def test_a_weight_for_prompts_that_nothing_names_is_refused(root):
    settings = transformed_settings(root, {"prompt_loss_weight": 0.5})
    settings["curriculum"][1]["mixture"] = {"code": 0.5, "web": 0.5, "qa": 0}
    config = validate(settings, where="test")
    with pytest.raises(ConfigError, match="no mask in code, web"):
        stage_transforms(config, open_sources(config))


@pytest.mark.parametrize("transforms", [{"metadata_prefix": {}}, filling()])
def test_sources_have_to_say_what_ends_a_document_and_mean_it(root, tmp_path, transforms):
    for eod_id, message in ((None, "no eod_id in the manifest of code"), (7, "do not end with the token")):
        folder = write_documents(tmp_path / str(eod_id) / "code", 0, eod_id=eod_id)
        config = configured(root, transforms, code={"path": str(folder)})
        with pytest.raises(DataError, match=message) as caught:
            stage_transforms(config, open_sources(config))
        assert f"curriculum.1.transforms.{next(iter(transforms))}" in str(caught.value)


@pytest.mark.parametrize("weight", [0, 0.5, 0.01, 0.99])
def test_the_largest_batches_of_today_are_counted_in_an_int32(root, weight):
    # Megatron-Core adds up weights in an int32: 4,096 sequences of 4,096 labels weigh at most 100 each.
    settings = transformed_settings(root, {"prompt_loss_weight": weight})
    settings["model"] = {**settings["model"], "max_sequence_length": 4096}
    settings["data"]["sequence_length"] = 4096
    settings["curriculum"][1]["global_batch_size"] = 4096
    config = validate(settings, where="test")
    full = config.curriculum[1].transforms.label_weights[1]
    assert full <= 100 and 4096 * 4096 * full <= np.iinfo(np.int32).max
    settings["curriculum"][1]["global_batch_size"] = [
        {"size": 4096, "steps": 1},
        {"size": 2**31 // 4096 // full + 1},
    ]
    with pytest.raises(ConfigError, match="Megatron-Core counts to 2,147,483,647") as caught:
        validate(settings, where="test")
    key = "transforms.prompt_loss_weight" if full > 1 else "global_batch_size"
    assert f"curriculum.1.{key}: " in str(caught.value)
