"""`davinci data neighbours | cluster`: a tokenised source with related documents together, or in clusters."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add_actions(actions: Any) -> None:
    """Declare the actions' arguments.

    Args:
        actions: The sub-parsers of `davinci data`.
    """
    near = actions.add_parser(
        "neighbours",
        help="write a source anew with related documents behind one another (in-context pretraining)",
    )
    near.add_argument(
        "--group-tokens", type=int, default=4096, help="of a group, which is one sequence (default: 4096)"
    )
    near.add_argument(
        "--neighbours", type=int, default=20, help="that each document has in the graph (default: 20)"
    )
    cluster = actions.add_parser(
        "cluster", help="part a source into clusters, each a source of a mixture (CLIMB)"
    )
    cluster.add_argument("--clusters", type=int, required=True, help="how many")
    for action in (near, cluster):
        action.add_argument("source", help="folder of a tokenised source")
        action.add_argument("--out", required=True, help="folder to make")
        action.add_argument(
            "--dimensions", type=int, default=64, help="of the documents' vectors (default: 64)"
        )
        action.add_argument(
            "--seed", type=int, default=0, help="draws the projection and the centres (default: 0)"
        )


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen action."""
    from megatron_davinci.data.places import local_path
    from megatron_davinci.errors import ConfigError

    arguments.source, arguments.out = local_path(arguments.source), local_path(arguments.out)
    for name in ("group_tokens", "neighbours", "clusters", "dimensions"):
        if getattr(arguments, name, 1) < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} is too small.",
                found=getattr(arguments, name),
                expected="at least 1",
            )
    return ACTIONS[arguments.action](arguments)


def order_by_neighbours(arguments: argparse.Namespace) -> int:
    """Write the source, and say how near its neighbours are."""
    import numpy as np

    from megatron_davinci.cli.screen import Screen
    from megatron_davinci.darwin.arrange import closeness, groups_of, neighbours, path
    from megatron_davinci.darwin.rearranged import Documents, arrangement, write_source
    from megatron_davinci.darwin.vectors import vectors

    documents = Documents(arguments.source)
    found = vectors(documents, arguments.dimensions, seed=arguments.seed)
    order = path(*neighbours(found, arguments.neighbours, arguments.seed))
    groups = groups_of(order, documents.lengths, arguments.group_tokens)
    drawn = np.random.default_rng(arguments.seed).permutation(len(documents))
    near = {
        "as they were": closeness(found, np.arange(len(documents))),
        "in a drawn order": closeness(found, drawn),
        "in this order": closeness(found, order),
    }
    parameters = {
        key: getattr(arguments, key) for key in ("group_tokens", "neighbours", "dimensions", "seed")
    }
    facts = arrangement("neighbours", parameters, documents.manifest, groups=len(groups), similarity=near)
    write_source(documents, groups, arguments.out, documents.manifest.name, facts, documents.rows())
    screen = Screen()
    screen.table(
        f"{len(documents):,} documents in {len(groups):,} groups",
        [("similarity of one to the next", "left"), ("mean cosine", "right")],
        [[name, f"{value:.3f}"] for name, value in near.items()],
    )
    screen.console.print(f"\n{arguments.out}", soft_wrap=True)
    return 0


def part_into_clusters(arguments: argparse.Namespace) -> int:
    """Write a source for each cluster."""
    import numpy as np

    from megatron_davinci.cli.screen import Screen
    from megatron_davinci.darwin.arrange import k_means
    from megatron_davinci.darwin.rearranged import Documents, arrangement, write_source
    from megatron_davinci.darwin.vectors import vectors
    from megatron_davinci.errors import ConfigError

    documents = Documents(arguments.source)
    if arguments.clusters > len(documents):
        raise ConfigError(
            "There are more clusters than documents.",
            found=arguments.clusters,
            expected=f"at most {len(documents):,}",
        )
    found = vectors(documents, arguments.dimensions, seed=arguments.seed)
    own = k_means(found, arguments.clusters, arguments.seed)
    parameters = {key: getattr(arguments, key) for key in ("clusters", "dimensions", "seed")}
    rows, shown = documents.rows(), []
    for cluster in range(arguments.clusters):
        members = np.nonzero(own == cluster)[0]
        centre = found[members].mean(axis=0)
        near = float((found[members] @ centre).mean() / max(1e-12, np.linalg.norm(centre)))
        name = f"{documents.manifest.name}.c{cluster:0{len(str(arguments.clusters - 1))}d}"
        facts = arrangement("cluster", parameters, documents.manifest, cluster=cluster, similarity=near)
        groups = [members[k : k + 1] for k in range(len(members))]
        made = write_source(documents, groups, arguments.out / name, name, facts, rows)
        shown.append([name, f"{made.documents:,}", f"{made.tokens:,}", f"{near:.3f}"])
    screen = Screen()
    screen.table(
        f"{len(documents):,} documents in {arguments.clusters} clusters",
        [
            ("source", "left"),
            ("documents", "right"),
            ("tokens", "right"),
            ("mean cosine to the centre", "right"),
        ],
        shown,
    )
    screen.console.print(f"\n{arguments.out}", soft_wrap=True)
    return 0


ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "neighbours": order_by_neighbours,
    "cluster": part_into_clusters,
}
