"""From costs to a plan that fits: the search, memory, recomputation, replicas, and what a rehearsal corrects."""
