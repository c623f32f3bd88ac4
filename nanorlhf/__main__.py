"""python -m nanorlhf COMMAND [flags]; COMMAND --help lists its flags

evaluate   the ladder: gold, win rate and KL of every model in out/
chat       talk to a model in the terminal
inspect    a page with every token of a PPO rollout
sample     write a model's answers to prompts into a file
label      judge answers on a page, or have a simulated labeler do it
agreement  how far labelers and reward models agree
serve      a chat page whose users' likes are feedback
plot       draw metrics of runs over their steps
data       what a data file is taken for, before anything trains on it
export     a folder that transformers loads, with a model card
memory     what a run would need of memory
bench      how fast the stages are on this machine
doctor     what is wrong with a run, from its metrics
exercise   exercises of docs/course that check themselves
"""

import importlib
import re
import sys

from nanorlhf.config import die, from_cli

COMMANDS = re.findall(r"^ *(\w+)  ", __doc__, re.M)  # each is a module of nanorlhf/tools/


def main():
    command = "".join(sys.argv[1:2])
    if command in ("--help", "-h"):
        print(f"usage: {__doc__}", end="")
        return
    if command not in COMMANDS:
        known = ",".join(COMMANDS)
        die(f"no command {command!r}; usage: python -m nanorlhf {{{known}}} [--help]")
    tool = importlib.import_module(f"nanorlhf.tools.{command}")
    sys.argv[0] = f"python -m nanorlhf {command}"
    tool.main(from_cli(tool.Config, sys.argv[2:]))


if __name__ == "__main__":
    main()
