"""megatron-davinci: the daVinci-LLM pretraining recipe on Megatron-Core.

Importing the package imports neither torch nor Megatron-Core; each room does so when it needs them.
"""

from megatron_davinci.platform.import_hook import install as _install
from megatron_davinci.version import __version__

_install()

__all__ = ["__version__"]
