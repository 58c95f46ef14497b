"""Whether the exports that a run is to make can be made, asked before it begins."""

from __future__ import annotations

import importlib.util

from megatron_davinci.config import RunConfig
from megatron_davinci.convert.families import family_of
from megatron_davinci.errors import ConfigError, EnvironmentProblem


def check_export(config: RunConfig) -> None:
    """Refuse a run whose exports would fail, before it begins.

    Raises:
        ConfigError: No family of Hugging Face models can hold the model.
        EnvironmentProblem: Exports are to be held against transformers, which is not installed.
    """
    export = config.checkpoint.export_hf
    if export is None:
        return
    model = config.model.model_dump(mode="json")
    try:
        family_of(model).check(model)
    except ConfigError as error:
        raise ConfigError(
            "The run is to be exported while it is at work, and its model cannot be.",
            where="checkpoint.export_hf, model",
            found=error.found,
            expected=error.expected,
            do="leave checkpoint.export_hf out, or change the model",
        ) from error
    if export.verify and importlib.util.find_spec("transformers") is None:
        raise EnvironmentProblem(
            "Exports are to be held against transformers, which is not installed.",
            where="checkpoint.export_hf.verify",
            do="pip install 'megatron-davinci[eval]', or set checkpoint.export_hf.verify=false",
        )
