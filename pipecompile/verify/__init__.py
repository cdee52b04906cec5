"""Compares a split model's step with the unsplit model's: what differs, and in which module it begins."""
