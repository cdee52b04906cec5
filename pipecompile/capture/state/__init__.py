"""Tracks the Python state that forward reads and changes: attributes, globals, closures, containers, code."""
