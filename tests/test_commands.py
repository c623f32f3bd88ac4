"""python -m nanorlhf: which commands there are, and what is no command."""

import sys

import pytest

from nanorlhf.__main__ import COMMANDS, main
from tests.helpers import refused
from tests.test_house import PACKAGE


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_each_command_in_a_line_of_its_own(monkeypatch, capsys, flag):
    monkeypatch.setattr(sys, "argv", ["nanorlhf", flag])
    main()  # and exits 0
    said = capsys.readouterr()
    usage, _, *lines = said.out.splitlines()
    assert usage.startswith("usage: python -m nanorlhf COMMAND") and not said.err
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert all(len(line.split()) > 4 and len(line) < 80 for line in lines)
    assert set(COMMANDS) == {path.stem for path in PACKAGE.glob("tools/[a-z]*.py")}


@pytest.mark.parametrize("words", [[], ["evalute"], ["--halp"]])
def test_what_is_no_command_is_refused_with_the_names_of_those_there_are(
    monkeypatch, capsys, words
):
    monkeypatch.setattr(sys, "argv", ["nanorlhf", *words])
    said = refused(capsys, main)
    assert repr("".join(words)) in said and all(name in said for name in COMMANDS)


def test_a_commands_own_help_is_its_own(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nanorlhf", "plot", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and "--runs" in capsys.readouterr().out
