"""What becomes of runs that are killed, and whether the trials that say so would notice a mistake.

Runs of two ranks (data-parallel, tensor-parallel, pipeline-parallel, in turn) are killed by SIGKILL at random: a
rank, all ranks, a data worker, the launcher; in a step, a save in the background, an evaluation, while they recover
from the kill before, while they are imported; and exports of what they saved. Each is started again until it is
done, and held against the run that nothing happened to. After some kills a bit of the newest checkpoint is flipped.
Then each mistake of `tests/faults/mutants.py` is made in turn, and its trial is to notice it, and without it to
notice nothing.

Seconds from a kill to the next step are counted to the first new step on record, with the time that the others took
to notice and without the start of the next processes up to the first line of their program.

figures: kills, bitwise_equal_fraction, samples_lost, samples_repeated, damaged_loaded, older_loaded, damaged_planted,
    exports_whole_fraction, survivors_ended_fraction (without being killed), survivors_ended_by_themselves_fraction
    (within two seconds, before they were told to as a launcher tells them), kill_to_step_seconds_median,
    kill_to_step_seconds_most, runs,
    kills_<kind>, mutants, mutants_caught_fraction, clean_accepted_fraction, seconds
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import common

from tests.faults import chains, gauntlet, kills
from tests.faults.mutants import MUTANTS


def main() -> None:
    """Measure and report."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--kills", type=int, default=200, help="0: none")
    parser.add_argument("--kills-a-run", type=int, default=12)
    parser.add_argument(
        "--launched-every", type=int, default=10, help="kills of runs by `davinci train`; 0: none"
    )
    parser.add_argument("--mutants", type=int, default=len(MUTANTS), help="how many; 0: none")
    arguments = parser.parse_args()
    began, figures = time.perf_counter(), dict[str, float]()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.kills:
            figures |= killing(
                Path(folder), arguments.kills, arguments.kills_a_run, arguments.launched_every, arguments.seed
            )
        if arguments.mutants:
            figures |= mistakes(Path(folder), arguments.mutants)
    figures["seconds"] = time.perf_counter() - began
    common.write(arguments.json, figures, {})


def killing(folder: Path, count: int, a_run: int, launched_every: int, seed: int) -> dict[str, float]:
    """Kill runs.

    Args:
        folder: To work in.
        count: How many kills at least.
        a_run: Kills of one run at most.
        launched_every: Each so many-th kill is of a run that `davinci train` started.
        seed: Of what is killed and when.
    """
    chance = random.Random(seed)
    undisturbed = {}
    for layout in kills.LAYOUTS:
        (folder / layout).mkdir()
        undisturbed[layout] = chains.Undisturbed(folder / layout, layout)
        say(f"{layout}: undisturbed")
    aims = chains.kinds(chance, launched_every)
    ended: list[chains.Chain] = []
    exported: list[tuple[int, bool]] = []
    while (left := count - sum(len(one.kills) for one in ended) - sum(n for n, _ in exported)) > 0:
        number = len(ended)
        of = undisturbed[list(kills.LAYOUTS)[number % len(kills.LAYOUTS)]]
        name = f"killed-{number}"
        done = chains.chain(of, aims, min(a_run, left), chance, name=name, snapshots=number % 4 == 3)
        ended.append(done)
        exported.append(chains.killed_exports(of, of.root / name, 1, chance))
        say(
            f"{done.layout}: {len(done.kills)} kills, "
            + ("the same run" if done.equal else f"NOT the same run: {done.problem}")
            + f"; {sum(len(one.kills) for one in ended) + sum(n for n, _ in exported)} of {count} kills"
        )
    every = [(chain, kill) for chain in ended for kill in chain.kills]
    seconds = [kill.seconds for _, kill in every if kill.seconds is not None]
    kinds = Counter(kill.kind for _, kill in every) + Counter({"export": sum(n for n, _ in exported)})
    places = Counter(kill.place or "start" for _, kill in every)
    return {
        "kills": sum(kinds.values()),
        "bitwise_equal_fraction": sum(chain.equal for chain, _ in every) / len(every),
        "samples_lost": sum(one.samples_lost for one in ended),
        "samples_repeated": sum(one.samples_repeated for one in ended),
        "damaged_loaded": sum(one.damaged_loaded for one in ended),
        "older_loaded": sum(one.older_loaded for one in ended),
        "damaged_planted": sum(len(one.damaged) for one in ended),
        "exports_whole_fraction": sum(whole for _, whole in exported) / len(exported),
        "survivors_ended_fraction": sum(kill.ended for _, kill in every) / len(every),
        "survivors_ended_by_themselves_fraction": sum(kill.noticed for _, kill in every) / len(every),
        "kill_to_step_seconds_median": statistics.median(seconds) if seconds else float("nan"),
        "kill_to_step_seconds_most": max(seconds, default=float("nan")),
        "kills_followed_by_a_step": len(seconds),
        "runs": len(ended),
        **{f"kills_{kind.replace(' ', '_')}": number for kind, number in sorted(kinds.items())},
        **{f"killed_in_{place.replace(' ', '_')}": number for place, number in sorted(places.items())},
    }


def mistakes(folder: Path, count: int) -> dict[str, float]:
    """Make each mistake in turn, and none, and see what the trials notice.

    Args:
        folder: To work in.
        count: How many of the mistakes.
    """
    caught, clean = [], []
    of_trials: dict[str, list[str]] = {}
    for mutant in list(MUTANTS)[:count]:
        of_trials.setdefault(gauntlet.TRIALS[mutant].__name__, []).append(mutant)
    for name, mutants in of_trials.items():
        trial = gauntlet.TRIALS[mutants[0]]
        for mutant in ("", *mutants):
            where = folder / f"{name} {mutant}".strip().replace(" ", "-")
            where.mkdir()
            noticed = trial(where, mutant)
            (caught if mutant else clean).append(bool(noticed) == bool(mutant))
            say(f"{name}, {mutant or 'nothing wrong'}: {noticed or 'nothing noticed'}")
    return {
        "mutants": len(caught),
        "mutants_caught_fraction": sum(caught) / len(caught),
        "clean_accepted_fraction": sum(clean) / len(clean),
        "trials": len(of_trials),
    }


def say(line: str) -> None:
    """A line on the terminal's error stream."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
