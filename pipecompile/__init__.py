"""pipecompile trains any PyTorch model split over several devices, without a rewrite."""
