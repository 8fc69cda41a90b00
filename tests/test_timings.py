import json

from train import timings
from train.timings import Timings


def test_seconds_add_up_over_continuations_and_a_new_run_forgets_them(tmp_path):
    first = Timings(tmp_path, start=0, main=True)
    first.add("previews", 2.0)
    first.write()
    again = Timings(tmp_path, start=10, main=True)
    again.add("previews", 3.0)
    with again.of("checkpoints"):
        pass
    again.write()
    found = timings.read(tmp_path)
    assert found["previews"] == 5.0 and found["startup"] > 0 and "checkpoints" in found
    Timings(tmp_path, start=0, main=True).write()
    assert set(timings.read(tmp_path)) == {"startup"}


def test_only_the_main_process_writes_and_torn_files_are_as_none(tmp_path):
    Timings(tmp_path, start=0, main=False).write()
    assert timings.read(tmp_path) == {}
    for text in ("", "[1]", '{"previews": "long"}'):
        (tmp_path / timings.NAME).write_text(text)
        assert timings.read(tmp_path) == {}


def test_what_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / timings.NAME).mkdir()
    Timings(tmp_path, start=0, main=True).write()
    assert json.dumps(timings.read(tmp_path)) == "{}"
