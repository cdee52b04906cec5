"""Functions that a captured graph may call, and helpers of torch that all passes share: sizes, random numbers."""
