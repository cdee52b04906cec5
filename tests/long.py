"""What ``make test`` leaves to ``make long``: the full products of settings, and more random models."""

import os

LONG = bool(os.environ.get("LONG"))
