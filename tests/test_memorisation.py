"""Copies of training pictures are found, and sound models are not called copiers."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data import toy
from eval import copying
from eval.memorisation import ALPHA, layout, memorisation, most_suspicious

DESIGNS = [  # training, held-out and generated pictures, and pictures per prompt
    (4, 0, 48, 2),
    (8, 0, 100, 4),
    (4, 24, 48, 2),
    (12, 24, 48, 2),
    (6, 6, 100, 4),
    (60, 0, 60, 1),
]


class Views:
    """Features of pictures of one subject: a curved sheet of `ways` ways to differ, and noise."""

    def __init__(self, seed, *, ways=6, dimension=48):
        self.rng = np.random.default_rng(seed)
        self.ways = ways
        self.sheet = self.rng.normal(size=(ways, dimension)) / np.sqrt(dimension)
        self.subject = self.rng.normal(size=dimension)

    def points(self, count):
        return self.rng.normal(size=(count, self.ways))

    def shown(self, points):
        features = np.tanh(points @ self.sheet) + self.subject
        return features + 0.03 * self.rng.normal(size=features.shape)


def judged(seed, design, points, *, away=0.0, prompted=True, **options):
    """Of points that `points(views, training, count, per)` makes of a simulated model; away: of
    another kind are the held-out pictures."""
    training, held_out, count, per = design
    views = Views(seed, **options)
    seen = views.points(training)
    real = views.shown(views.points(held_out)) if held_out else None
    if real is not None:
        real = real + away * views.rng.normal(size=48) / np.sqrt(48)
    groups = np.repeat(np.arange(count // per), per).tolist()
    made = views.shown(points(views, seen, count, per))
    training = views.shown(seen)
    return memorisation(made, training, held_out=real, groups=groups, prompted=prompted)


def independent(views, seen, count, per):
    return views.points(count)


def prompted(views, seen, count, per):
    """Pictures of one prompt have much in common."""
    return 0.8 * np.repeat(views.points(count // per), per, 0) + 0.6 * views.points(count)


def typical(views, seen, count, per):
    """Nearer to the middle than real pictures are, and so nearer to all training pictures."""
    return 0.6 * views.points(count)


def copies(views, seen, count, per):
    return seen[views.rng.integers(len(seen), size=count)] + 0.05 * views.points(count)


def alarms(design, points, models, **options):
    return sum(judged(seed, design, points, **options).flagged for seed in range(models))


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_copies_are_flagged(design):
    assert alarms(design, copies, 5) == 5


@pytest.mark.parametrize("points", [independent, prompted, typical])
@pytest.mark.parametrize("design", DESIGNS[:4], ids=str)
def test_sound_models_are_hardly_ever_flagged(design, points):
    assert alarms(design, points, 15) <= 3  # more: once in 180 times at 5 %


@pytest.mark.slow
@pytest.mark.parametrize("ways", [4, 8, 16])
@pytest.mark.parametrize("points", [independent, prompted, typical])
@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_false_alarms_of_200_sound_models(design, points, ways):
    rate = alarms(design, points, 200, ways=ways) / 200
    print(f"{design} {points.__name__} {ways} ways: {rate:.1%}")
    assert rate <= 0.09


@pytest.mark.slow
@pytest.mark.parametrize("away", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("design", [one for one in DESIGNS if one[1]], ids=str)
def test_false_alarms_where_held_out_pictures_are_of_another_kind(design, away):
    rate = alarms(design, independent, 200, away=away) / 200
    print(f"{design} {away} away: {rate:.1%}")
    assert rate <= (0.2 if away <= 1 else 0.09)  # a slight difference cannot always be told


def test_held_out_pictures_of_another_kind_are_no_measure():
    design, fallen, flagged = (8, 24, 48, 2), 0, 0
    for seed in range(12):
        found = judged(seed, design, independent, away=3)
        fallen += not found.has_views and "another kind" in found.note
        flagged += found.flagged
        assert found.said.endswith(found.note)
    assert fallen == 12 and flagged <= 2
    assert alarms(design, copies, 5, away=3) == 5


def test_held_out_pictures_of_the_same_kind_mostly_stay_the_measure():
    found = [judged(seed, (8, 24, 48, 2), independent) for seed in range(40)]
    assert sum(one.has_views for one in found) >= 31  # fewer: once in 100 times at 10 %
    assert all(one.has_views == (not one.note) for one in found)


def test_three_training_pictures_cannot_stand_in():
    found = judged(0, (3, 24, 48, 2), copies, away=5)
    assert not found.judged and "3; it takes 4" in found.said and "another kind" in found.said


def test_prompts_that_are_not_those_of_real_pictures_raise_no_alarm():
    known, unknown = (
        judged(3, (4, 24, 48, 2), copies, prompted=prompted) for prompted in (True, False)
    )
    assert known.flagged and not unknown.flagged and unknown.doubtful
    assert (unknown.share, unknown.pairs) == (known.share, known.pairs)
    assert "look at the pairs" in unknown.said and "copies" not in unknown.said
    assert not most_suspicious([unknown, unknown]).flagged


def test_between_sound_and_copying_one_is_asked_to_look():
    found = judged(3, (4, 24, 48, 2), copies)
    for p, said in ((0.051, "look at the pairs"), (0.2, "look at the pairs"), (0.21, "no sign of")):
        one = replace(found, p=p)
        assert said in one.said and f"(p = {p:.2g})" in one.said and not one.flagged
        assert one.doubtful == (p <= 0.2)
    assert "a few more than expected" in replace(found, p=0.1).said
    assert "nearer than expected" in replace(found, p=0.1, expected=1.0).said


def test_the_verdict_hardly_depends_on_the_seed():
    rng = np.random.default_rng(1)
    training, views, made = (rng.normal(size=(n, 6)) for n in (8, 24, 48))
    made[::9] = training[:6] + 0.3 * made[::9]
    ps = [memorisation(made, training, held_out=views, seed=seed).p for seed in range(4)]
    assert 0.001 < min(ps) and max(ps) < 1.25 * min(ps) + 0.002


def test_mirrored_copies_are_found_by_twins():
    views = Views(0)
    flip = views.rng.permutation(48)
    training, real = (views.shown(views.points(n)) for n in (6, 24))
    made = training[np.arange(24) % 6][:, flip] + 1e-3 * views.rng.normal(size=(24, 48))
    twins = training[:, flip]
    found = memorisation(made, training, held_out=real, twins=twins)
    assert found.flagged and found.share == 1
    assert all(pair.training == pair.sample % 6 for pair in found.pairs)
    assert not memorisation(made, training, held_out=real).flagged
    assert memorisation(training[[0, 1, 2, 3]], training, twins=twins).pairs[0].similarity > 0.999
    with pytest.raises(ValueError):
        memorisation(made, training, twins=twins[:5])


def test_twins_raise_no_alarm():
    flagged = 0
    for seed in range(15):
        views = Views(seed)
        seen, real, made = (views.points(n) for n in (8, 24, 48))
        turned = seen * np.where(np.arange(views.ways) % 2, 1, -1)
        shown = [views.shown(points) for points in (made, seen, real, turned)]
        flagged += memorisation(*shown[:2], held_out=shown[2], twins=shown[3]).flagged
        flagged += memorisation(*shown[:2], twins=shown[3]).flagged
    assert flagged <= 4


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(wrong):
    rng = np.random.default_rng(0)
    sets = {name: rng.normal(size=(8, 5)) for name in ("generated", "training", "held_out")}
    for name, rows in sets.items():
        broken = rows.copy()
        broken[3, 1] = wrong
        with pytest.raises(ValueError, match="1 of 8 pictures have features that are not finite"):
            memorisation(**{**sets, name: broken})


def test_a_quarter_of_copies_is_found_with_held_out_views():
    def some(views, seen, count, per):
        mixed = views.points(count)
        mixed[::4] = copies(views, seen, count // 4, per)
        return mixed

    assert alarms((8, 24, 100, 4), some, 10) >= 9


def test_what_was_found_is_said_with_its_numbers():
    found = judged(3, (4, 24, 48, 2), copies)
    count = sum(pair.suspicious for pair in found.pairs)
    assert found.said.startswith(f"{count} of 48 pictures are nearer to one training picture than ")
    assert found.said.endswith(": the model copies.") and "held-out pictures" in found.said
    assert found.share == count / 48 and found.low < found.share <= found.high
    assert 0 < found.expected < found.low
    sound = judged(3, (4, 24, 48, 2), independent)
    assert "no sign of copying" in sound.said and not sound.flagged and sound.p > ALPHA


def test_pairs_name_the_nearest_training_picture_suspicious_ones_first():
    rng = np.random.default_rng(0)
    training, views = rng.normal(size=(6, 32)), rng.normal(size=(24, 32))
    made = np.concatenate([rng.normal(size=(9, 32)), 3 * training[[4, 1, 4]]])
    found = memorisation(made, training, held_out=views)
    assert {(pair.sample, pair.training) for pair in found.pairs[:3]} == {(9, 4), (10, 1), (11, 4)}
    assert [pair.suspicious for pair in found.pairs] == [True] * 3 + [False] * 9
    rest = [pair.similarity for pair in found.pairs[3:]]
    assert rest == sorted(rest, reverse=True)
    assert all(pair.similarity == pytest.approx(1) for pair in found.pairs[:3])
    assert all(pair.similarity > found.threshold for pair in found.pairs[:3])
    cosines = made @ training.T / np.linalg.norm(made, axis=1)[:, None]
    cosines /= np.linalg.norm(training, axis=1)
    for pair in found.pairs:
        assert pair.similarity == pytest.approx(cosines[pair.sample].max())
        assert pair.training == cosines[pair.sample].argmax()


def test_neither_the_length_of_features_nor_the_order_of_pictures_matters():
    views = Views(0)
    training, real, made = (views.shown(views.points(n)) for n in (6, 12, 20))
    plain = memorisation(made, training, held_out=real)
    turned = memorisation(5 * made[::-1], 2 * training[::-1], held_out=real[::-1])
    assert (turned.p, turned.share) == (plain.p, plain.share)
    assert turned.threshold == pytest.approx(plain.threshold)


def test_the_same_seed_gives_the_same_verdict():
    first, again = (judged(1, (4, 0, 20, 2), independent) for _ in range(2))
    assert first == again


def test_a_subject_that_always_looks_the_same_is_not_a_copy():
    """In features that do not tell its pictures apart, all are as near as can be."""
    rng = np.random.default_rng(0)
    subject = rng.normal(size=64)

    def photos(count, spread):
        return subject + spread * rng.normal(size=(count, 64))

    training, real = photos(5, 0.02), photos(20, 0.02)
    for spread in (0.02, 0.005):  # like real ones, and all in the middle
        found = memorisation(photos(40, spread), training, held_out=real)
        assert found.pairs[0].similarity > 0.99 and not found.flagged, found.said


def test_a_training_picture_that_is_there_twice_does_not_hide_copies():
    views = Views(0)
    points = views.points(7)
    training = views.shown(points)
    training = np.concatenate([training, training[:1] * (1 + 1e-9)])
    made = training[[0, 1, 2, 3, 0, 1, 2, 3]] + 1e-3 * views.rng.normal(size=(8, 48))
    assert memorisation(made, training).flagged


@pytest.mark.parametrize(
    ("generated", "training", "held_out", "said"),
    [
        (40, 2, 24, "2; it takes 3"),
        (40, 3, 0, "3; it takes 4, or 4 held-out ones"),
        (40, 3, 3, "3; it takes 4"),  # too few held-out ones are as none
        (3, 8, 24, "3; generate at least 4"),
        (40, 1, 24, "1; it takes 3"),
        (40, 0, 0, "0; it takes 4"),
    ],
)
def test_too_few_pictures_are_no_verdict(generated, training, held_out, said):
    rng = np.random.default_rng(0)
    real = rng.normal(size=(held_out, 8)) if held_out else None
    seen = rng.normal(size=(training, 8))
    made = np.resize(seen, (generated, 8)) if training else rng.normal(size=(generated, 8))
    found = memorisation(made, seen, held_out=real)
    assert not found.judged and not found.flagged and found.said.startswith("Too few")
    assert said in found.said and not found.pairs


def test_training_pictures_that_are_all_the_same_are_no_verdict():
    found = memorisation(np.ones((9, 4)), np.ones((6, 4)))
    assert not found.judged and "too much alike" in found.said


# Several spaces


def test_the_most_suspicious_space_counts_with_a_correction():
    clear, bad = judged(0, (4, 24, 48, 2), independent), judged(0, (4, 24, 48, 2), copies)
    few = memorisation(np.ones((2, 4)), np.eye(4))
    worst = most_suspicious([clear, few, bad])
    assert worst.flagged and worst.share == bad.share
    assert bad.p < worst.p == copying.joint([clear.p, bad.p])  # few could not be judged
    assert not most_suspicious([few]).judged
    with pytest.raises(ValueError):
        most_suspicious([])


def test_without_held_out_views_all_spaces_must_agree():
    clear, bad = judged(0, (6, 0, 48, 2), independent), judged(0, (6, 0, 48, 2), copies)
    assert bad.flagged and not clear.flagged
    assert most_suspicious([clear, bad]) == clear
    assert most_suspicious([bad, replace(bad, p=0.04)]).flagged


def test_looking_at_many_spaces_does_not_raise_alarms():
    flagged = 0
    for seed in range(30):
        found = [judged(100 * seed + k, (4, 24, 48, 2), independent) for k in range(4)]
        flagged += most_suspicious(found).flagged
    assert flagged <= 5


# The layout of pictures


def owls(count, seed, freedom=1.0):
    scenes = [toy.sample_scene(seed, k, freedom=freedom) for k in range(count)]
    return [toy.render(scene, 128, 128, subject="owl") for scene in scenes]


def as_jpeg(picture, quality=40):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def shifted(picture):
    return np.roll(picture, (2, -1), (0, 1))


def brighter(picture):
    return np.clip(picture.astype(int) * 0.95 + 18, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("change", [lambda picture: picture, as_jpeg, shifted, brighter])
@pytest.mark.parametrize("held_out", [24, 0])
def test_copies_are_found_by_layout_in_spite_of_small_changes(change, held_out):
    training, real = owls(6, 1), owls(24, 2)
    made = [change(training[k % 6]) for k in range(24)]
    views = layout(real) if held_out else None
    found = memorisation(layout(made), layout(training), held_out=views)
    assert found.flagged and found.share > 0.9, found.said


def test_other_views_are_cleared_by_layout():
    training = owls(6, 1)
    for seed in range(3, 9):
        found = memorisation(layout(owls(24, seed)), layout(training), held_out=layout(owls(24, 2)))
        assert not found.flagged, found.said


def test_layout_sees_place_and_not_size_or_brightness():
    (owl,) = owls(1, 1)
    small = np.asarray(Image.fromarray(owl).resize((64, 64), Image.Resampling.BOX))
    one, same, lit, elsewhere = layout([owl, small, brighter(owl), np.roll(owl, 32, 1)])

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    assert cosine(one, same) > 0.999 and cosine(one, lit) > 0.98
    assert cosine(one, elsewhere) < 0.8
    assert layout([]).shape == (0, 768) and one.shape == (768,)
    assert not layout([np.full((8, 8, 3), 7, np.uint8)]).any()


# The statistics


@pytest.mark.parametrize("training", [3, 4, 7, 50, 51, 52, 53, 90])
def test_contrast_is_to_the_median_of_the_next_fifty(training):
    distances = np.random.default_rng(training).random((5, training))
    near = np.sort(distances, 1)
    found = copying.Nearest.of(distances)
    assert found.depth == pytest.approx(-np.log(near[:, 0]))
    assert found.contrast == pytest.approx(np.log(np.median(near[:, 1:51], 1) / near[:, 0]))
    assert (found.index == distances.argmin(1)).all()


def test_shares_count_what_lies_beyond_real_pictures():
    real = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    scores = np.array([0.75, 0.75, 0.65, 0.9])
    prompts = [[0, 1], [2], [3]]
    found = copying.shares(real, scores, prompts)
    # beyond 0.8: one of three prompts, 1/3 against 1/9; beyond 0.7 (half of six ...): 2/3
    for k, share in ((1, 1 / 3), (2, 2 / 3)):
        e = k / 9
        assert found[k - 1] == pytest.approx((share - e) / np.sqrt(e * (1 - e) * (1 / 3 + 1 / 8)))
    assert copying.shares(real, scores - 10, prompts).tolist() == [0, 0]


def test_a_joint_p_is_uniform_for_separate_tests_and_the_same_for_equal_ones():
    rng = np.random.default_rng(0)
    for count in (2, 4):
        shared = rng.normal(size=(4000, 1))
        for kin in (0, 0.7):
            scores = np.sqrt(kin) * shared + np.sqrt(1 - kin) * rng.normal(size=(4000, count))
            ranks = (scores.argsort(0).argsort(0) + 0.5) / 4000
            below = np.mean([copying.joint(row) <= 0.05 for row in ranks])
            assert 0.04 <= below <= 0.07
    assert copying.joint([0.03, 0.03, 0.03]) == pytest.approx(0.03)
    assert copying.joint([0.03]) == pytest.approx(0.03)
    assert 0.03 < copying.joint([0.03, 0.2]) < copying.joint([0.03, 1.0]) < 0.07
    assert copying.joint([0.001, 1.0, 1.0]) < 0.0031  # those that see nothing do not outweigh it


def test_pictures_of_another_kind_are_those_further_away():
    rng = np.random.default_rng(0)

    def near(centre, count, spread=0.3):
        rows = np.eye(16)[centre] + spread * rng.normal(size=(count, 16))
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    assert copying.of_another_kind(near(0, 6), near(1, 12), 0) < 0.002
    assert copying.of_another_kind(near(0, 12, 0.5), near(0, 24, 0.1), 0) == 1  # nearer than they
    other = near(0, 8) + 0.2 * np.eye(16)[1]
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    assert copying.of_another_kind(other, near(0, 24), 0) < 0.01  # a little, off to a side
    twice = np.repeat(near(0, 4), 5, 0)
    assert copying.of_another_kind(twice, near(0, 12), 0) > 0.02
    ps = [copying.of_another_kind(near(0, 8), near(0, 16), seed) for seed in range(60)]
    assert np.mean(np.array(ps) <= 0.1) <= 0.2


def test_simulated_models_of_large_runs_are_fewer():
    assert len(copying.sound_models(8, 24, 24, 48, 0)) == copying.WORLDS
    assert len(copying.sound_models(120, 0, 9, 200, 0)) < copying.WORLDS // 2


def test_the_p_value_is_uniform_for_a_sound_model():
    worlds = copying.sound_models(6, 24, 24, 48, 0)[:1000]
    ps = [copying.p_value(worlds[k], np.delete(worlds, k, 0)) for k in range(len(worlds))]
    for level in (0.05, 0.2, 0.5):
        # shares are tied at 0 in most worlds, which makes p too great rather than too small
        assert level - 0.1 * level**0.5 <= np.mean(np.array(ps) <= level) <= level + 0.01


def test_what_every_sound_model_shows_is_not_suspicious():
    worlds = np.ones((99, 3))
    assert copying.p_value(np.ones(3), worlds) == 1
    assert copying.p_value(np.array([1, 2, 1]), worlds) == 0.01


def test_the_interval_of_a_share_is_over_prompts():
    marked = np.zeros(40, bool)
    marked[:10] = True
    alone = copying.interval(marked, [[k] for k in range(40)])
    together = copying.interval(marked, [list(range(k, k + 10)) for k in range(0, 40, 10)])
    assert alone == pytest.approx((0.142, 0.402), abs=3e-3)  # Wilson's of 10 in 40
    assert together[0] < alone[0] and together[1] > alone[1] + 0.2
    none = copying.interval(np.zeros(40, bool), [list(range(k, k + 10)) for k in range(0, 40, 10)])
    assert none == pytest.approx((0, 0.490), abs=2e-3)  # of 0 in 4
