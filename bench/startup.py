"""How long the command line takes to start.

python bench/startup.py    # one JSON line: seconds of `unmask --help` and `unmask --version`
"""

import argparse
import subprocess
import sys

from common import say, seconds_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=9)
    options = parser.parse_args()
    seconds = {}
    for option in ("--help", "--version"):
        command = [sys.executable, "-m", "unmask.cli.main", option]
        seconds[option] = seconds_of(
            lambda command=command: subprocess.run(command, check=True, stdout=subprocess.DEVNULL),
            options.times,
        )
    say("startup", seconds=seconds)


if __name__ == "__main__":
    main()
