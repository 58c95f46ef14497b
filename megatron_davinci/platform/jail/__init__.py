"""The other side of `platform/sandbox.py`: the small process that shuts a program in, watches it and ends it.

Standard library only: it is started for every program, and what it does not import cannot fail or be slow.
"""
