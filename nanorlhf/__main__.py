"""`python -m nanorlhf COMMAND ...` hands over to nanorlhf/tools/COMMAND.py."""

import importlib
import sys

from nanorlhf.config import die, from_cli

COMMANDS = """
evaluate chat inspect sample label agreement serve plot data export memory bench doctor exercise
""".split()


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        die(f"usage: python -m nanorlhf {{{','.join(COMMANDS)}}} [--help]")
    tool = importlib.import_module(f"nanorlhf.tools.{sys.argv[1]}")
    sys.argv[0] = f"python -m nanorlhf {sys.argv[1]}"
    tool.main(from_cli(tool.Config, sys.argv[2:]))


if __name__ == "__main__":
    main()
