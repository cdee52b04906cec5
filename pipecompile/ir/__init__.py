"""What passes from one pass to the next: graphs, clusters, plans, programs, timelines. Frozen data; knows no torch."""
