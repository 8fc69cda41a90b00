import json

import numpy as np
import pytest

from eval import compare, rating_page, votes
from eval.evaluated_runs import read_runs
from eval.significance import paired, share, sign_test
from tests.evaluated import evaluated
from train.config import UserError


@pytest.fixture
def runs(tmp_path):
    return [evaluated(tmp_path / name, grey=grey) for name, grey in (("a", 100), ("b", 200))]


def page_of(runs, kind):
    """A page of these runs' pictures and its key."""
    page = runs[0].parent / f"{kind}.html"
    return page, json.loads(
        rating_page.write(page, read_runs(runs), kind=kind, count=24).read_text()
    )


def saved(folder, key, rater, choose, items=None):
    """The file of a person who votes choose(item) on each, or on some."""
    chosen = range(len(key["items"])) if items is None else items
    content = {
        "format": 1,
        "page": key["page"],
        "kind": key["kind"],
        "rater": rater,
        "votes": [{"item": k, "vote": choose(key["items"][k])} for k in chosen],
    }
    file = folder / f"votes-{rater}.json"
    file.write_text(json.dumps(content))
    return file


def for_run(side):
    """Votes for one run, on whichever side of the page it is."""
    return lambda item: ["left", "right"][item["sides"].index(side)]


def prompt_number(item):
    return int(item["prompt"].rsplit(" ", 1)[1])


def test_the_run_that_everybody_prefers_is_found_whatever_side_it_was_on(tmp_path, runs, capsys):
    page, key = page_of(runs, "pair")
    files = [saved(tmp_path, key, name, for_run(1)) for name in ("ann", "ben")]
    compare.main(
        [f"runs=[{runs[0]}, {runs[1]}]", f"rating={page}", f"votes=[{files[0]}, {files[1]}]"]
    )
    said = "People preferred b to a in 100% of 48 votes"
    assert said in capsys.readouterr().out
    found = json.loads((tmp_path / "compare-a-b/compare.json").read_text())["judgement"]
    assert found["p"] == pytest.approx(2 / 2**12) and found["low"] > 0.75
    assert found["agreement"] is None  # all votes the same: nothing to agree on
    assert said in (tmp_path / "compare-a-b/compare.html").read_text()


def test_shares_and_p_are_over_prompts(tmp_path, runs):
    """Of prompts 0 to 7 the second is preferred, of 8 and 9 the first, 10 and 11 are equal."""
    _, key = page_of(runs, "pair")

    def choose(item):
        number = prompt_number(item)
        return "equal" if number > 9 else for_run(int(number < 8))(item)

    found = votes.judgement(key, votes.read([saved(tmp_path, key, "ann", choose)], key))
    of_prompts = np.array([1.0] * 8 + [0.0] * 2 + [0.5] * 2)
    expected = share(np.repeat(of_prompts, 2), np.repeat(np.arange(12), 2))
    assert (found["share"], found["low"], found["high"]) == pytest.approx(
        (expected.mean, expected.low, expected.high)
    )
    assert found["p"] == sign_test(of_prompts - 0.5) == pytest.approx(0.109375)


def test_who_votes_left_always_prefers_nobody(tmp_path, runs):
    _, key = page_of(runs, "pair")
    ballots = votes.read([saved(tmp_path, key, "ann", lambda item: "left")], key)
    assert votes.judgement(key, ballots)["share"] == 0.5


def test_ratings_are_compared_in_pairs(tmp_path, runs):
    """The second run is a point better, on every third prompt two."""
    page, key = page_of(runs, "score")

    def rate(item):
        number = prompt_number(item)
        return 2 + number % 2 + item["sides"][0] * (2 if number % 3 == 0 else 1)

    found = votes.judgement(key, votes.read([saved(tmp_path, key, "ann", rate)], key))
    gains = np.array([2.0 if k % 3 == 0 else 1.0 for k in range(12)])
    expected = paired(np.zeros(12), gains)
    change = found["changes"]["b"]
    assert (change["difference"], change["p"]) == pytest.approx((4 / 3, expected.p))
    assert change["low"] < 4 / 3 < change["high"]
    assert found["means"]["a"]["mean"] == 2.5
    assert found["said"].startswith("People rated b +1.33 against a (of 5, 95 % interval")


def test_ratings_of_one_side_alone_are_not_compared(tmp_path, runs):
    _, key = page_of(runs, "score")
    first = [k for k, item in enumerate(key["items"]) if item["sides"] == [0]]
    found = votes.judgement(
        key, votes.read([saved(tmp_path, key, "ann", lambda item: 3, first)], key)
    )
    assert found["changes"] == {"b": None} and found["means"]["b"] is None


def test_an_unfinished_ballot_counts_as_far_as_it_goes(tmp_path, runs):
    _, key = page_of(runs, "pair")
    ballots = votes.read([saved(tmp_path, key, "ann", for_run(0), range(5))], key)
    found = votes.judgement(key, ballots)
    assert (found["votes"], found["share"]) == (5, 0.0)
    with pytest.raises(UserError, match="none of the files holds a vote"):
        votes.judgement(key, votes.read([saved(tmp_path, key, "ben", for_run(0), [])], key))


def test_agreement_is_krippendorffs_alpha():
    same = [{0: 1.0, 1: 3.0, 2: 5.0}] * 2
    assert votes.agreement(same) == 1.0
    # Of its definition: mean squared difference within items, and of any two of all their votes.
    one, two = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 2.0, 2: 5.0, 9: 4.0}
    pooled = [1.0, 2.0, 2.0, 2.0, 3.0, 5.0]
    expected = np.mean(
        [(x - y) ** 2 for i, x in enumerate(pooled) for j, y in enumerate(pooled) if i != j]
    )
    observed = np.mean([(1 - 2) ** 2, 0, (3 - 5) ** 2])
    assert votes.agreement([one, two]) == pytest.approx(1 - observed / expected)
    rng = np.random.default_rng(0)
    guesses = [dict(enumerate(rng.integers(1, 6, size=3000).astype(float))) for _ in range(3)]
    assert abs(votes.agreement(guesses)) < 0.05
    assert votes.agreement([one]) is None


def test_votes_of_another_page_are_refused(tmp_path, runs):
    _, key = page_of(runs, "pair")
    other = key | {"page": "0" * 64}
    with pytest.raises(UserError, match="votes-ann.json was saved from another page"):
        votes.read([saved(tmp_path, other, "ann", for_run(0))], key)


def test_a_person_who_is_there_twice_is_named(tmp_path, runs):
    _, key = page_of(runs, "pair")
    files = [saved(tmp_path, key, "Ann", for_run(0))]
    (tmp_path / "again").mkdir()
    files.append(saved(tmp_path / "again", key, "ann", for_run(1)))
    with pytest.raises(UserError, match="are both of ann"):
        votes.read(files, key)
    with pytest.raises(UserError, match="are both of Ann"):
        votes.read(files[:1] * 2, key)


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "is not what a rating page saves"),
        ("[]", "is not what a rating page saves"),
        ('{"page": "x"}', "is not what a rating page saves"),
        (None, "No such file"),
        ("[" * 100_000, "is not what a rating page saves"),
        ("\\ud800", "is not what a rating page saves"),
    ],
)
def test_what_is_no_ballot_is_refused(tmp_path, runs, content, said):
    _, key = page_of(runs, "pair")
    file = tmp_path / "votes.json"
    if content:
        file.write_text(content)
    with pytest.raises(UserError, match=said):
        votes.read([file], key)


def rewritten(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


@pytest.mark.parametrize("item", [float("inf"), 1.7, True, "1", None])
def test_an_item_that_is_no_whole_number_is_refused(tmp_path, runs, item):
    _, key = page_of(runs, "pair")
    file = rewritten(
        saved(tmp_path, key, "ann", for_run(0)), votes=[{"item": item, "vote": "left"}]
    )
    with pytest.raises(UserError, match=rf"{file}.*votes\.0\.item"):
        votes.read([file], key)


@pytest.mark.parametrize("vote", [True, 1.0, None, [1]])
def test_a_rating_that_is_no_whole_number_is_refused(tmp_path, runs, vote):
    _, key = page_of(runs, "score")
    file = saved(tmp_path, key, "ann", lambda item: vote)
    with pytest.raises(UserError, match=rf"{file}.*votes\.0\.vote"):
        votes.read([file], key)


def test_two_votes_for_one_item_are_refused(tmp_path, runs):
    _, key = page_of(runs, "pair")
    file = saved(tmp_path, key, "ann", for_run(0), [3, 4, 3])
    with pytest.raises(UserError, match=f"{file} holds two votes for item 3"):
        votes.read([file], key)


@pytest.mark.parametrize("rater", [None, "", "  ", "x" * 61, "\ud800"])
def test_votes_of_nobody_are_refused(tmp_path, runs, rater):
    _, key = page_of(runs, "pair")
    file = rewritten(saved(tmp_path, key, "ann", for_run(0)), rater=rater)
    with pytest.raises(UserError, match=str(file)):
        votes.read([file], key)


@pytest.mark.parametrize("item, vote", [(0, "both"), (0, 3), (99, "left"), (-1, "left")])
def test_votes_that_cannot_be_are_refused(tmp_path, runs, item, vote):
    _, key = page_of(runs, "pair")
    file = saved(tmp_path, key, "ann", for_run(0))
    content = json.loads(file.read_text())
    content["votes"] = [{"item": item, "vote": vote}]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="which cannot be"):
        votes.read([file], key)
