"""Attention confined to documents, in every layout: nothing of one document reaches another."""

from __future__ import annotations

import json
from itertools import tee

import numpy as np
import pytest

from megatron_davinci.data import IndexedDatasetWriter, Manifest, Shard
from tests.ranks import run_ranks
from tests.tiny import LENGTH, VOCABULARY, tiny_settings, train_here

EOD = VOCABULARY - 1
ONE_RANK = (1, {})
LAYOUTS = {
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP3": (3, {"pipeline": 3}),
    "PP2xVP2, uneven": (2, {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [1, 0, 1, 1]}),
    "CP2": (2, {"context": 2}),
    "CP2xTP2+SP": (4, {"context": 2, "tensor": 2, "sequence": True}),
}
# Where documents end in two packed samples. With CP2 chunks are of 8 positions: documents lie in one of them, in
# several of one rank, in those of both; and some are of one token.
ENDS = ((4, 5, 20, 29), (0, 15, LENGTH - 1))
CHANGED = ((2, 5, 13, 25, 31), (0, 9, 20))  # a position of each document, the last document of row 0 included


def packed() -> np.ndarray:
    """[2, LENGTH + 1] tokens, of several documents each."""
    tokens = np.random.default_rng(3).integers(0, EOD, (2, LENGTH + 1))
    for row, ends in enumerate(ENDS):
        tokens[row, list(ends)] = EOD
    return tokens


def document_numbers() -> np.ndarray:
    """[2, LENGTH] which document of its sample each input is in."""
    is_end = packed()[:, :-1] == EOD
    return np.cumsum(is_end, axis=1) - is_end


def variants() -> np.ndarray:
    """`packed`, then one for each document of each row: `packed` with a token of that document changed."""
    found = [packed()]
    for row, positions in enumerate(CHANGED):
        for position in positions:
            changed = packed()
            # An end stays an end: otherwise there would be other documents.
            if changed[row, position] == EOD:
                continue
            changed[row, position] = (changed[row, position] + 7) % EOD
            found.append(changed)
    return np.stack(found)


def model_settings(root, **parallel):
    settings = tiny_settings(root, parallel={"device": "cpu", **parallel, "distributed_optimizer": False})
    settings["model"]["num_layers"] = 3
    return settings


class Rank:
    """A model and what it computes, on this rank."""

    def __init__(self, settings):
        from megatron_davinci.config import validate
        from megatron_davinci.model.build import build_model
        from megatron_davinci.platform import distributed
        from megatron_davinci.platform.device import choose
        from megatron_davinci.train.step import Stepper, wrap_model

        self.config, self.platform = validate(settings, where="test"), choose("cpu", threads=1)
        distributed.start(self.platform, **self.config.parallel.groups)
        self.chunks = build_model(self.config, self.platform)
        for chunk in self.chunks:
            _make_attention_sharp(chunk)
        self.wrapped = wrap_model(self.chunks, self.config)
        self.stepper = Stepper(self.wrapped, None, self.config, self.platform)

    def logits(self, tokens, mask):
        """What this rank has of the logits [batch, LENGTH, VOCABULARY]: (positions, vocabulary, values), or None."""
        import torch
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from megatron_davinci.model.context_parallel import SequencePart
        from megatron_davinci.train import micro_batches as micro

        def forward(batches, model):
            batch = next(batches)
            out = model(batch.tokens, None, None, packed_seq_params=batch.documents)
            return out, lambda out, non_loss_data: out

        hooks = []
        for chunk in self.wrapped:
            chunk.eval()
        for chunk in self.chunks:
            hooks.append(chunk.decoder.register_forward_pre_hook(self._keep_rotary, with_kwargs=True))
        with torch.no_grad():
            # An interleaved pipeline takes no fewer micro-batches than it has ranks: the same one again.
            chunked = len(self.wrapped) > 1
            count = parallel_state.get_pipeline_model_parallel_world_size() if chunked else 1
            rows = torch.from_numpy(tokens).repeat(count, 1)
            batches = micro.split(rows, None, mask, len(tokens), torch.device("cpu"))
            found = get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=list(tee(batches, len(self.wrapped))) if chunked else batches,
                model=self.wrapped,
                num_microbatches=count,
                seq_length=LENGTH,
                micro_batch_size=len(tokens),
                forward_only=True,
                collect_non_loss_data=True,
            )
        for hook in hooks:
            hook.remove()
        if not parallel_state.is_pipeline_last_stage():
            return None
        positions = SequencePart.here(LENGTH).take(torch.arange(LENGTH), 0).numpy()
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = found[0].shape[-1]
        return positions, np.arange(rank * size, (rank + 1) * size), found[0].numpy()

    def _keep_rotary(self, module, args, kwargs):
        # The first channel's wavelength is 2 pi: its angle is the position.
        self.positions = kwargs["rotary_pos_emb"][:, :, 0, 0].numpy()

    def gradient(self, tokens, mask):
        """Loss summed over labels, their number, and the gradient of the mean by parameter."""
        import torch

        from megatron_davinci.model.initialize import global_name
        from megatron_davinci.train import micro_batches as micro

        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        batches = micro.split(torch.from_numpy(tokens), None, mask, 1, torch.device("cpu"))
        [total] = self.stepper._gather(self.stepper._run(batches, len(tokens), 1, forward_only=False))
        gradients = {
            global_name(name, chunk): p.main_grad.clone().numpy()
            for chunk in self.chunks
            for name, p in chunk.named_parameters()
        }
        return *total[:2], gradients


def _make_attention_sharp(model):
    """Larger weights: at initial ones attention hardly matters, and what leaks would be lost in rounding."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linear_qkv.weight" in name or "linear_proj.weight" in name:
                parameter.mul_(12)


def everything(settings):
    """What one launch measures: logits of all variants with and without mask, positions, loss and gradient."""
    import torch
    from megatron.core import parallel_state

    from megatron_davinci.model.context_parallel import SequencePart
    from megatron_davinci.model.documents import DocumentMask

    rank = Rank(settings)
    masks = {"none": None, "mask": DocumentMask(EOD), "reset": DocumentMask(EOD, reset_positions=True)}
    rows = variants().reshape(-1, LENGTH + 1)
    logits, positions = {}, {}
    for name, mask in masks.items():
        logits[name] = rank.logits(rows, mask)
        positions[name] = SequencePart.here(LENGTH).take(torch.arange(LENGTH), 0).numpy(), rank.positions
    return {
        "logits": logits,
        "positions": positions,
        "gradient": {name: rank.gradient(packed(), mask) for name, mask in masks.items()},
        "part": parallel_state.get_tensor_model_parallel_rank(),
    }


def assembled(ranks, name):
    """Logits [variants, 2, LENGTH, VOCABULARY] from what the ranks have of them."""
    whole = np.full((len(variants()) * 2, LENGTH, VOCABULARY), np.nan, np.float32)
    for rank in ranks:
        if rank["logits"][name] is not None:
            positions, vocabulary, values = rank["logits"][name]
            whole[np.ix_(range(len(whole)), positions, vocabulary)] = values
    assert not np.isnan(whole).any()
    return whole.reshape(-1, 2, LENGTH, VOCABULARY)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("documents")
    for seed, name in enumerate(("a", "b")):
        write_documents(root / "data" / name, seed)
    return root


@pytest.fixture(scope="module")
def one_rank(root):
    return run_ranks(1, everything, model_settings(root))


# What differs in each is in others too.
LATE = ("TP2", "CP2xTP2+SP")


@pytest.fixture(
    scope="module",
    params=[
        "one rank",
        *(pytest.param(name, marks=pytest.mark.long if name in LATE else ()) for name in LAYOUTS),
    ],
)
def layout(request, root, one_rank):
    if request.param == "one rank":
        return one_rank
    ranks, parallel = LAYOUTS[request.param]
    return run_ranks(ranks, everything, model_settings(root, **parallel))


def leaks(logits):
    """Largest change of a logit in a document none of whose tokens was changed, and in the one that was."""
    numbers, tokens = document_numbers(), variants()
    elsewhere = inside = 0.0
    for changed, found in zip(tokens[1:], logits[1:], strict=True):
        (row,), (position,) = np.nonzero(changed != tokens[0])
        difference = np.abs(found - logits[0]).max(axis=-1)
        same = np.zeros((2, LENGTH), bool)
        same[row] = numbers[row] == numbers[row, position]
        elsewhere = max(elsewhere, difference[~same].max())
        before = np.arange(LENGTH) < position
        assert not difference[row][same[row] & before].any(), "a token changed what is before it"
        assert difference[row, position] > 0
        inside = max(inside, difference[same].max())
    return elsewhere, inside


@pytest.mark.parametrize("name", ["mask", "reset"])
def test_a_changed_token_changes_no_logit_of_another_document(layout, name):
    elsewhere, inside = leaks(assembled(layout, name))
    assert elsewhere == 0.0
    assert inside > 0.1


def logits_under_the_mask(settings):
    """What `everything` measures, of the document mask's logits alone."""
    from megatron_davinci.model.documents import DocumentMask

    rank = Rank(settings)
    return {"logits": {"mask": rank.logits(variants().reshape(-1, LENGTH + 1), DocumentMask(EOD))}}


def test_experts_tell_no_document_of_another(root):
    # A token is sent where other tokens of the batch are computed too, on another rank: together, and each by itself.
    settings = model_settings(root, tensor=2, sequence=True, expert=2)
    settings["model"] |= {"num_layers": 2, "experts": {"number": 4}}
    elsewhere, inside = leaks(assembled(run_ranks(2, logits_under_the_mask, settings), "mask"))
    # A matrix product of more rows may add up in another order.
    assert elsewhere < 1e-5
    assert inside > 0.1


def test_without_the_mask_it_does(layout):
    # What follows a document sees it then: the test above can fail.
    elsewhere, _ = leaks(assembled(layout, "none"))
    assert elsewhere > 0.01


def test_positions_go_on_unless_they_are_reset(layout):
    numbers = document_numbers()
    begins = np.array([[np.flatnonzero(row == number)[0] for number in row] for row in numbers])
    wanted = {
        "none": np.arange(LENGTH)[None],
        "mask": np.arange(LENGTH)[None],
        "reset": np.arange(LENGTH) - begins,
    }
    for rank in layout:  # on every pipeline stage
        for name, (held, positions) in rank["positions"].items():
            assert np.array_equal(positions.T[: len(wanted[name])], wanted[name][:, held])


@pytest.mark.parametrize("name", ["none", "mask", "reset"])
def test_logits_and_loss_and_gradient_are_those_of_one_rank(layout, one_rank, name):
    assert np.abs(assembled(layout, name) - assembled(one_rank, name)).max() < 2e-5
    loss, count, whole = one_rank[0]["gradient"][name]
    for rank in layout:
        ours, labels, gradients = rank["gradient"][name]
        assert labels == count == {"none": 2 * LENGTH}.get(name, 2 * LENGTH - sum(len(ends) for ends in ENDS))
        assert ours == pytest.approx(loss, rel=1e-6)
        for parameter, gradient in gradients.items():
            full = part_of(whole[parameter], parameter, gradient.shape, rank["part"])
            assert np.abs(gradient - full).max() <= 1e-5 * max(1.0, np.abs(full).max()), parameter


def part_of(full, name, shape, part):
    """A tensor-parallel rank's part of a parameter."""
    if name.endswith("linear_fc1.weight") and shape != full.shape:
        return np.concatenate([half.reshape(2, -1, full.shape[1])[part] for half in np.split(full, 2)])
    if shape != full.shape:
        axis = next(a for a in range(full.ndim) if full.shape[a] != shape[a])
        return np.split(full, 2, axis)[part]
    return full


def alone(settings):
    """Each document alone: its tokens run by themselves, from position 0; (logits, loss, gradient sums) of all."""
    import torch

    from megatron_davinci.model.initialize import global_name

    rank = Rank(settings)
    losses, gradients, logits = 0.0, {}, []
    for row, numbers in zip(packed(), document_numbers(), strict=True):
        row_logits = []
        for number in range(numbers[-1] + 1):
            tokens = torch.from_numpy(row[:-1][numbers == number])[None]
            rank.chunks[0].eval()
            with torch.no_grad():
                row_logits.append(rank.chunks[0](tokens, None, None)[0].numpy())
            rank.chunks[0].train()
            if number == numbers[-1] and row[LENGTH - 1] != EOD:
                tokens = torch.cat([tokens, torch.tensor([[row[-1]]])], dim=1)  # its last label is there too
            if tokens.shape[1] == 1:
                continue  # an end and nothing else: there is nothing to predict inside it
            rank.wrapped[0].zero_grad_buffer()
            loss = rank.wrapped[0](tokens[:, :-1], None, None, labels=tokens[:, 1:].contiguous()).sum()
            loss.backward()
            losses += float(loss)
            for name, p in rank.chunks[0].named_parameters():
                name = global_name(name, rank.chunks[0])
                gradients[name] = gradients.get(name, 0) + p.main_grad.clone().numpy()
        logits.append(np.concatenate(row_logits))
    return np.stack(logits), losses, gradients


def sums_of_masks(settings):
    """Loss and labels under the document mask: of all labels, of a random half and of the other half."""
    import torch

    from megatron_davinci.model.documents import DocumentMask

    stepper, tokens = Rank(settings).stepper, torch.from_numpy(packed())
    half = torch.randint(0, 2, (2, LENGTH), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    masks = (None, half, 1 - half)
    return half.numpy(), [stepper.loss(tokens, 1, 2, mask, DocumentMask(EOD)) for mask in masks]


@pytest.mark.parametrize("name", ["one rank", "CP2"])
def test_a_label_carries_loss_where_its_source_and_its_document_let_it(name, root):
    ranks, parallel = {"one rank": ONE_RANK, **LAYOUTS}[name]
    for half, (whole, some, rest) in run_ranks(ranks, sums_of_masks, model_settings(root, **parallel)):
        inside = packed()[:, :-1] != EOD
        assert [whole[1], some[1], rest[1]] == [
            inside.sum(),
            (inside & (half == 1)).sum(),
            (inside & (half == 0)).sum(),
        ]
        assert some[0] + rest[0] == pytest.approx(whole[0], rel=1e-6)


@pytest.fixture(scope="module")
def documents_alone(root):
    return run_ranks(1, alone, model_settings(root))[0]


@pytest.mark.parametrize("name", ["mask", "reset"])
def test_a_packed_sample_is_its_documents_alone(layout, documents_alone, name):
    logits, loss, _ = documents_alone
    # RoPE is relative, so positions that go on change nothing but rounding.
    assert np.abs(assembled(layout, name)[0] - logits).max() < 2e-5
    packed_loss, _, _ = layout[0]["gradient"][name]
    assert abs(packed_loss - loss) / loss <= 1e-5


def test_the_gradient_of_a_packed_sample_is_that_of_its_documents_alone(one_rank, documents_alone):
    _, _, gradients = documents_alone
    _, count, packed_gradients = one_rank[0]["gradient"]["mask"]
    for parameter, gradient in packed_gradients.items():
        expected = gradients[parameter] / count
        assert np.abs(gradient - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max()), parameter


def test_and_without_the_mask_it_is_not(layout, documents_alone):
    logits, loss, _ = documents_alone
    assert np.abs(assembled(layout, "none")[0] - logits).max() > 0.01
    assert abs(layout[0]["gradient"]["none"][0] - loss) / loss > 1e-3


# ---- through the training loop ---------------------------------------------------------------------------


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_documents(folder, seed):
    """Short documents of a random walk, each with its end."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with IndexedDatasetWriter(folder / "shard-00000", np.uint16) as writer:
        for _ in range(300):
            steps = generator.integers(1, 4, size=int(generator.integers(1, 40)))
            writer.add_document([*(np.cumsum(steps) * (seed + 1) % EOD), EOD])
    Manifest(
        name=folder.name, domain=folder.name, dtype="uint16", vocab_size=VOCABULARY, eod_id=EOD,
        tokenizer_sha256=None, shards=(Shard.of("shard-00000", writer.written),),
    ).save(folder)  # fmt: skip


def train_settings(root, directory, transforms, **parallel):
    """Six steps plain, then six with `transforms` in a second stage; held-out loss under a document mask."""
    settings = tiny_settings(
        root,
        run={"directory": str(directory), "seed": 7},
        parallel={"device": "cpu", **parallel},
        evaluation={"sequences": 8, "document_mask": True},
    )
    settings["model"]["num_layers"] = 3
    stage = settings["curriculum"][1] | {"tokens": 6 * 8 * LENGTH}
    plain = {"name": "plain", "learning_rate": {"peak": 1e-2}}
    settings["curriculum"] = [stage | plain, stage | {"name": "documents", "transforms": transforms}]
    return settings


TRANSFORMS = {"document_mask": True, "reset_positions": True}


@pytest.fixture(scope="module")
def trained(root):
    run_ranks(1, train_here, train_settings(root, root / "trained", TRANSFORMS))
    return lines(root / "trained" / "metrics.jsonl"), lines(root / "trained" / "evals.jsonl")


@pytest.mark.parametrize("name", [pytest.param("PP3", marks=pytest.mark.long), "CP2"])
def test_a_stage_with_documents_trains_the_same_in_every_layout(name, root, trained, tmp_path):
    ranks, parallel = LAYOUTS[name]
    run_ranks(ranks, train_here, train_settings(root, tmp_path / "run", TRANSFORMS, **parallel))
    for ours, theirs in zip(lines(tmp_path / "run" / "metrics.jsonl"), trained[0], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    for ours, theirs in zip(lines(tmp_path / "run" / "evals.jsonl"), trained[1], strict=True):
        assert ours["heldout_tokens"] == theirs["heldout_tokens"]
        assert 0 < theirs["heldout_tokens"]["a"] < 8 * LENGTH
        assert ours["heldout_loss"]["a"] == pytest.approx(theirs["heldout_loss"]["a"], rel=1e-4)


def test_only_the_stage_that_asks_has_documents(root, trained, tmp_path):
    run_ranks(1, train_here, train_settings(root, tmp_path / "run", {}))
    found = lines(tmp_path / "run" / "metrics.jsonl")
    same = [a["loss"] == b["loss"] for a, b in zip(found, trained[0], strict=True)]
    assert same == [True] * 6 + [False] * 6
