"""Data Darwinism: raw files to a corpus whose every document knows its level, its source and what was done to it.

A recipe (`recipe`) names sources and steps of the catalogue (`catalogue`, one class a step, grouped by level). `run`
carries it out as datatrove pipelines: `acquire` reads, steps change, judge and score, `parts` writes. A document that
a step turns away is not lost: it lies in `dropped/` or `quarantine/` with the reason, and the run ends by counting
that every document that went in came out somewhere. The levels are those of arXiv 2602.07824.
"""
