"""Gives a model that has no values those that this process keeps: from a checkpoint, or by its own initialisers."""
