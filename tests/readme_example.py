"""Prints the first example of README.md as a script, for an environment in which only the wheel is installed."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
EXAMPLE = re.compile(r"^```python\n(import .*?)^```", re.MULTILINE | re.DOTALL)

if __name__ == "__main__":
    print(EXAMPLE.findall(README.read_text())[0])
