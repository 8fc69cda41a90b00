import pytest
from PIL import Image

from data import beside
from train.config import UserError


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def test_masks_and_depth_maps_of_pictures_are_left_out(tmp_path):
    fill(tmp_path, "a.png", "a.mask.png", "a.depth.png", "masks/a.png", "b.mask.png", "sub/c.jpg")
    assert list(beside.find(tmp_path).files) == ["a.png", "b.mask.png", "sub/c.jpg"]


def test_a_target_is_beside_its_picture_or_in_the_same_place_elsewhere(tmp_path):
    found = beside.find(fill(tmp_path, "a.b.png", "sub/c.jpg"))
    assert list(beside.targets(found, ".txt").values()) == [
        tmp_path / "a.b.txt",
        tmp_path / "sub/c.txt",
    ]
    elsewhere = beside.targets(found, ".txt", tmp_path / "out")
    assert elsewhere["sub/c.jpg"] == tmp_path / "out/sub/c.txt"


def test_pictures_that_can_have_no_target_are_problems(tmp_path):
    found = beside.find(fill(tmp_path, "a.jpg", "a.png", f"{'x' * 230}.png"))
    assert list(beside.targets(found, ".depth.png")) == ["a.jpg"]
    assert "share a.depth.png with a.jpg" in found.problems["a.png"]
    assert "too long" in found.problems[f"{'x' * 230}.png"]


def test_links_out_are_named_but_not_followed(tmp_path):
    fill(tmp_path, "set/a.png", "secret.png")
    (tmp_path / "set/link.png").symlink_to(tmp_path / "secret.png")
    found = beside.find(tmp_path / "set")
    assert list(found.files) == ["a.png"] and list(found.problems) == ["link.png"]


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("")])
def test_a_folder_without_pictures_is_a_mistake(tmp_path, make):
    make(tmp_path / "set")
    with pytest.raises(UserError, match="source=.*give the folder that"):
        beside.find(tmp_path / "set")


def test_batches_are_full_and_in_order_however_many_cannot_be_read(tmp_path):
    names = [f"{number}.png" for number in range(9)]
    files = {name: tmp_path / name for name in names}
    seen = []

    def read(path):
        if path.stem in "048":
            raise OSError("torn")
        return path.stem

    problems = {}
    batches = list(
        beside.decoded(
            files,
            read,
            batch_size=4,
            problems=problems,
            progress=lambda done, total: seen.append((done, total)),
        )
    )
    assert [[item for _, item in batch] for batch in batches] == [list("1235"), list("67")]
    assert problems == dict.fromkeys(("0.png", "4.png", "8.png"), "cannot be decoded: torn")
    assert seen[0] == (6, 9) and seen[-1] == (9, 9)


def test_few_pictures_are_read_ahead_of_the_model(tmp_path):
    files = {str(number): tmp_path / str(number) for number in range(1000)}
    read = []
    walk = beside.decoded(files, read.append, batch_size=2, problems={})
    next(walk)
    walk.close()
    assert len(read) <= 7


def test_every_picture_is_the_share_of_one_process():
    names = [str(number) for number in range(10)]
    shares = [beside.share(names, rank, 3) for rank in range(3)]
    assert sorted(sum(shares, [])) == names
