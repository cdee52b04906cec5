"""The data that passes hand to each other: graphs, clusters, plans, programs, timelines. Frozen, and free of torch."""
