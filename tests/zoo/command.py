"""What the entry points over the zoo share: their options, their choice of models, and a warm start."""

from __future__ import annotations

import argparse
import os
import re
import time
import warnings
from collections.abc import Iterable

import torch

from zoo import ZOO
from zoo.check import capture_sample


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of every run over the zoo."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a pattern that names must contain, or a family")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--seconds", type=float, default=120.0, help="for each model")
    parser.add_argument("--write", action="store_true", help="write the page in docs/, if no model is left out")
    return parser


def chosen(names: Iterable[str], pattern: str) -> list[str]:
    """The models whose family is the pattern, or whose name it is found in."""
    return [n for n in names if not pattern or ZOO[n].family == pattern or re.search(pattern, n) is not None]


def one_thread() -> None:
    """Puts a child into the state that all numbers are found in."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def warm_up() -> None:
    """Captures a model, so that the children share what that imports; runs none: threads do not survive a fork."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torchvision  # noqa: F401
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    start = time.perf_counter()
    capture_sample(ZOO["llama"], ZOO["llama"].build())
    print(f"warmed up in {time.perf_counter() - start:.0f} s", flush=True)
