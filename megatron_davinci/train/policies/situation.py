"""What a policy sees and says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the run.

    Attributes:
        step: After which it was made.
        tokens: Consumed until then.
        unit_tokens: Consumed until then, by unit (domain or source).
        heldout: Held-out loss by unit, nats a token; a unit without a held-out source is missing.
        learning_rate: Of the step before it; None where it was not recorded.
        training: Training loss since the evaluation before, by unit; empty where it was not recorded.
    """

    step: int
    tokens: int
    unit_tokens: Mapping[str, int]
    heldout: Mapping[str, float]
    learning_rate: float | None = None
    training: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bounds:
    """How far shares may go.

    Attributes:
        floors: Least share by unit; 0 where missing.
        ceilings: Largest share by unit; 1 where missing.
        maximum_change: By which any share may move in one decision.
    """

    floors: Mapping[str, Fraction]
    ceilings: Mapping[str, Fraction]
    maximum_change: Fraction


@dataclass(frozen=True)
class Situation:
    """All that a decision may depend on.

    Attributes:
        evaluations: Of the run until now, by rising step; the last is the occasion.
        mixture: Present share by unit, of all units; sums to 1.
        bounds: How far shares may go.
        total_tokens: The run's budget.
        pools: Tokens that there are, by unit; missing where unknown.
    """

    evaluations: tuple[Evaluation, ...]
    mixture: Mapping[str, Fraction]
    bounds: Bounds
    total_tokens: int
    pools: Mapping[str, int] = field(default_factory=dict)

    @property
    def last(self) -> Evaluation:
        """The evaluation that is the occasion."""
        return self.evaluations[-1]

    @property
    def tokens_left(self) -> int:
        """What is left of the budget."""
        return max(self.total_tokens - self.last.tokens, 0)

    def kept(self) -> dict[str, float]:
        """The present mixture, as a wish."""
        return {unit: float(share) for unit, share in self.mixture.items()}


@dataclass(frozen=True)
class Wish:
    """What a policy would like, before bounds.

    Attributes:
        mixture: Share by unit, 0 or more; scaled to sum to 1.
        reason: Why, in words.
        details: What the reason rests on, by unit, as plain values.
    """

    mixture: Mapping[str, float]
    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)


class Policy(Protocol):
    """Decides a mixture. A pure function: the same situation gives the same wish on every machine that resumes.

    Attributes:
        reads_training_loss: Whether it looks at `Evaluation.training`, which takes reading every step's record.
    """

    reads_training_loss: bool

    def wish(self, situation: Situation) -> Wish:
        """What the mixture should be from now on."""
        ...
