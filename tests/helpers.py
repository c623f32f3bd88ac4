"""What tests of many rooms need."""

import pytest


def refused(capsys, call, *args, **kwargs):
    """The one line on stderr of a call that ends with status 2, as a user's mistake does."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*args, **kwargs)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]
