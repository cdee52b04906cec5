"""Functions that a captured graph may call, and torch helpers shared by all passes: sizes, random numbers."""
