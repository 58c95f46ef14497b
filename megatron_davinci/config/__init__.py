"""The typed run configuration: one file a section, YAML in, dotted overrides, clear errors."""

from megatron_davinci.config.layout import Layout, check_layout
from megatron_davinci.config.load import dump_config, load_config, validate
from megatron_davinci.config.run import RunConfig

__all__ = ["Layout", "RunConfig", "check_layout", "dump_config", "load_config", "validate"]
