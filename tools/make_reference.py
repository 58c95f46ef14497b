"""Writes the generated pages of the documentation: every configuration key, every command.

    .venv/bin/python tools/make_reference.py

The texts are the code's own: docstrings and `description` of the schema, `help` of the parser. What the code does not
say is an empty cell here. tests/docs fails when a page is older than the code.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from megatron_davinci.cli.main import COMMANDS
from megatron_davinci.config import RunConfig
from megatron_davinci.config.model import PRESETS, ModelConfig
from megatron_davinci.config.units import parse_tokens

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"
MADE_BY = "<!-- Made by tools/make_reference.py from the code; change the code, then run it again. -->"
_PLAIN = {int: "integer", float: "number", bool: "`true` or `false`", str: "text", Path: "path"}
_BOUNDS = (
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Ge, "ge", "≥"),
    (annotated_types.Lt, "lt", "<"),
    (annotated_types.Le, "le", "≤"),
)

CONFIGURATION_HEAD = f"""{MADE_BY}
# Configuration

One YAML file decides a run. A key that is not listed here is an error, and the error names the nearest one.
Any key may be set on the command line too, as `dotted.key=value`; positions of a list are numbers:

```bash
davinci train examples/quickstart/config.yaml \\
  train.micro_batch_size=4 curriculum.0.tokens=2M
```

`NAME` stands for a name that you choose, `N` for a position in a list, from 0 on. A token count is a number or text
like `4T`, `100B`, `2.5M`, `300k`, with decimal scales. Paths are relative to the working directory.
"""

COMMANDS_HEAD = f"""{MADE_BY}
# Commands

Every command ends with code 0, or with 2 and one screen on standard error that says what to mend
([errors and exit codes](errors.md)). `davinci --version` prints the version.
"""


def main() -> None:
    """Write the pages."""
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """The generated pages by file name."""
    return {"configuration.md": configuration_page(), "cli.md": commands_page()}


# ---- configuration ---------------------------------------------------------------------------------------


def configuration_page() -> str:
    """Every section of the schema with its keys, types, defaults and descriptions."""
    parts = [CONFIGURATION_HEAD]
    for path, section in sections(RunConfig):
        if not path:
            rows = [_row(name, field) for name, field in section.model_fields.items()]
            parts += ["## The file", _text(section), _table(rows, "section")]
            continue
        rows = [_row(name, field) for name, field in section.model_fields.items()]
        parts += [f"## `{path}`", _text(section), _table(rows, "key")]
        if section is ModelConfig:
            parts += ["### Presets", _presets()]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def sections(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """A section and all below it, each with its dotted path."""
    yield path, section
    for name, field in section.model_fields.items():
        here = f"{path}.{name}" if path else name
        for suffix, inner in _inner_sections(field.annotation):
            yield from sections(inner, here + suffix)


def _inner_sections(annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "", annotation
    elif origin is typing.Annotated:
        yield from _inner_sections(arguments[0])
    elif origin is list:
        yield from ((".N" + suffix, inner) for suffix, inner in _inner_sections(arguments[0]))
    elif origin is dict:
        yield from ((".NAME" + suffix, inner) for suffix, inner in _inner_sections(arguments[1]))
    elif origin in (typing.Union, types.UnionType):
        for option in arguments:
            yield from _inner_sections(option)


def _row(name: str, field: FieldInfo) -> list[str]:
    inner = [section for _, section in _inner_sections(field.annotation)]
    # A section without a description of its own is described by its class.
    description = field.description or (
        _text(inner[0]).split(". ")[0].split("\n")[0].rstrip(".") if inner else ""
    )
    return [f"`{name}`", type_text(field.annotation, field.metadata), _default(field), description]


def type_text(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """A type in a reader's words, with its bounds."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if any(isinstance(item, BeforeValidator) and item.func is parse_tokens for item in metadata):
        text = "token count"
    elif origin is typing.Annotated:
        # Weights of a mixture are the text that is annotated inside another type.
        weight = arguments[0] is str
        return "share, as decimal text or number" if weight else type_text(arguments[0], arguments[1:])
    elif origin in (typing.Union, types.UnionType):
        named = [type_text(option, metadata) for option in arguments if option is not type(None)]
        return "; or ".join([*named, *(["`null`"] if type(None) in arguments else [])])
    elif origin is typing.Literal:
        return _either([f"`{choice}`" for choice in arguments])
    elif origin is list:
        text = f"list of {_several(arguments[0])}"
    elif origin is dict:
        text = f"mapping of names to {_several(arguments[1])}"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    else:
        text = _PLAIN[annotation]
    bounds = [
        f"{sign} {_bound(getattr(item, name))}"
        for item in metadata
        for kind, name, sign in _BOUNDS
        if isinstance(item, kind)
    ]
    return ", ".join([text, *bounds])


def _either(choices: list[str]) -> str:
    return ", ".join(choices[:-1]) + f" or {choices[-1]}" if len(choices) > 1 else choices[0]


def _several(annotation: Any) -> str:
    text = type_text(annotation)
    share = "share, as decimal text or number"
    several = {
        "section": "sections",
        "path": "paths",
        share: "shares",
        f"{share}; or section": "shares or sections",
    }
    return several.get(text, text)


def _bound(value: float) -> str:
    return f"2^{value.bit_length() - 1}" if isinstance(value, int) and value >= 2**31 else f"{value:g}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "the section's defaults"
    # As YAML writes them.
    if value is None or isinstance(value, bool):
        return f"`{json.dumps(value)}`"
    return "none" if value == {} else f"`{value}`"


def _of_preset(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"`{key}: {each}`" for key, each in value.items())
    return f"`{json.dumps(value)}`" if value is not None else "none"


def _presets() -> str:
    keys = list(dict.fromkeys(key for preset in PRESETS.values() for key in preset))
    rows = [[f"`{key}`", *(_of_preset(preset.get(key)) for preset in PRESETS.values())] for key in keys]
    sizes = [f"{ModelConfig.model_validate({'preset': name}).parameters():,}" for name in PRESETS]
    rows.append(["parameters", *sizes])
    return _grid(["key", *(f"`{name}`" for name in PRESETS)], rows)


# ---- commands --------------------------------------------------------------------------------------------


def commands_page() -> str:
    """Every command and sub-command with its arguments."""
    parts = [COMMANDS_HEAD]
    for name, (module, help_text) in COMMANDS.items():
        parser = argparse.ArgumentParser(prog=f"davinci {name}", description=help_text)
        importlib.import_module(module).add_arguments(parser)
        parts += _command(parser, help_text, "##")
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _command(parser: argparse.ArgumentParser, help_text: str, heading: str) -> list[str]:
    parts = [f"{heading} `{parser.prog}`", help_text[0].upper() + help_text[1:] + "."]
    actions = [
        a for a in parser._actions if not isinstance(a, argparse._HelpAction | argparse._SubParsersAction)
    ]
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        usage = " ".join([parser.prog, *(_usage(action) for action in actions)])
        parts.append(f"```text\n{usage}\n```")
    if actions:
        parts.append(_grid(["argument", "", "what"], [_argument(action) for action in actions]))
    for group in groups:
        helps = {choice.dest: choice.help or "" for choice in group._choices_actions}
        for name, inner in group.choices.items():
            parts += _command(inner, helps.get(name, name), heading + "#")
    return parts


def _argument(action: argparse.Action) -> list[str]:
    if action.choices:
        text = _either([f"`{choice}`" for choice in action.choices])
    elif action.default is not None and action.default != []:
        text = f"default `{action.default}`"
    else:
        text = "required" if action.required and action.nargs != "*" else ""
    return [f"`{_name(action)}`", text, action.help or ""]


def _name(action: argparse.Action) -> str:
    value = str(action.metavar or action.dest.upper().replace("_", "-"))
    if action.option_strings:
        return f"{action.option_strings[-1]} {value}" if action.nargs != 0 else action.option_strings[-1]
    return value if action.metavar else action.dest.upper()


def _usage(action: argparse.Action) -> str:
    name = _name(action)
    if action.option_strings:
        return name if action.required else f"[{name}]"
    return {"+": f"{name} [{name} ...]", "*": f"[{name} ...]", "?": f"[{name}]"}.get(str(action.nargs), name)


# ---- Markdown --------------------------------------------------------------------------------------------


def _text(section: type[BaseModel]) -> str:
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(section) or "")


def _table(rows: list[list[str]], first: str) -> str:
    return _grid([first, "type", "default", "what"], rows)


def _grid(headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    main()
