"""Files that are whole or not there."""

import pytest

from nanorlhf.machine import durable


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    durable.write(path, lambda partial: partial.write_text("one"))

    def fails(partial):
        partial.write_text("tw")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        durable.write(path, fails)
    assert path.read_text() == "one"
