"""Runs a recipe that asks models against one endpoint: says what it will cost, then makes the corpus and its page.

    python examples/rephrasing/run.py examples/rephrasing/wrap.yaml --url http://gpu-node:8000/v1 --model gpt-oss-120b
    python examples/rephrasing/run.py examples/darwin_science/recipe.yaml --url http://127.0.0.1:8000/v1 --model tiny

The same job runs against a model of your own behind `davinci serve`, which tries the machinery out, and against a
large one behind vLLM, SGLang or a provider, which is what its gates are for. Without --go only the cost is said. The
recipe is written anew with that endpoint beside the first one, and named after the model: answers of models are kept
apart.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_davinci.cli.main import main as davinci


def with_endpoint(recipe: dict[str, Any], endpoint: dict[str, Any], name: str) -> dict[str, Any]:
    """The recipe with one endpoint for all steps that ask a model; what else they say of theirs stays."""
    steps = []
    for step in recipe["steps"]:
        if isinstance(step, dict):
            [(kind, given)] = step.items()
            if given and "endpoint" in given:
                step = {
                    kind: given
                    | {"endpoint": given["endpoint"] | endpoint, "answers": f"answers-{name}.sqlite"}
                }
        steps.append(step)
    return recipe | {"steps": steps, "out": f"{recipe['out']}-{name}"}


def main() -> int:
    """Plan, and with --go run and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--url", required=True, help="up to and with /v1")
    parser.add_argument("--model", required=True, help="as the server calls it")
    parser.add_argument("--key-variable", help="environment variable with the key")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--input-price", type=float, default=0.0, help="of a million prompt tokens")
    parser.add_argument("--output-price", type=float, default=0.0, help="of a million answer tokens")
    parser.add_argument("--tokens-per-second", type=float, help="answer tokens that the server writes in all")
    parser.add_argument("--go", action="store_true", help="run it, after the cost is said")
    arguments = parser.parse_args()
    name = re.sub(r"[^A-Za-z0-9]+", "-", arguments.model).strip("-").lower()
    endpoint = {
        "url": arguments.url, "model": arguments.model, "key_variable": arguments.key_variable,
        "concurrency": arguments.concurrency, "input_price": arguments.input_price,
        "output_price": arguments.output_price,
    }  # fmt: skip
    recipe = yaml.safe_load(arguments.recipe.read_text(encoding="utf-8"))
    path = arguments.recipe.with_name(f"{arguments.recipe.stem}-{name}.yaml")
    made = with_endpoint(recipe, endpoint, name)
    path.write_text(yaml.safe_dump(made, sort_keys=False, allow_unicode=True), encoding="utf-8")
    pace = ["--tokens-per-second", str(arguments.tokens_per_second)] if arguments.tokens_per_second else []
    code = davinci(["data", "plan", str(path), *pace])
    if code or not arguments.go:
        return code
    code = davinci(["data", "run", str(path)])
    return code or davinci(["data", "report", str(path.parent / made["out"])])


if __name__ == "__main__":
    sys.exit(main())
