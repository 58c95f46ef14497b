"""What follows from the figures, whatever they are: the comparison, sentences that say it, and `summary.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import worth
from figures import Difference, Outcome, best, by_arm, difference, distance, goals, mean_goal

GOAL = "mean over the domains of the held-out loss at the end, nats a token; lower is better"
KINDS = ("controller", "random", "amounts", "fixed", "grid")


@dataclass(frozen=True)
class Comparison:
    """The study's outcomes, compared.

    Attributes:
        arms: Outcomes by arm and seed, the controller's first.
        kinds: Of each arm.
        words: What each arm is.
        best_fixed: The best of the three fixed mixtures.
        oracle: The best of all fixed mixtures and schedules that were tried, in hindsight.
        against_fixed: Of each arm, the difference to the best fixed mixture.
        controller: The controller's difference to other arms.
    """

    arms: dict[str, dict[int, Outcome]]
    kinds: dict[str, str]
    words: dict[str, str]
    best_fixed: str
    oracle: str
    against_fixed: dict[str, Difference]
    controller: dict[str, Difference]

    @property
    def domains(self) -> list[str]:
        """As they are configured."""
        return list(next(iter(self.arms["controller"].values())).losses)

    @property
    def seeds(self) -> list[int]:
        """Of the controller's arm."""
        return sorted(self.arms["controller"])

    def of_kind(self, kind: str) -> list[str]:
        """Names of the arms of a kind."""
        return [name for name, its in self.kinds.items() if its == kind]

    def loss(self, arm: str, domain: str) -> float:
        """Held-out loss of a domain at the end, mean over seeds."""
        return float(np.mean([one.losses[domain][-1] for one in self.arms[arm].values()]))

    def spread(self, arm: str) -> float | None:
        """Standard deviation of the goal over seeds; None with one."""
        values = list(goals(self.arms[arm]).values())
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


def compare(outcomes: Sequence[Outcome]) -> Comparison:
    """Set every arm against the best fixed mixture, and the controller against the others."""
    arms = by_arm(sorted(outcomes, key=lambda one: KINDS.index(one.run.arm.kind)))
    kinds = {name: next(iter(found.values())).run.arm.kind for name, found in arms.items()}
    words = {name: next(iter(found.values())).run.arm.words for name, found in arms.items()}
    fixed = [name for name, kind in kinds.items() if kind == "fixed"]
    best_fixed = best(fixed, arms)
    oracle = best([name for name, kind in kinds.items() if kind in ("fixed", "grid")], arms)
    reference = goals(arms[best_fixed])
    ours = goals(arms["controller"])
    return Comparison(
        arms=arms,
        kinds=kinds,
        words=words,
        best_fixed=best_fixed,
        oracle=oracle,
        against_fixed={name: difference(goals(found), reference) for name, found in arms.items()},
        controller={
            name: difference(ours, goals(found)) for name, found in arms.items() if name != "controller"
        },
    )


def figures(comparison: Comparison) -> dict[str, float]:
    """The figures by name, for a benchmark's JSON."""
    found = {
        "controller_loss": mean_goal(comparison.arms["controller"]),
        "best_fixed_loss": mean_goal(comparison.arms[comparison.best_fixed]),
        "oracle_loss": mean_goal(comparison.arms[comparison.oracle]),
        "seeds": float(len(comparison.seeds)),
        "distance_to_oracle_mixture": _distance(comparison, "controller", comparison.oracle),
        "tokens_before_first_change": first_change(comparison),
    }
    for kind in ("random", "amounts"):
        for name in comparison.of_kind(kind):
            found[f"{kind}_loss"] = mean_goal(comparison.arms[name])
            found[f"controller_minus_{kind}"] = comparison.controller[name].mean
    found["controller_minus_best_fixed"] = comparison.controller[comparison.best_fixed].mean
    found["controller_minus_oracle"] = comparison.controller[comparison.oracle].mean
    for name, arm in (("controller", "controller"), ("best_fixed", comparison.best_fixed)):
        if bits := _bits(comparison.arms[arm]):
            found[f"{name}_bits_per_byte"] = float(np.mean(list(bits.values())))
    room = 0.0 - comparison.against_fixed[comparison.oracle].mean
    found["oracle_gain"] = room
    if room > 0:
        found["gain_fraction_of_oracle"] = -comparison.against_fixed["controller"].mean / room
    return {name: round(value, 6) for name, value in found.items()}


def first_change(comparison: Comparison) -> float:
    """Part of the tokens that were drawn before the controller changed anything, mean over seeds."""
    parts = []
    for one in comparison.arms["controller"].values():
        own = [edge for edge, who in zip(one.edges, one.origins) if who == "controller"]
        parts.append((own[0] if own else one.edges[-1]) / one.edges[-1])
    return float(np.mean(parts))


def _distance(comparison: Comparison, first: str, second: str) -> float:
    """Mean over the seeds that both have."""
    ours, theirs = comparison.arms[first], comparison.arms[second]
    return float(np.mean([distance(ours[s].drawn, theirs[s].drawn) for s in sorted(set(ours) & set(theirs))]))


def nats(value: float) -> str:
    """A difference in nats, with its sign."""
    return f"{value:+.4f}".replace("-", "−")


def interval(found: Difference) -> str:
    """A difference and its interval, in text."""
    if len(found.each) < 2:
        return f"{nats(found.mean)} nats (one seed: no interval)"
    return f"{nats(found.mean)} nats (95% interval {nats(found.low)} to {nats(found.high)})"


def headline(comparison: Comparison) -> str:
    """The answer in one line, with its figure."""
    return f"{answer(comparison)}: {interval(comparison.controller[comparison.best_fixed])}."


def answer(comparison: Comparison) -> str:
    """The answer in words."""
    fixed = comparison.controller[comparison.best_fixed]
    return {
        "better": f"The controller beats the best fixed mixture ({comparison.best_fixed})",
        "worse": f"The controller does not beat the best fixed mixture ({comparison.best_fixed}), it is worse",
        "no difference beyond noise": "The controller and the best fixed mixture "
        f"({comparison.best_fixed}) do not differ beyond noise",
        "unknown": f"One seed: the controller, less the best fixed mixture ({comparison.best_fixed})",
    }[fixed.verdict]


def conclusion(comparison: Comparison) -> list[str]:
    """Sentences that follow from the figures."""
    said = [headline(comparison)]
    for kind, what in (("random", "random adjustments within the same bounds at the same times"),):
        for name in comparison.of_kind(kind):
            found = comparison.controller[name]
            said.append(f"Against {what}: {_verdict(found)}, {interval(found)}.")
    found, room = comparison.controller[comparison.oracle], comparison.against_fixed[comparison.oracle]
    if not comparison.of_kind("grid"):
        said.append("The oracle's grid was not run.")
    elif comparison.oracle == comparison.best_fixed:
        grid = comparison.of_kind("grid")
        first = min(grid, key=lambda name: comparison.against_fixed[name].mean)
        said.append(
            "No mixture of the oracle's grid that ran with every seed is better than the best fixed one. With the "
            f"first seed alone, the best is {first}, at {nats(comparison.against_fixed[first].mean)} nats."
        )
    else:
        said.append(
            f"Against the oracle ({comparison.oracle}), the best of {_tried(comparison)} fixed mixtures and "
            f"schedules in hindsight: {_verdict(found)}, {interval(found)}. The oracle is itself "
            f"{interval(room)} from the best fixed mixture"
            + (
                f", and the controller reaches {comparison.against_fixed['controller'].mean / room.mean:.0%} of that."
                if room.mean < 0
                else "."
            )
        )
    return said


def reasons(comparison: Comparison) -> list[str]:
    """Why it came out so, as far as the runs show it."""
    said = [
        f"The controller first changed the mixture after {first_change(comparison):.0%} of the tokens, and decided "
        f"{_changes(comparison):.0f} changes a run, mean over seeds."
    ]
    if comparison.oracle not in ("even", comparison.best_fixed) and "even" in comparison.arms:
        said.append(
            f"Over the whole run, {_distance(comparison, 'controller', comparison.oracle):.0%} of its tokens would "
            f"have to be drawn from other domains to have the oracle's amounts; of the even mixture's, "
            f"{_distance(comparison, 'even', comparison.oracle):.0%}."
        )
    for name in comparison.of_kind("amounts"):
        found = comparison.controller[name]
        meaning = {
            "better": "that is what the order is worth",
            "worse": "that is what its order has cost",
            "no difference beyond noise": "the order does not show",
            "unknown": "one seed proves nothing about the order",
        }[found.verdict]
        said.append(
            "Against a fixed mixture of the amounts that the controller came to draw itself: "
            f"{_verdict(found)}, {interval(found)}; {meaning}. That mixture is "
            f"{interval(comparison.against_fixed[name])} from the best fixed one."
        )
    said.append(_by_domain(comparison))
    if "even" in comparison.arms:
        said.append(
            "Over domains and seeds, what the controller's losses differ by from the even mixture's goes with how "
            "much it drew: the correlation with the logarithm of a domain's share is "
            f"{_correlation(comparison, 1.0):.2f}".replace("-", "−")
            + " for the share of all tokens, and "
            + f"{_correlation(comparison, 0.2):.2f}".replace("-", "−")
            + " for that of the last fifth."
        )
    if sentence := worth.in_words(comparison.arms):
        said.append(sentence)
    moved, net = _path(comparison)
    if net > 0:
        said.append(
            f"The controller moved shares by {moved:.2f} in all (1 is a whole mixture), and ended {net:.2f} from its "
            "beginning" + (": mostly it went back and forth." if moved > 2 * net else ".")
        )
    if "even" in comparison.arms and (calls := saturated_too_early(comparison)):
        falls = [fall for _, fall in calls]
        named = sorted({domain for domain, _ in calls}, key=comparison.domains.index)
        said.append(
            f"At its decisions it held a domain for saturated {len(calls)} times ({', '.join(named)}). In the even "
            f"mixture of the same seed, those domains fell by another {np.mean(falls):.2f} nats from there on, "
            "on average, until the end."
        )
    return said


def saturated_too_early(comparison: Comparison) -> list[tuple[str, float]]:
    """Each domain that a decision of the controller held for saturated, and how far its loss fell after the same
    tokens in the even mixture of the same seed."""
    found = []
    for seed, one in comparison.arms["controller"].items():
        if seed not in comparison.arms["even"]:
            continue
        even = comparison.arms["even"][seed]
        for decision in one.decisions:
            for domain, detail in decision.get("details", {}).items():
                if isinstance(detail, dict) and detail.get("state") == "saturated" and domain in even.losses:
                    at = int(np.searchsorted(even.tokens, decision["consumed_tokens"]))
                    curve = even.losses[domain]
                    found.append((domain, float(curve[min(at, len(curve) - 1)] - curve[-1])))
    return found


def _correlation(comparison: Comparison, part: float) -> float:
    """Between the logarithm of a domain's share of the last `part` of the tokens and the loss beyond the even
    mixture's, over domains and seeds of the controller; 0 where nothing varies."""
    logs, beyond = [], []
    for seed, one in comparison.arms["controller"].items():
        if (even := comparison.arms["even"].get(seed)) is None:
            continue
        begin = (1 - part) * one.edges[-1]
        widths = np.diff(np.maximum(one.edges, begin))
        for domain, shares in one.shares.items():
            logs.append(np.log(max(float(widths @ shares) / widths.sum(), 1e-6)))
            beyond.append(one.losses[domain][-1] - even.losses[domain][-1])
    if np.ptp(logs) < 1e-9 or np.ptp(beyond) < 1e-9:
        return 0.0
    return float(np.corrcoef(logs, beyond)[0, 1])


def _path(comparison: Comparison) -> tuple[float, float]:
    """How far the controller's mixture moved in all, and from its beginning to its end; mean over seeds."""
    moved, net = [], []
    for one in comparison.arms["controller"].values():
        shares = np.stack(list(one.shares.values()), axis=1)
        moved.append(np.abs(np.diff(shares, axis=0)).sum() / 2)
        net.append(np.abs(shares[-1] - shares[0]).sum() / 2)
    return float(np.mean(moved)), float(np.mean(net))


def _by_domain(comparison: Comparison) -> str:
    parts = [
        f"{domain} {nats(comparison.loss('controller', domain) - comparison.loss(comparison.best_fixed, domain))}"
        for domain in comparison.domains
    ]
    return f"By domain, the controller less the best fixed mixture ({comparison.best_fixed}): {', '.join(parts)}."


def _changes(comparison: Comparison) -> float:
    return float(np.mean([one.origins.count("controller") for one in comparison.arms["controller"].values()]))


def _tried(comparison: Comparison) -> int:
    return len(comparison.of_kind("fixed")) + len(comparison.of_kind("grid"))


def _verdict(found: Difference) -> str:
    return {"unknown": "one seed"}.get(found.verdict, found.verdict)


def summary(comparison: Comparison, facts: Mapping[str, Any]) -> dict[str, Any]:
    """`summary.json`: figures by name, then everything that the page shows.

    Args:
        comparison: The comparison.
        facts: What else belongs there: tokens, parameters, machine.
    """
    arms: dict[str, Any] = {}
    for name, found in comparison.arms.items():
        arms[name] = {
            "kind": comparison.kinds[name],
            "what": comparison.words[name],
            "seeds": sorted(found),
            "goal": round(mean_goal(found), 6),
            "goal_by_seed": {str(seed): round(value, 6) for seed, value in goals(found).items()},
            "goal_standard_deviation": _rounded(comparison.spread(name)),
            "heldout_loss": {
                domain: round(comparison.loss(name, domain), 6) for domain in comparison.domains
            },
            "heldout_bits_per_byte": _bits(found),
            "less_best_fixed": comparison.against_fixed[name].as_json(),
            "share_of_tokens": {
                domain: round(float(np.mean([one.drawn[domain] for one in found.values()])), 6)
                for domain in comparison.domains
            },
        }
    return {
        "figures": figures(comparison),
        "goal": GOAL,
        "best_fixed": comparison.best_fixed,
        "oracle": comparison.oracle,
        "conclusion": conclusion(comparison),
        "why": reasons(comparison),
        "worth_of_an_e_fold": {
            what: {domain: round(value, 6) for domain, value in found.items()}
            for what, found in (
                ("of_share", worth.by_share(comparison.arms)),
                ("of_tokens", worth.by_time(comparison.arms)),
            )
        },
        "controller_less": {name: found.as_json() for name, found in comparison.controller.items()},
        "arms": arms,
        "mixtures": {
            f"{name}, seed {seed}": {
                "from_tokens": one.edges[:-1].astype(int).tolist(),
                "by": one.origins,
                **{domain: [round(float(s), 6) for s in shares] for domain, shares in one.shares.items()},
            }
            for name in comparison.arms
            if comparison.kinds[name] in ("controller", "random")
            for seed, one in sorted(comparison.arms[name].items())
        },
        **facts,
    }


def _bits(found: Mapping[int, Outcome]) -> dict[str, float]:
    """Bits a byte by domain, mean over seeds; empty where a run has none."""
    if not all(one.bits for one in found.values()):
        return {}
    domains = next(iter(found.values())).bits
    return {d: round(float(np.mean([one.bits[d] for one in found.values()])), 6) for d in domains}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
