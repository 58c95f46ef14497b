"""How far a run is, in words."""

from __future__ import annotations

from megatron_davinci.darwin.watching import Progress

_REASONS = 3


def line(progress: Progress) -> str:
    """One line for a log."""
    over = progress.done == progress.tasks
    state = "done" if over else f"{progress.share:.0%}, {progress.done:,} of {progress.tasks:,} tasks done"
    said = what_was_asked(progress)
    return f"pass {progress.number} of {progress.passes} {state}: {progress.what}" + (
        f"; {said}" if said else ""
    )


def what_was_asked(progress: Progress) -> str:
    """Answers, their pace, the time left, those from disk, and what was not used; empty where no model is asked."""
    asked = progress.asked
    if asked is None:
        return ""
    all_ = asked.answered + asked.known
    parts = [f"{all_:,} answers"]
    if asked.known:
        parts[0] += f" ({asked.known / all_:.0%} from disk)"
    if asked.answered and progress.seconds >= 1:
        minute = 60 / progress.seconds
        parts.append(
            f"{asked.answered * minute:,.0f} a minute, {asked.tokens / progress.seconds:,.0f} tokens/s"
        )
    if progress.left is not None and progress.done < progress.tasks:
        parts.append(f"about {duration(progress.left)} left")
    for name, counts in (("not used", asked.unused), ("asked again", asked.troubles)):
        most = sorted(counts.items(), key=lambda item: -item[1])[:_REASONS]
        if most:
            parts.append(f"{name}: " + ", ".join(f"{reason} {count:,}" for reason, count in most))
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """Seconds in two units at most."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.0f} min"
    hours = minutes / 60
    if hours < 48:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{hours / 24:.1f} days"
