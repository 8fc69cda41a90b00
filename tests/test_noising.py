import math
from collections import Counter
from statistics import NormalDist

import numpy as np
import pytest

from data import counter
from data.noising import Noising
from train.config import DiffusionConfig, UserError

SHAPE = (4, 8, 10)


def noising(length=1000, **settings):
    return Noising.of(DiffusionConfig(**settings), length)


def drawn(ours, *, step=0, total=64, seed=3):
    """The timesteps of one global batch."""
    return [
        ours.timestep(seed, step, (step, f"{position}.png"), position=position, total=total)
        for position in range(total)
    ]


def test_the_defaults_draw_what_was_always_drawn():
    purpose = (7, "a.png", 2)
    expected = counter.integer(1000, 5, "timestep", *purpose)
    assert noising().timestep(5, 7, purpose, position=3, total=8) == expected
    noise = noising().noise(SHAPE, 5, purpose)
    assert noise.keys() == {"noise"}
    assert np.array_equal(noise["noise"], counter.normal(SHAPE, 5, "noise", *purpose))


@pytest.mark.parametrize("sampler", ["uniform", "stratified", "logit_normal"])
def test_timesteps_stay_within_the_limits_and_reach_them(sampler):
    ours = noising(timesteps=sampler, min_timestep=200, max_timestep=205, logit_scale=3)
    seen = {t for step in range(20) for t in drawn(ours, step=step)}
    assert seen == set(range(200, 206))
    assert set(drawn(noising(timesteps=sampler, min_timestep=4, max_timestep=4))) == {4}


@pytest.mark.parametrize("sampler", ["uniform", "stratified", "logit_normal"])
def test_timesteps_are_a_function_of_the_sample_and_step(sampler):
    """So a process need not draw for the others, nor in any order."""
    ours = noising(timesteps=sampler)
    once = drawn(ours)
    assert [ours.timestep(3, 0, (0, f"{p}.png"), position=p, total=64) for p in (9, 3)] == [
        once[9],
        once[3],
    ]
    assert once != drawn(ours, step=1) and once != drawn(ours, seed=4)


@pytest.mark.parametrize(("first", "last"), [(0, 999), (100, 899)])
@pytest.mark.parametrize("total", [1, 7, 8, 64])
def test_each_stratum_has_one_sample_of_the_global_batch(first, last, total):
    ours = noising(timesteps="stratified", min_timestep=first, max_timestep=last)
    count = last - first + 1
    for step in range(5):
        for part, timestep in enumerate(sorted(drawn(ours, step=step, total=total))):
            low, high = first + part * count / total, first + (part + 1) * count / total
            assert math.floor(low) <= timestep < math.ceil(high)


def test_a_batch_larger_than_the_schedule_covers_it_evenly():
    counts = Counter(drawn(noising(20, timesteps="stratified"), total=130))
    assert counts.keys() == set(range(20))
    assert all(5 <= seen <= 8 for seen in counts.values())  # 6.5 on average


def test_no_place_in_the_batch_has_a_stratum_of_its_own_and_none_a_fixed_time():
    ours = noising(timesteps="stratified")
    first = [drawn(ours, step=step, total=4)[0] for step in range(400)]
    shares = np.bincount(np.array(first) // 250, minlength=4) / 400
    assert (np.abs(shares - 0.25) < 0.09).all()  # four standard deviations
    assert len({t % 250 for t in first}) > 150


@pytest.mark.parametrize("sampler", ["uniform", "stratified"])
def test_all_timesteps_are_equally_likely(sampler):
    ours = noising(10, timesteps=sampler)
    seen = [t for step in range(1000) for t in drawn(ours, step=step, total=4)]
    shares = np.bincount(seen, minlength=10) / len(seen)
    assert (np.abs(shares - 0.1) < 0.02).all()  # four standard deviations of independent draws


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (-1.0, 0.5), (0.5, 2.0)])
def test_logit_normal_is_the_paper_s_density(mean, scale):
    """The share below a timestep is Phi((logit(t) - m) / s), the integral of eq. 19."""
    ours = noising(timesteps="logit_normal", logit_mean=mean, logit_scale=scale)
    seen = np.array([t for step in range(100) for t in drawn(ours, step=step, total=40)])
    for limit in (100, 250, 500, 750, 900):
        normal = (math.log(limit / (1000 - limit)) - mean) / scale
        assert np.mean(seen < limit) == pytest.approx(NormalDist().cdf(normal), abs=0.032)


def test_logit_normal_far_off_is_an_end_of_the_schedule():
    for mean, end in ((-1e4, 0), (1e4, 999)):
        assert set(drawn(noising(timesteps="logit_normal", logit_mean=mean))) == {end}


def test_an_offset_shifts_each_channel_as_a_whole():
    plain = noising().noise(SHAPE, 0, (1, "a"))["noise"]
    noise = noising(noise_offset=0.1).noise(SHAPE, 0, (1, "a"))
    shift = noise["noise"] - plain
    assert noise.keys() == {"noise"} and noise["noise"].dtype == np.float32
    assert np.allclose(shift, shift[:, :1, :1], atol=1e-6)
    assert len(np.unique(shift[:, 0, 0].round(4))) == 4
    shifts = [
        noising(noise_offset=0.1).noise(SHAPE, 0, (step, "a"))["noise"]
        - noising().noise(SHAPE, 0, (step, "a"))["noise"]
        for step in range(200)
    ]
    assert np.std(shifts) == pytest.approx(0.1, rel=0.1)  # of 800 numbers


def test_input_perturbation_is_in_the_input_alone():
    plain = noising().noise(SHAPE, 0, (1, "a"))["noise"]
    noise = noising(input_perturbation=0.1).noise(SHAPE, 0, (1, "a"))
    assert np.array_equal(noise["noise"], plain)
    extra = (noise["input_noise"] - plain).ravel()
    assert noise["input_noise"].dtype == np.float32
    assert np.std(extra) == pytest.approx(0.1, rel=0.15)
    assert abs(np.corrcoef(extra, plain.ravel())[0, 1]) < 0.25


def test_offset_and_perturbation_go_together():
    noise = noising(noise_offset=0.2, input_perturbation=0.1).noise(SHAPE, 0, (1, "a"))
    offset = noising(noise_offset=0.2).noise(SHAPE, 0, (1, "a"))["noise"]
    extra = noising(input_perturbation=0.1).noise(SHAPE, 0, (1, "a"))
    assert np.array_equal(noise["noise"], offset)
    difference = extra["input_noise"] - extra["noise"]
    assert np.allclose(noise["input_noise"] - noise["noise"], difference, atol=1e-6)


@pytest.mark.parametrize("key", ["min_timestep", "max_timestep"])
def test_a_limit_beyond_the_schedule_is_named(key):
    with pytest.raises(UserError, match=rf"diffusion\.{key}=1000: .* 0 to 999"):
        noising(**{key: 1000})
