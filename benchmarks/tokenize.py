"""Text to a source: our job against `tokenizers` on all cores, and whether memory stays flat. See `tokenizing.py`.

The benchmark itself is in `tokenizing.py`, because a script in this folder that wants the standard library's
`tokenize` (numpy does) finds this file first. It then gets the library's.

figures: vs_tokenizers, mb_per_second, rss_growth_10x
"""

import sys

if __name__ == "__main__":
    import tokenizing

    tokenizing.main()
else:
    here = sys.path.pop(0)
    del sys.modules["tokenize"]
    try:
        import tokenize  # noqa: F401
    finally:
        sys.path.insert(0, here)
