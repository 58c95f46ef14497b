"""The lab: a question as a design, its runs, what they say, and how sure that is."""
