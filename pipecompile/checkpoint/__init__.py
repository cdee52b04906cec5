"""Training states on disk, through torch.distributed.checkpoint: the same files for any number of stages."""
