"""The executor `ray`: datatrove's, on a cluster that is there, or one that is started on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from datatrove.executor.ray import RayPipelineExecutor

from megatron_davinci.darwin.on_cluster import OnCluster
from megatron_davinci.darwin.recipe import RayCluster
from megatron_davinci.errors import EnvironmentProblem


class RayExecutor(OnCluster, RayPipelineExecutor):
    """Runs the tasks that are not done on a Ray cluster, or on one that is started on this machine."""

    kind = "RAY"

    def __init__(self, pipeline: list[Any], tasks: int, workers: int, log: Path, cluster: RayCluster) -> None:
        super().__init__(
            pipeline,
            tasks=tasks,
            workers=workers,
            cpus_per_task=cluster.cpus,
            mem_per_cpu_gb=cluster.memory_gb,
            logging_dir=str(log),
        )
        self.address = cluster.address

    def run(self) -> None:
        """Run them.

        Raises:
            EnvironmentProblem: Ray is not installed, has no room for a task, or tasks have failed.
        """
        log = Path(self.logging_dir.path)
        if self.get_incomplete_ranks():
            _join(self.address)
            self._fits()
            super().run()
        self.check_done(log, "logs/*.log")

    def _fits(self) -> None:
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        memory = self.mem_per_cpu_gb * self.cpus_per_task * 2**30
        if not any(
            node.get("CPU", 0) >= self.cpus_per_task and node.get("memory", 0) >= memory for node in nodes
        ):
            have = [f"{node.get('CPU', 0):g} cores, {node.get('memory', 0) / 2**30:.1f} GB" for node in nodes]
            raise EnvironmentProblem(
                "No node of the Ray cluster has room for a task, which would wait for ever.",
                found="; ".join(have),
                expected=f"{self.cpus_per_task} cores, {memory / 2**30:.1f} GB",
                do="ask for less in the section `ray` of the recipe",
            )


def _join(address: str | None) -> None:
    try:
        import ray
    except ImportError as error:
        raise EnvironmentProblem(
            "The executor `ray` needs Ray, which is not installed.",
            found=error,
            do="pip install 'megatron-davinci[ray]'",
        ) from error
    if ray.is_initialized():
        return
    try:
        ray.init(
            address=address or os.environ.get("RAY_ADDRESS"),
            include_dashboard=False if address is None and "RAY_ADDRESS" not in os.environ else None,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except ConnectionError as error:
        raise EnvironmentProblem(
            "The Ray cluster does not answer.", where=address or os.environ.get("RAY_ADDRESS"), found=error
        ) from error
