"""How long the command line takes to start.

python bench/startup.py    # one JSON line: seconds of `unmask --help` and `unmask --version`
"""

import argparse
import subprocess
import sys
from functools import partial

from harness import say, seconds_of


def start(option: str) -> None:
    command = [sys.executable, "-m", "unmask.cli.main", option]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=9)
    options = parser.parse_args()
    seconds = {
        option: seconds_of(partial(start, option), options.times) for option in ("--help", "--version")
    }
    say("startup", seconds=seconds)


if __name__ == "__main__":
    main()
