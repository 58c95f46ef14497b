"""Texts whose every fact is made up, so that what a model knows of them it has learnt from them."""
