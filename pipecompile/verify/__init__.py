"""Is it exact? A split model's step beside the unsplit model's, what differs, and where that begins."""
