"""From a stage's mixture to the share of each source: exact, and the same however the configuration is ordered.

A name in a mixture is a source or a domain. A domain's share goes to its sources that have no share of their
own in the stage, in proportion to their pools (or to a power of them, or to weights). What comes out is what the
journal records: exact text for each source.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from decimal import Context, Decimal
from fractions import Fraction

from megatron_davinci.config.curriculum import Stage
from megatron_davinci.config.data import DataConfig
from megatron_davinci.config.mixture import DomainMixture, exact_share, share_text
from megatron_davinci.config.problems import Place, Problem
from megatron_davinci.errors import ConfigError

_TEMPERED_DIGITS = 12  # decimals of a share that comes out of a power
_MOST_DECIMALS = 24  # digits that a share may have and still be written as a decimal


def source_weights(stage: Stage, data: DataConfig, pools: Mapping[str, int]) -> dict[str, str]:
    """The share of samples of each source in a stage, as the journal records it.

    Args:
        stage: The stage; `mixture_problems` finds nothing in it.
        data: The sources and their domains.
        pools: Tokens by source; needed of those that divide a domain by size.

    Returns:
        Share by source, sorted by name: as it was written where a source has its own share or a domain to itself,
        else as an exact decimal or fraction (`3/7`).

    Raises:
        ConfigError: A pool's size decides, and is not known.
    """
    found: dict[str, str] = {}
    for name, entry in stage.mixture.items():
        names = members(name, entry, stage, data)
        text = share_text(entry)
        share = exact_share(name, text)
        if len(names) == 1:
            found[names[0]] = text
        elif share:
            for member, part in _divided(stage, name, entry, names, pools).items():
                found[member] = exact_text(share * part)
    return dict(sorted(found.items()))


def members(name: str, entry: str | DomainMixture, stage: Stage, data: DataConfig) -> list[str]:
    """The sources that an entry of a stage's mixture is divided among, sorted."""
    if name in data.sources and isinstance(entry, str):
        return [name]
    if isinstance(entry, DomainMixture) and entry.weights is not None:
        return sorted(member for member, weight in entry.weights.items() if exact_share(member, weight))
    if isinstance(entry, DomainMixture) and entry.sources is not None:
        return sorted(entry.sources)
    own = _named_themselves(stage, data)
    return sorted(source for source in data.sources if data.domain(source) == name and source not in own)


def mixed_sources(stage: Stage, data: DataConfig) -> list[str]:
    """The sources that a stage takes samples from, in the order of their names."""
    return sorted(
        {
            source
            for name, entry in stage.mixture.items()
            if exact_share(name, share_text(entry))
            for source in members(name, entry, stage, data)
        }
    )


def exact_text(share: Fraction) -> str:
    """A share as text that is read back as the same number: a decimal where that is short, else a fraction."""
    rest, decimals = share.denominator, 0
    for prime in (2, 5):
        power = 0
        while rest % prime == 0:
            rest, power = rest // prime, power + 1
        decimals = max(decimals, power)
    if rest > 1 or decimals > _MOST_DECIMALS:
        return f"{share.numerator}/{share.denominator}"
    digits = str(share.numerator * 10**decimals // share.denominator).rjust(decimals + 1, "0")
    return f"{digits[:-decimals]}.{digits[-decimals:]}" if decimals else digits


def mixture_problems(number: int, stage: Stage, data: DataConfig) -> Iterator[Problem]:
    """What a stage's mixture says that its sources and domains do not bear out: where, and what.

    Args:
        number: Of the stage, from 0 on.
        stage: The stage.
        data: The sources and their domains.
    """
    domains = {data.domain(source) for source in data.sources}
    own = _named_themselves(stage, data)
    unknown = sorted(set(stage.mixture) - set(data.sources) - domains)
    if unknown:
        others = sorted(domains - set(data.sources))
        known = ", ".join(data.sources) + (f"; domains are {', '.join(others)}" if others else "")
        near = difflib.get_close_matches(unknown[0], [*data.sources, *others], n=1, cutoff=0.7)
        yield (
            ("curriculum", number, "mixture", unknown[0]),
            f"curriculum stage {stage.name} mixes {', '.join(unknown)}; data.sources has {known}"
            + (f"; did you mean {near[0]}?" if near else ""),
        )
    for name, entry in stage.mixture.items():
        place: Place = ("curriculum", number, "mixture", name)
        if name in unknown:
            continue
        if isinstance(entry, DomainMixture):
            yield from _member_problems(place, name, entry, own, data)
        elif others := _also_meant(name, own, data):
            yield (
                place,
                f"{name} is a source, and a domain with {', '.join(others)}: for the domain write "
                f"`{name}: {{share: {entry}}}`; for the source alone give the others a share too, 0 if none",
            )
        if not members(name, entry, stage, data) and exact_share(name, share_text(entry)):
            yield (
                place,
                f"every source of domain {name} has a share of its own, so nothing divides the domain's",
            )


def _also_meant(name: str, own: set[str], data: DataConfig) -> list[str]:
    """The sources that a share would go to as well if a source's name were read as its domain's."""
    if name not in data.sources:
        return []
    return [other for other in data.sources if data.domain(other) == name and other not in own]


def _member_problems(
    place: Place, name: str, entry: DomainMixture, own: set[str], data: DataConfig
) -> Iterator[Problem]:
    inside = sorted(source for source in data.sources if data.domain(source) == name)
    if not inside:
        yield place, f"{name} is a source of domain {data.domain(name)}, so there is nothing to divide"
        return
    for key, named in (("sources", entry.sources or ()), ("weights", entry.weights or ())):
        for member in named:
            if member not in inside:
                near = difflib.get_close_matches(member, inside, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(inside)}"
                yield (*place, key), f"{member} is no source of domain {name}; {hint}"
            elif member in own:
                yield (
                    (*place, key),
                    f"{member} has a share of its own in the mixture, so the domain has none for it",
                )


def _named_themselves(stage: Stage, data: DataConfig) -> set[str]:
    return {name for name, entry in stage.mixture.items() if isinstance(entry, str) and name in data.sources}


def _divided(
    stage: Stage, name: str, entry: str | DomainMixture, names: list[str], pools: Mapping[str, int]
) -> dict[str, Fraction]:
    """What each of several sources has of a domain; the parts sum to 1 exactly."""
    if isinstance(entry, DomainMixture) and entry.weights is not None:
        parts = {member: exact_share(member, entry.weights[member]) for member in names}
    else:
        unknown = [member for member in names if not pools.get(member)]
        if unknown:
            raise ConfigError(
                f"Domain {name} is divided by the sizes of its sources, and a size is not known.",
                where=f"curriculum stage {stage.name}, mixture",
                found=f"no manifest and no `tokens` of {', '.join(unknown)}",
                expected="for each a source that is there, or data.sources.NAME.tokens to plan with",
                do="write `tokens: 12.5B` beside the source's path, or weights in the mixture",
            )
        temperature = entry.temperature if isinstance(entry, DomainMixture) else None
        if temperature is not None:
            return _tempered({member: pools[member] for member in names}, temperature)
        parts = {member: Fraction(pools[member]) for member in names}
    whole = sum(parts.values(), Fraction(0))
    return {member: part / whole for member, part in parts.items()}


def _tempered(sizes: dict[str, int], temperature: float) -> dict[str, Fraction]:
    """Shares in proportion to `size ** (1 / temperature)`, to twelve decimals, with a sum of 1.

    Decimal arithmetic is the same on every machine, which powers of floats are not.
    """
    context = Context(prec=40)
    exponent = context.divide(Decimal(1), Decimal(repr(temperature)))
    largest = max(sizes.values())
    # Against the largest, so that no power is out of range.
    powers = {
        name: Fraction(context.power(context.divide(Decimal(size), Decimal(largest)), exponent))
        for name, size in sizes.items()
    }
    scale, whole = 10**_TEMPERED_DIGITS, sum(powers.values(), Fraction(0))
    exact = {name: power * scale / whole for name, power in powers.items()}
    parts = {name: max(1, int(value)) for name, value in exact.items()}
    # The largest takes what rounding left: by less than one part in 10^12 a source.
    parts[max(sorted(parts), key=parts.__getitem__)] += scale - sum(parts.values())
    return {name: Fraction(part, scale) for name, part in parts.items()}
