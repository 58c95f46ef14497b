"""Imports where a browser is installed that runs without a screen (`needs("chromium")`)."""

import shutil

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    raise ImportError("there is no chromium on the path")
