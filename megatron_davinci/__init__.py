"""megatron-davinci: the daVinci-LLM pretraining recipe on Megatron-Core.

Importing the package imports neither torch nor Megatron-Core; each room does so when it needs them.
"""

from megatron_davinci.version import __version__

__all__ = ["__version__"]
