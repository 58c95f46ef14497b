"""Sample transforms: what each does to a sample, by its number alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.data.transforms.draws import draws
from megatron_davinci.data.transforms.fill_in_the_middle import FillInTheMiddle, Sentinels
from megatron_davinci.data.transforms.metadata_prefix import MetadataPrefix
from megatron_davinci.data.transforms.pipeline import SampleTransforms
from megatron_davinci.data.transforms.prompt_weight import PromptWeight
from megatron_davinci.data.transforms.sample import Sample, documents
from tests.cases import cases

EOD = 9
P, S, M = Sentinels(prefix=20, suffix=21, middle=22)
# Ordinary tokens are 0 to 8, so that a sample has several documents, empty ones among them.
samples = st.lists(st.integers(0, EOD), min_size=2, max_size=40)


def sample(tokens, mask=None, n=5, source="code"):
    tokens = np.array(tokens, np.uint16)
    weights = np.ones(len(tokens), np.uint8) if mask is None else np.array([0, *mask], np.uint8)
    weights[0] = 0
    return Sample(n, source, window=3, tokens=tokens, weights=weights)


def marked(tokens):
    """A sample whose weights name their tokens (its first, which weighs 0, aside), to see whether they travel."""
    found = sample(tokens)
    return found._replace(weights=np.where(np.arange(len(tokens)), found.tokens + 100, 0).astype(np.uint8))


# ---- chance ----------------------------------------------------------------------------------------------


def test_draws_are_a_function_of_seed_name_and_number_for_good():
    # Pinned: a run that is resumed under another version of numpy draws the same.
    found = draws(7, "test", 123_456_789_012, 2)
    assert found.shape == (2, 4)
    assert found[0].tolist() == [
        0.5988629417600201,
        0.3157202534079704,
        0.8947881155512509,
        0.6254671576871589,
    ]
    assert np.array_equal(draws(7, "test", 123_456_789_012, 50)[:2], found)


@pytest.mark.parametrize("other", [(8, "test", 1), (7, "text", 1), (7, "test", 2), (7, "test", 2**62)])
def test_other_seeds_names_and_numbers_draw_otherwise(other):
    assert not np.isin(draws(*other, 64), draws(7, "test", 1, 64)).any()


def test_draws_are_uniform_across_things_and_across_samples():
    by_sample = np.concatenate([draws(1, "uniform", n, 1) for n in range(4000)])
    for found in (draws(1, "uniform", 0, 4000), by_sample):
        assert found.min() >= 0 and found.max() < 1
        counts = np.stack([np.histogram(column, 10, (0, 1))[0] for column in found.T])
        # Five standard deviations of a binomial count.
        assert np.abs(counts - 400).max() < 5 * np.sqrt(4000 * 0.1 * 0.9)
        assert np.abs(np.corrcoef(found.T) - np.eye(4)).max() < 5 / np.sqrt(4000)
        assert abs(np.corrcoef(found[1:, 0], found[:-1, 0])[0, 1]) < 5 / np.sqrt(4000)


# ---- prompts ---------------------------------------------------------------------------------------------


@given(samples, st.data(), st.sampled_from([(0, 1), (1, 2), (1, 1), (3, 4), (7, 100), (99, 100)]))
@cases(40)
def test_prompts_weigh_their_part_of_any_other_label(tokens, data, weights):
    prompt, full = weights
    mask = data.draw(st.lists(st.integers(0, 1), min_size=len(tokens) - 1, max_size=len(tokens) - 1))
    found = PromptWeight(prompt, full)(sample(tokens, mask))
    assert found.tokens.tolist() == tokens
    assert found.weights[1:].tolist() == [full if one else prompt for one in mask]
    assert found.weights[0] == 0 and found.full == full and found.weights.dtype == np.uint8
    assert bool(found.applied) == (0 in mask)


# ---- metadata --------------------------------------------------------------------------------------------


def prefixed(tokens, prefix, begins, fraction=1.0, n=5):
    transform = MetadataPrefix(
        {"code": np.array(prefix)}, {"code": EOD}, fraction, seed=1, begins=lambda source, window: begins
    )
    return transform(marked(tokens)._replace(n=n))


def test_metadata_stands_before_each_document_that_begins_here():
    tokens = [1, 2, EOD, 3, EOD, EOD, 4]
    goes_on = prefixed(tokens, [30, 31], begins=False)
    assert goes_on.tokens.tolist() == [1, 2, EOD, 30, 31, 3, EOD, 30, 31, EOD, 30, 31, 4]
    begins = prefixed(tokens, [30, 31], begins=True)
    assert begins.tokens.tolist() == [30, 31, *goes_on.tokens]
    # An end that is the sample's last token begins nothing.
    assert prefixed([1, EOD], [30], begins=False).tokens.tolist() == [1, EOD]


@given(samples, st.lists(st.integers(30, 40), min_size=1, max_size=4), st.booleans())
@cases(60)
def test_metadata_changes_nothing_else_and_is_never_a_label_with_loss(tokens, prefix, begins):
    found = prefixed(tokens, prefix, begins)
    added = found.tokens >= 30
    assert found.tokens[~added].tolist() == tokens
    assert not found.weights[added].any()
    assert np.array_equal(found.weights[~added], marked(tokens).weights)
    count = sum(token == EOD for token in tokens[:-1]) + begins
    assert added.sum() == count * len(prefix)
    assert documents(found.tokens, EOD).size == documents(np.array(tokens), EOD).size


def test_metadata_goes_to_its_share_of_samples_and_to_sources_that_have_some():
    tokens = [1, EOD, 2]
    has = [len(prefixed(tokens, [30], False, fraction=0.9, n=n).tokens) == 4 for n in range(3000)]
    assert abs(np.mean(has) - 0.9) < 5 * np.sqrt(0.09 / 3000)
    transform = MetadataPrefix({"code": np.array([30])}, {"code": EOD}, 1.0, 1, lambda *_: True)
    web = sample(tokens, source="web")
    assert transform(web) is web


# ---- fill in the middle ----------------------------------------------------------------------------------


def filling(rate=1.0, spm_fraction=0.5, seed=1):
    return FillInTheMiddle({"code": EOD}, Sentinels(P, S, M), rate, spm_fraction, seed)


def original(document):
    """Undo fill-in-the-middle in a document; the document itself where nothing was done."""
    if P not in document:
        return document
    p, s, m = (document.index(token) for token in (P, S, M))
    assert p == 0 and p < s < m
    end = document[m:][document[m:].index(EOD) :] if EOD in document[m:] else []
    middle = document[m + 1 : len(document) - len(end)]
    prefix, suffix = document[1:s], document[s + 1 : m]
    # In SPM the suffix marker comes at once, and the prefix stands before the middle.
    return prefix + middle + suffix + end


@given(samples, st.integers(0, 2**40), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.3, 1.0]))
@cases(120)
def test_undone_fill_in_the_middle_gives_the_documents(tokens, n, spm_fraction, rate):
    found = filling(rate, spm_fraction)(marked(tokens)._replace(n=n))
    pieces = [np.split(one, documents(one, EOD)[1:-1]) for one in (np.array(tokens), found.tokens)]
    before, after = ([piece.tolist() for piece in one] for one in pieces)
    assert [original(piece) for piece in after] == before
    changed = [(one, other) for one, other in zip(before, after, strict=True) if one != other]
    assert all(len(other) == len(one) + 3 for one, other in changed)
    assert len(found.tokens) == len(tokens) + 3 * len(changed)
    if rate == 1:
        assert len(changed) == sum(piece != [EOD] for piece in before)
    # The end stays last.
    assert all((one[-1] == EOD) == (other[-1] == EOD) for one, other in changed)
    if spm_fraction == 1:
        assert all(other[:2] == [P, S] for _, other in changed)


@given(samples, st.integers(0, 2**40))
@cases(60)
def test_weights_travel_with_their_tokens(tokens, n):
    before = marked(tokens)
    found = filling()(before._replace(n=n, full=2))
    sentinels = np.isin(found.tokens, (P, S, M))
    assert (found.weights[sentinels] == 2).all()
    wanted = found.tokens[~sentinels] + 100
    # One token, the sample's first, weighs nothing wherever it went.
    differing = np.flatnonzero(found.weights[~sentinels] != wanted)
    assert len(differing) == 1 and found.weights[~sentinels][differing[0]] == 0
    assert sorted(found.weights[~sentinels]) == sorted(before.weights)


def test_cuts_are_uniform_and_rates_are_kept():
    length = 12
    cuts, spm, filled = [], 0, 0
    for n in range(4000):
        found = filling(rate=0.5, spm_fraction=0.25)(
            sample(np.arange(100, 100 + length), n=n)
        ).tokens.tolist()
        if P not in found:
            continue
        filled += 1
        is_spm = found[1] == S
        spm += is_spm
        if not is_spm:
            cuts.append((found.index(S) - 1, length - (found.index(M) - found.index(S) - 1)))
    assert abs(filled / 4000 - 0.5) < 5 * np.sqrt(0.25 / 4000)
    # A PSM with an empty prefix looks like an SPM.
    empty = 1 - (length / (length + 1)) ** 2
    expected = 0.25 + 0.75 * empty
    assert abs(spm / filled - expected) < 5 * np.sqrt(expected * (1 - expected) / filled)
    low, high = np.array(cuts).T
    assert set(low) == set(range(1, length + 1)) and set(high) == set(range(1, length + 1))
    assert (low <= high).all()


def test_each_document_of_each_sample_is_cut_by_itself():
    one = np.array([*range(100, 160), EOD])
    shapes = set()
    for n in (1, 2):
        found = filling(spm_fraction=0.0)(sample(np.tile(one, 3), n=n)).tokens
        for piece in np.split(found, documents(found, EOD)[1:-1]):
            shapes.add((piece.tolist().index(S), piece.tolist().index(M)))
    assert len(shapes) == 6


def test_a_document_with_a_sentinel_stays_as_it_is():
    found = filling()(sample([1, S, 2, EOD, 3, 4, EOD])).tokens.tolist()
    assert found[:4] == [1, S, 2, EOD] and len(found) == 10
    other = sample([1, 2, 3], source="web")
    assert filling()(other) is other


# ---- all of them -----------------------------------------------------------------------------------------


def everything(largest=30):
    return SampleTransforms(
        [
            PromptWeight(1, 2),
            filling(),
            MetadataPrefix({"code": np.array([29, largest])}, {"code": EOD}, 1.0, 1, lambda *_: True),
        ]
    )


class Order:
    """Says that samples are windows of `code`."""

    sources = ("code",)

    def locate_many(self, ns):
        from megatron_davinci.data import Locations

        return Locations(np.zeros(len(ns), np.int64), np.zeros(len(ns), np.int64), np.asarray(ns))


@given(st.data(), st.integers(4, 24))
@cases(40)
def test_a_batch_is_its_samples_cut_to_their_length(data, length):
    rows = data.draw(
        st.lists(st.lists(st.integers(0, EOD), min_size=length, max_size=length), min_size=1, max_size=4)
    )
    tokens = np.array(rows, np.uint16)
    mask = (tokens[:, 1:] % 2).astype(np.uint8)
    ns = np.arange(50, 50 + len(rows))[::-1]
    found = everything().apply(Order(), ns, tokens, mask)
    assert found.tokens.shape == tokens.shape and found.tokens.dtype == np.uint16
    assert found.weights.shape == mask.shape and found.weights.dtype == np.uint8
    cut = 0
    for row, n in enumerate(ns.tolist()):
        alone = everything().one(n, "code", n, tokens[row], mask[row])
        assert np.array_equal(found.tokens[row], alone.tokens[:length])
        assert np.array_equal(found.weights[row], alone.weights[1:length])
        cut += len(alone.tokens) - length
        # Metadata before what fill-in-the-middle made; prompts told from metadata.
        is_prefix = np.isin(alone.tokens, (29, 30))
        assert alone.tokens[:2].tolist() == [29, 30]
        assert not alone.weights[is_prefix].any()
        assert (alone.weights[np.isin(alone.tokens, (P, S, M))] == 2).all()
        assert (alone.weights[~is_prefix] == 0).sum() == 1
    assert found.cut == cut
    assert np.array_equal(np.array(rows), tokens), "what was read is not written to"


@pytest.mark.parametrize(
    ("read", "largest", "wanted"),
    [
        (np.uint16, 65_535, np.uint16),
        (np.uint16, 65_536, np.int32),
        (np.int32, 65_536, np.int32),
        (np.int32, 2**31, np.int64),
    ],
)
def test_the_batch_has_the_narrowest_dtype_that_holds_what_is_added(read, largest, wanted):
    tokens = np.full((1, 6), 8, read)
    found = everything(largest).apply(Order(), np.array([1]), tokens, None)
    assert found.tokens.dtype == wanted
    assert found.tokens[0, :3].tolist() == [29, largest, P]


def test_weights_alone_leave_tokens_where_they_were_read():
    tokens = np.ones((2, 5), np.uint16)
    found = SampleTransforms([PromptWeight(1, 2)]).apply(Order(), np.array([3, 4]), tokens, None)
    assert found.tokens is tokens and found.cut == 0
    assert (found.weights == 2).all()
