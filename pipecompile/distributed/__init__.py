"""One process per rank: the same program over torch.distributed."""
