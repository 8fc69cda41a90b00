"""Uploading to a hub that runs here, through the hub's own client."""

import pytest

from scripts.exporting import hub
from tests.hub_stand_in import TOKEN, running
from train.config import RunFailed, UserError


@pytest.fixture
def stand_in(monkeypatch):
    with running() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def files(tmp_path):
    contents = {"README.md": b"# a card\n", "a.safetensors": b"\0" * 5000, "images/00.png": b"png"}
    for name, content in contents.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return {name: tmp_path / name for name in contents}


def test_all_files_arrive_as_one_commit(stand_in, files):
    address = hub.push(files, "me/owl", private=True)
    assert address == f"{stand_in.address}/me/owl"
    assert stand_in.files == {"me/owl": {name: p.read_bytes() for name, p in files.items()}}
    assert stand_in.commits == 1 and stand_in.private == {"me/owl": True}
    files["README.md"].write_text("another")
    hub.push(files, "me/owl", private=True)
    assert stand_in.files["me/owl"]["README.md"] == b"another" and stand_in.commits == 2


def test_a_repository_may_be_public(stand_in, files):
    hub.push(files, "me/owl", private=False)
    assert stand_in.private == {"me/owl": False}
    with pytest.raises(UserError, match="is there and public: private=false uploads"):
        hub.push(files, "me/owl", private=True)
    assert stand_in.commits == 1


@pytest.mark.parametrize("status", [401, 403])
def test_who_may_not_is_told_how(stand_in, files, status):
    stand_in.refuses = status
    with pytest.raises(UserError, match=r"push_to_hub=me/owl: the hub refused.*hf auth login"):
        hub.push(files, "me/owl", private=True)


def test_a_hub_that_fails_is_no_mistake_of_the_user(stand_in, files):
    stand_in.refuses = 404
    with pytest.raises(RunFailed, match=r"the hub refused it .*overwrite=true tries again"):
        hub.push(files, "me/owl", private=True)


def test_a_hub_that_is_not_there_is_named(stand_in, files, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunFailed, match=r"could not be reached .*What was exported is kept"):
        hub.push(files, "me/owl", private=True)


def test_a_name_that_is_none_and_nobody_logged_in_are_told_at_once(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="is no name of a repository.*NAMESPACE/NAME"):
        hub.check("a b/c")
    with pytest.raises(UserError, match="nobody is logged in"):
        hub.check("me/owl")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    hub.check("me/owl")
