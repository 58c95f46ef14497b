"""Pages and plots: offline, self-contained, readable in light and dark and on paper.

`page.Page` is one HTML file, `plots` are what stands on it, `run.write_run_report` is the page of a run.
Matplotlib and Jinja2 are imported when something is drawn, not when this package is.
"""
