"""What a rank will hold at its fullest moment, computed from the configuration and not measured.

Counted tensor by tensor as our own layers keep them for the backward pass: attention without a score matrix, unfused
SwiGLU and rotary positions. `benchmarks/memory.py` holds the estimate against what real models hold on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_davinci.config import Layout, RunConfig


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the fullest rank at its fullest moment.

    Attributes:
        weights: In the training precision.
        gradients: In fp32.
        optimizer: Both moments, and fp32 main weights under bf16.
        activations: Kept for the backward passes of all micro-batches in flight.
        logits: And their fp32 copy in the loss; 0 where the fullest moment is another one.
        working: What the backward pass holds for a moment: activations that it has computed again, and gradients on
            their way.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    working: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.working


def plan_memory(config: RunConfig, layout: Layout) -> MemoryPlan:
    """Estimate the memory of the fullest rank.

    Not counted: the device's context, buffers of the collective library and the allocator's fragments.
    """
    ranks = [_Rank(config, layout, rank) for rank in range(layout.pipeline)]
    return max((plan for rank in ranks for plan in rank.moments()), key=lambda plan: plan.total)


class _Rank:
    """One pipeline rank of a configuration on a layout."""

    def __init__(self, config: RunConfig, layout: Layout, rank: int) -> None:
        self.config, self.layout, self.model = config, layout, config.model
        self.first, self.last = rank == 0, rank == layout.pipeline - 1
        self.chunks = config.parallel.chunk_layers(config.model.num_layers)[rank :: layout.pipeline]
        self.size = 4 if config.train.precision == "fp32" else 2  # auto is bf16 where memory is short
        self.tokens = config.data.sequence_length * config.train.micro_batch_size // layout.context
        sequence = layout.tensor if config.parallel.sequence else 1
        self.channels = self.model.hidden_size * self.size / sequence
        self.hidden = self.model.ffn_hidden_size * self.size / layout.tensor
        self.vocabulary = self.model.vocab_size // layout.tensor
        self.in_flight = self._in_flight(rank)

    def _in_flight(self, rank: int) -> list[int]:
        """The chunks whose forward pass is done and whose backward pass is not, at the most (1F1B, interleaved)."""
        pipeline, chunks = self.layout.pipeline, len(self.chunks)
        micro_batches = _micro_batches(self.config, self.layout)
        if chunks == 1:
            return [0] * min(pipeline - rank, micro_batches)
        waiting = 2 * (pipeline - rank - 1) + (chunks - 1) * pipeline + 1
        return [turn // pipeline % chunks for turn in range(min(waiting, micro_batches * chunks))]

    def moments(self) -> Iterator[MemoryPlan]:
        """The moments that may be the fullest: one plan each."""
        backends = self.config.backends
        at_once = min(self.tokens, backends.loss_chunk_tokens or self.tokens)
        logits = at_once * self.vocabulary
        output = self.channels * self.tokens
        kept: float = sum(self._kept_by_layers(self.chunks[chunk]) for chunk in self.in_flight)
        # What a chunk sends on is its schedule's until the gradient comes back.
        own = self.last and self.in_flight[-1] == len(self.chunks) - 1
        kept += output * (len(self.in_flight) - own)
        head = self.vocabulary * self.model.hidden_size * self.size
        if self.last:
            norm = 2 * output + 4 * self.tokens
            # Our loss overwrites logits where they are; others compute in an fp32 copy.
            copy = 0 if self.size == 4 or backends.loss == "davinci" else 4
            in_loss = logits * (self.size + copy)
            yield self._plan(kept + norm, in_loss, 0)
            gradients: float = 2 * self.model.hidden_size * self.size * self.tokens + head
            yield self._plan(kept + norm, logits * self.size, gradients)
        # The gradient of a tied matrix waits for its second part, from the embedding.
        tied = self.last and self.first and self.model.tie_embeddings
        gradients = self._layer_gradients() + (head if tied else 0)
        recompute = self.config.train.recompute
        if recompute.granularity == "full" and recompute.method == "block":
            yield self._plan(kept, 0, gradients)
            # By the time that the first layers are computed again, the others of this micro-batch are gone.
            gone = max(0, min(self.chunks[chunk] for chunk in self.in_flight) - recompute.layers)
            kept -= gone * self._whole_layer() * self.tokens
        yield self._plan(kept, 0, self._recomputed() + gradients)

    def _plan(self, activations: float, logits: float, working: float) -> MemoryPlan:
        layout, parameters, experts = self.layout, self._parameters(), self._expert_parameters()
        instances = self.config.parallel.optimizer_instances
        copies = max(1, layout.data * layout.context // instances)
        expert_copies = layout.world // (layout.expert * layout.expert_tensor * layout.pipeline)
        expert_copies = max(1, expert_copies // instances)
        if not self.config.parallel.distributed_optimizer:
            copies = expert_copies = 1
        moments = 8 if self.config.optimizer.moments == "fp32" else 2 + 16 / 128
        each = (moments + (4 if self.size == 2 else 0)) * (1 - self.config.optimizer.cpu_offload)
        optimizer = round(parameters * each / copies + experts * each / expert_copies)
        if self.config.optimizer.kind == "muon":
            optimizer = self._muon(parameters, each, copies) + round(experts * (each - 4) / expert_copies)
        codes = 2 * self._matrices() if self._keeps_codes else 0
        return MemoryPlan(
            weights=(parameters + experts) * self.size + codes,
            gradients=(parameters + experts) * 4,
            optimizer=optimizer,
            activations=round(activations),
            logits=round(logits),
            working=round(working),
        )

    def _muon(self, parameters: int, each: float, copies: int) -> int:
        """Muon's state, which is dealt by whole parameters: the largest lies on one rank, however many there are."""
        alone = self._table() * each if self.first or self.last else 0.0
        wide = 2 * self.model.ffn_hidden_size * self.model.hidden_size // self.layout.tensor
        # A matrix has one moment.
        alone = max(alone, wide * (each - 4))
        even = (parameters * each - 4 * self._matrices()) / copies
        return round(max(even, alone) if copies > 1 else even)

    def _expert_parameters(self) -> int:
        here = self.layout.expert * self.layout.expert_tensor
        return sum(self.chunks) * self.model.expert_parameters() // here

    def _norm_parameters(self) -> int:
        """Of a layer."""
        model = self.model
        shared = model.qk_norm and model.qk_norm_scope == "head"  # norms over all heads are cut as heads are
        return 2 * model.hidden_size + (2 * model.kv_channels if shared else 0)

    def _matrices(self) -> int:
        """The parameters of the layers that are cut over tensor ranks."""
        model = self.model
        layer = (model.parameters(embeddings=False) - model.hidden_size) // model.num_layers
        layer -= self._norm_parameters() + model.expert_parameters()
        return sum(self.chunks) * (layer // self.layout.tensor)

    def _parameters(self) -> int:
        """All but the experts'."""
        model = self.model
        total = self._matrices() + sum(self.chunks) * self._norm_parameters()
        total += model.hidden_size if self.last else 0
        tables = self.first + (self.last and not (self.first and model.tie_embeddings))
        return total + tables * self._table()

    def _table(self) -> int:
        """Of an embedding or output layer, the largest parameter but for unusual models."""
        return self.vocabulary * self.model.hidden_size

    # ---- a layer, in bytes a token of this rank ----------------------------------------------------------

    @property
    def _linear_input(self) -> float:
        """What a byte of activations takes that a linear layer was given."""
        return 1 / self.size if self._in_8_bits else 1.0

    @property
    def _other_input(self) -> float:
        """The same of norms and SwiGLU, with a byte of scale for 16 numbers."""
        return 17 / 16 / self.size if self._in_8_bits else 1.0

    @property
    def _in_8_bits(self) -> bool:
        return self.config.train.low_precision.activations == "fp8"

    @property
    def _keeps_codes(self) -> bool:
        """Whether linear layers keep their input's transposed codes. What ranks gather is not kept whole."""
        low = self.config.train.low_precision
        return low.keep_codes and low.backend == "native" and not self.config.parallel.sequence

    def _made_on_the_way(self, maker: str) -> float:
        """The part of the layers that quantise what a norm or SwiGLU makes as it is made, and keep none of it."""
        low, own = self.config.train.low_precision, getattr(self.config.backends, maker) == "davinci"
        if not own or low.recipe == "none" or low.backend != "native" or self._in_8_bits:
            return 0.0
        return (self.model.num_layers - low.keep_first_layers - low.keep_last_layers) / self.model.num_layers

    def _norms(self) -> float:
        """The outputs of both norms, and the scale of each token."""
        if self._keeps_codes:
            return 2 * self.channels / self.size + 8
        written = 1.0 if self.config.parallel.sequence else 1 - self._made_on_the_way("norm")
        return 2 * self.channels * self._linear_input * written + 8

    def _mlp(self) -> float:
        """Both halves of the first projection, the activation, the other half again, and the product.

        An expert keeps what it was sent and what it sends back too. All are taken to be equally busy.
        """
        experts = self.model.experts
        if experts is None and self._in_8_bits:
            halves = 2 if self.config.backends.swiglu == "davinci" else 3
            return (halves * self._other_input + self._linear_input) * self.hidden
        if experts is None:
            others = 2 if self.config.backends.swiglu == "davinci" else 4
            if self._keeps_codes:
                return (others + 1 / self.size) * self.hidden
            if others == 4:
                return 5 * self.hidden
            # Beside both halves, the product: of products of few bits, unless they make it themselves.
            low = self.config.train.low_precision
            return (2 if low.recipe == "none" else 3 - self._made_on_the_way("swiglu")) * self.hidden
        shared = 5 * (experts.shared_ffn_hidden_size or 0) * self.size / self.layout.tensor
        sent = 2 * self.channels * self.layout.expert_tensor
        split = self.model.hidden_size * self.size / self.channels
        return shared + experts.top_k * (5 * self.model.ffn_hidden_size * self.size / split + sent)

    def _queries_keys_values(self) -> float:
        """The projection, of which the values are a part; queries and keys after rotation; the rotation itself."""
        model = self.model
        heads, groups, width = (
            model.num_attention_heads,
            model.num_query_groups,
            model.kv_channels * self.size,
        )
        rotation = 4 * width / self.config.train.micro_batch_size
        # Queries are cut out of the projection before they are normalised, and keys are not; a scale for each.
        scales = 4 * (heads + groups) if model.qk_norm_scope == "head" else 8 * self.layout.tensor
        normal = heads * width + scales if model.qk_norm else 0
        if self.config.backends.rope == "davinci" and not model.qk_norm:
            # Keys stay where the projection has written them; queries too, if they lie side by side.
            again = heads if groups > self.layout.tensor else 0
            return (heads + 2 * groups + again) * width / self.layout.tensor
        return ((2 * heads + 3 * groups) * width + normal) / self.layout.tensor + rotation

    def _attention(self) -> float:
        """Queries, keys, values and the output."""
        model, context = self.model, self.layout.context
        width = model.kv_channels * self.size / self.layout.tensor
        heads, groups = model.num_attention_heads * width, model.num_query_groups * width
        sums = 4 * model.num_attention_heads / self.layout.tensor
        sums += heads / self.size if self._keeps_codes else 0  # what the layer behind keeps of the output
        if context == 1:
            return self._queries_keys_values() + heads + sums
        # Queries and the keys and values of the whole sequence in the order of their pieces, and the output twice.
        rotation = self._queries_keys_values() - 2 * heads - 3 * groups
        return rotation + 3 * heads + 2 * groups * (context + 0.5) + sums

    def _whole_layer(self) -> float:
        return 2 * self.channels * self._other_input + self._norms() + self._attention() + self._mlp()

    def _kept_by_layers(self, layers: int) -> float:
        """What so many layers keep of one micro-batch, in bytes."""
        recompute = self.config.train.recompute
        whole = self._whole_layer()
        if recompute.granularity == "full":
            if recompute.method == "uniform":
                return layers / recompute.layers * self.channels * self.tokens
            again = min(recompute.layers, layers)
            return (again * self.channels + (layers - again) * whole) * self.tokens
        if "layernorm" in recompute.modules:
            whole -= self._norms()
        if {"mlp", "moe"} & set(recompute.modules):
            whole -= self._mlp()
        if "core_attn" in recompute.modules:
            width = self.model.num_attention_heads * self.model.kv_channels * self.size / self.layout.tensor
            whole -= self._attention() - self._queries_keys_values() - width
        return whole * layers * self.tokens

    def _recomputed(self) -> float:
        """What is computed again at once, in bytes."""
        recompute = self.config.train.recompute
        if recompute.granularity == "full":
            runs = recompute.layers if recompute.method == "uniform" else 1
            return (runs * self._whole_layer() - self.channels) * self.tokens
        again = 0.0
        if "layernorm" in recompute.modules:
            again += self.channels
        if {"mlp", "moe"} & set(recompute.modules):
            again += self._mlp()
        return again * self.tokens

    def _layer_gradients(self) -> float:
        """The gradients that the backward pass of an MLP holds at once, in bytes."""
        return (2 * self.hidden + 2 * self.channels) * self.tokens


def _micro_batches(config: RunConfig, layout: Layout) -> int:
    """Micro-batches that a rank takes one after the other in the largest batch."""
    largest = max(phase.size for stage in config.curriculum for phase in stage.global_batch_size)
    return max(1, largest // (config.train.micro_batch_size * layout.data))


def snapshot_bytes(config: RunConfig, memory: MemoryPlan) -> int:
    """Bytes of host memory that the snapshots of the fullest rank take: two slots, each with parity; 0 for none.

    Args:
        config: The run configuration.
        memory: Of the fullest rank.
    """
    settings = config.snapshots
    if settings.every_steps is None:
        return 0
    # Under fp32 what the optimizer updates are the weights themselves: 4 bytes beside the 8 of the moments.
    state = memory.optimizer * 12 // 8 if config.train.precision == "fp32" else memory.optimizer
    return 2 * (state if settings.parity == "never" else state + state // (settings.parity_nodes - 1))
