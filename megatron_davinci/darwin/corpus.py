"""A finished corpus: the count that nothing was lost, the manifest, and its files."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_davinci.darwin.parts import read_part
from megatron_davinci.darwin.plan import FORMAT, Plan
from megatron_davinci.darwin.tally import Tally
from megatron_davinci.errors import DataError
from megatron_davinci.files import file_digest, write_json
from megatron_davinci.version import __version__

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk.

    Attributes:
        folder: Where it lies.
        manifest: `corpus.json`.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """Open a corpus.

        Raises:
            DataError: There is none, or it is not done.
        """
        path = folder / "corpus.json"
        if not path.exists():
            raise DataError(
                "There is no finished corpus.",
                where=path,
                do="make it, or go on with it, by `davinci data run RECIPE`",
            )
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest.get("format") != FORMAT:
            raise DataError(
                "The corpus was written by another version.",
                where=path,
                found=manifest.get("format"),
                expected=FORMAT,
            )
        return cls(folder, manifest)

    @property
    def counts(self) -> dict[str, Any]:
        """Documents: `input`, `output`, `dropped` and `quarantined` by step and reason."""
        counts: dict[str, Any] = self.manifest["documents"]
        return counts

    def files(self, kind: str = "documents") -> list[Path]:
        """Files of `documents`, `dropped` or `quarantine`, in order."""
        return files_in(self.folder / kind)

    def records(self, kind: str = "documents") -> Iterator[dict[str, Any]]:
        """Their records, in order."""
        for path in self.files(kind):
            yield from read_part(path)


def files_in(folder: Path) -> list[Path]:
    """Whole files in a folder and those below it, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def finish(plan: Plan, passes: int) -> Corpus:
    """Count what came out against what went in, and write the manifest.

    Raises:
        DataError: A document is missing or was written twice.
    """
    counts = [
        [
            json.loads((plan.work / f"{number:02d}" / "counts" / f"{task:05d}.json").read_text())
            for task in range(plan.tasks)
        ]
        for number in range(passes)
    ]
    total = Tally.merged(each for pass_ in counts for each in pass_)
    documents = by_fate(total)
    entered = [sum(each["entered"] - _derived(each) for each in pass_) for pass_ in counts]
    check(plan.out, documents, entered)
    files = {
        str(path.relative_to(plan.out)): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in files_in(plan.out / "documents")
    }
    dumped = total.dump()
    manifest = {
        "format": FORMAT,
        "name": plan.recipe.name,
        "version": __version__,
        "documents": documents,
        "sources": _by_source(plan, total),
        "operations": plan.operations(),
        **({"models": models} if (models := _by_model(plan, total)) else {}),
        "input": {
            "files": len(plan.files),
            "bytes": sum(file.size for file in plan.files),
            "tasks": plan.tasks,
        },
        "files": files,
    }
    statistics = {key: dumped[key] for key in ("documents", "characters", "histograms", "examples", "counts")}
    write_json(plan.out / "statistics.json", statistics)
    write_json(plan.out / "seconds.json", dumped["seconds"])
    if dumped["requests"]:
        write_json(plan.out / "requests.json", dumped["requests"])
    write_json(plan.out / "corpus.json", manifest)
    return Corpus(plan.out, manifest)


def _derived(counts: dict[str, Any]) -> int:
    return sum(count for key, count in counts["documents"].items() if "/derived/" in key)


def by_fate(total: Tally) -> dict[str, Any]:
    """Documents by what became of them, over all sources."""
    found: dict[str, Any] = {
        "input": 0,
        "derived": 0,
        "output": 0,
        "dropped": Counter(),
        "quarantined": Counter(),
    }
    for key, count in total.documents.items():
        _, what, *rest = key.split("/")
        if what in ("dropped", "quarantined"):
            found[what]["/".join(rest)] += count
        elif what in ("input", "derived", "kept"):
            found["output" if what == "kept" else what] += count
    return found | {kind: dict(sorted(found[kind].items())) for kind in ("dropped", "quarantined")}


def check(out: Path, documents: dict[str, Any], entered: list[int]) -> None:
    """Input + derived = output + dropped + quarantined, as counted and as the files hold.

    Args:
        out: The corpus.
        documents: `by_fate`.
        entered: Documents that entered each pass, those not counted that a step of it made.

    Raises:
        DataError: They differ.
    """
    written = {
        kind: sum(records_in(path) for path in files_in(out / kind))
        for kind in ("documents", "dropped", "quarantine")
    }
    counted = {
        "documents": documents["output"],
        "dropped": sum(documents["dropped"].values()),
        "quarantine": sum(documents["quarantined"].values()),
    }
    came = documents["input"] + documents["derived"]
    if written != counted or came != sum(written.values()) or documents["input"] != entered[0]:
        raise DataError(
            "Documents are missing, or were written twice.",
            where=out,
            found=f"{documents['input']:,} read, {documents['derived']:,} made of them; written: "
            + ", ".join(
                f"{count:,} in {kind} ({counted[kind]:,} counted)" for kind, count in written.items()
            ),
            expected="input + derived = output + dropped + quarantined",
            do="begin anew with --restart; this is a fault of megatron-davinci, please report it",
        )


def _by_model(plan: Plan, total: Tally) -> dict[str, Any]:
    """By step that asks a model: what its answers came to, and their price at the recipe's rates."""
    found: dict[str, Any] = {}
    for step in plan.steps:
        endpoint = getattr(step.parameters, "endpoint", None)
        if endpoint is None or step.name in found:
            continue
        tokens = {
            what: total.counts[f"{step.name}/{what}"] for what in ("prompt_tokens", "completion_tokens")
        }
        price = (
            tokens["prompt_tokens"] * endpoint.input_price
            + tokens["completion_tokens"] * endpoint.output_price
        )
        found[step.name] = {"model": endpoint.model, **tokens, "price": round(price / 1e6, 6)}
    return found


def records_in(path: Path) -> int:
    """Records of a file of documents, without looking into them."""
    if path.name.endswith(".parquet"):
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as table:
            return int(table.metadata.num_rows)
    with open(path, "rb") as raw:
        file: Any = raw
        if path.name.endswith(".zst"):
            import zstandard

            file = io.BufferedReader(
                zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), _BLOCK
            )
        lines = 0
        while block := file.read(_BLOCK):
            lines += block.count(b"\n")
        return lines


def _by_source(plan: Plan, total: Tally) -> dict[str, Any]:
    """By source: what went in, what came out at which level, languages, licence of the recipe."""
    found: dict[str, Any] = {}
    licences = {source.name: source.licence for source in plan.recipe.sources}
    for step in plan.steps:  # what is made of documents may be a source of its own
        made = getattr(step.parameters, "as_source", None)
        if made is not None:
            licences.setdefault(made, None)
    for source, licence in licences.items():
        prefix = f"{source}/"
        levels: dict[str, dict[str, int]] = {}
        for key, count in sorted(total.levels.items()):
            name, level, unit = key.split("/")
            if name == source:
                levels.setdefault(level, {})[unit] = count
        languages = {
            key.rsplit("/", 1)[1]: count
            for key, count in total.documents.items()
            if key.startswith(f"{prefix}language/")
        }
        found[source] = {
            "licence": licence,
            "input": {
                "documents": total.documents[f"{prefix}input"],
                "characters": total.characters[f"{prefix}input"],
            },
            "levels": levels,
            "languages": dict(sorted(languages.items())),
        }
    return found
