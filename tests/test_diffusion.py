"""train/diffusion.py against plain numpy in float64, written from the papers."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from train.config import DiffusionConfig
from train.diffusion import Objective

GENERATOR = torch.Generator().manual_seed(0)
TIMESTEPS = torch.tensor([0, 1, 2, 250, 500, 999])
LATENTS, NOISE, GUESS = torch.randn(3, len(TIMESTEPS), 4, 6, 8, generator=GENERATOR)
MASK = torch.rand(len(TIMESTEPS), 1, 6, 8, generator=GENERATOR).round(decimals=1)
TYPES = ["epsilon", "sample", "v_prediction"]
WEIGHTS = [{}, {"min_snr_gamma": 1.0}, {"min_snr_gamma": 5.0}, {"debiased": True}]
HUBERS = ["constant", "snr", "exponential"]
ERRORS = [{}] + [{"loss": "huber", "huber_delta": 0.2, "huber_schedule": name} for name in HUBERS]


def scheduler(prediction_type="v_prediction", *, zero_terminal=False):
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal,
    )


def objective(prediction_type, *, zero_terminal=False, **settings):
    schedule = scheduler(prediction_type, zero_terminal=zero_terminal)
    return Objective.of(schedule, DiffusionConfig(**settings))


def reference_target(prediction_type, latents, noise, alpha_bar):
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    return np.sqrt(alpha_bar) * noise - np.sqrt(1 - alpha_bar) * latents


def reference_weight(prediction_type, alpha_bar, settings):
    """What an error in x counts, times what an error of 1 in the prediction is in x, squared."""
    snr = alpha_bar / (1 - alpha_bar)
    if "min_snr_gamma" in settings:
        in_x = min(snr, settings["min_snr_gamma"])
    elif "debiased" in settings:
        snr = min(max(snr, 0.001), 1000)
        in_x = snr**0.5
    else:
        return 1.0
    return in_x * {"sample": 1, "epsilon": 1 / snr, "v_prediction": 1 / (snr + 1)}[prediction_type]


def reference_loss(prediction_type, row, settings, mask=None):
    """One sample's loss, place by place."""
    timestep = int(TIMESTEPS[row])
    alpha_bar = float(scheduler().alphas_cumprod[timestep])
    latents, noise, guess = (t[row].double().numpy() for t in (LATENTS, NOISE, GUESS))
    difference = guess - reference_target(prediction_type, latents, noise, alpha_bar)
    error = difference**2
    if settings.get("loss") == "huber":
        least = settings["huber_delta"]
        sigma = np.sqrt((1 - alpha_bar) / alpha_bar)
        c = {
            "constant": least,
            "exponential": np.exp(np.log(least) / 1000 * timestep),
            "snr": (1 - least) / (1 + sigma) ** 2 + least,
        }[settings["huber_schedule"]]
        error = 2 * c * (np.sqrt(difference**2 + c**2) - c)
    share = np.ones_like(error) if mask is None else np.repeat(mask[row].numpy(), 4, axis=0)
    mean = (error * share).sum() / share.sum()
    return mean * reference_weight(prediction_type, alpha_bar, settings)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_every_loss_is_the_papers_in_float64(prediction_type, masked):
    latents, noise, guess, mask = (t.double() for t in (LATENTS, NOISE, GUESS, MASK))
    for weight, error in itertools.product(WEIGHTS, ERRORS):
        ours = objective(prediction_type, **weight, **error)
        target = ours.target(latents, noise, TIMESTEPS)
        losses = ours.losses(guess, target, TIMESTEPS, mask=mask if masked else None)
        expected = [
            reference_loss(prediction_type, row, weight | error, mask if masked else None)
            for row in range(len(TIMESTEPS))
        ]
        assert losses.dtype == torch.float64
        np.testing.assert_allclose(losses, expected, rtol=1e-6, err_msg=f"{weight} {error}")


@pytest.mark.parametrize("prediction_type", TYPES)
def test_fp32_is_float64_but_for_its_rounding(prediction_type):
    for weight, error in itertools.product(WEIGHTS, ERRORS):
        ours = objective(prediction_type, **weight, **error)
        target = ours.target(LATENTS, NOISE, TIMESTEPS)
        losses = ours.losses(GUESS, target, TIMESTEPS, mask=MASK)
        mask = MASK.double()
        rows = range(len(TIMESTEPS))
        expected = [reference_loss(prediction_type, row, weight | error, mask) for row in rows]
        assert losses.dtype == torch.float32
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_noisy_latents_and_velocity_are_diffusers():
    ours, theirs = objective("v_prediction"), scheduler()
    torch.testing.assert_close(
        ours.add_noise(LATENTS, NOISE, TIMESTEPS), theirs.add_noise(LATENTS, NOISE, TIMESTEPS)
    )
    torch.testing.assert_close(
        ours.target(LATENTS, NOISE, TIMESTEPS), theirs.get_velocity(LATENTS, NOISE, TIMESTEPS)
    )


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_perfect_prediction_leads_the_sampler_back_to_the_picture(prediction_type):
    ours, theirs = objective(prediction_type), scheduler(prediction_type)
    theirs.config.clip_sample = False
    for index, timestep in enumerate(TIMESTEPS[:-1].tolist()):
        one = (LATENTS[[index]], NOISE[[index]], TIMESTEPS[[index]])
        step = theirs.step(ours.target(*one), timestep, ours.add_noise(*one))
        torch.testing.assert_close(step.pred_original_sample, one[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_half_precision_latents_are_noised_in_fp32(dtype, prediction_type):
    latents, noise, guess = LATENTS.to(dtype), NOISE.to(dtype), GUESS.to(dtype)
    ours = objective(prediction_type, min_snr_gamma=5)
    with torch.autocast("cpu", torch.bfloat16):
        noisy = ours.add_noise(latents, noise, TIMESTEPS)
        target = ours.target(latents, noise, TIMESTEPS)
        losses = ours.losses(guess, target, TIMESTEPS)
    assert {noisy.dtype, target.dtype, losses.dtype} == {torch.float32}
    for row in range(3):  # timesteps 0 to 2, where sigma in bf16 would be 0, 0 and 24 % too much
        a = float(scheduler().alphas_cumprod[row])
        x, e = latents[row].double().numpy(), noise[row].double().numpy()
        expected = np.sqrt(a) * x + np.sqrt(1 - a) * e
        np.testing.assert_allclose(noisy[row], expected, rtol=1e-6, atol=1e-6)
        expected = reference_target(prediction_type, x, e, a)
        np.testing.assert_allclose(target[row], expected, rtol=1e-6, atol=1e-6)


def test_a_model_that_is_cast_keeps_its_schedule():
    model = nn.Linear(2, 2)
    model.objective = objective("v_prediction")
    before = model.objective.add_noise(LATENTS, NOISE, TIMESTEPS)
    model.to(torch.bfloat16)
    assert torch.equal(model.objective.add_noise(LATENTS, NOISE, TIMESTEPS), before)
    assert all("objective" not in name for name in model.state_dict())


@pytest.mark.parametrize("weight", WEIGHTS[1:])
def test_weights_are_one_loss_in_three_parametrisations(weight):
    """An error in x seen as one in epsilon or v costs the same, wherever the SNR is in range."""
    timesteps = TIMESTEPS[1:]
    a = scheduler().alphas_cumprod[timesteps].double()
    costs = [
        objective(name, **weight).weight(timesteps, torch.float64) * size
        for name, size in (("sample", 1), ("epsilon", a / (1 - a)), ("v_prediction", 1 / (1 - a)))
    ]
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-9, atol=0)
    torch.testing.assert_close(costs[0], costs[2], rtol=1e-9, atol=0)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_zero_terminal_snr_is_finite(prediction_type, weight, error):
    ours = objective(prediction_type, zero_terminal=True, **weight, **error)
    guess = GUESS.clone().requires_grad_()
    losses = ours.losses(guess, ours.target(LATENTS, NOISE, TIMESTEPS), TIMESTEPS)
    losses.sum().backward()
    assert losses.isfinite().all() and guess.grad.isfinite().all()
    assert torch.equal(ours.add_noise(LATENTS, NOISE, TIMESTEPS)[-1], NOISE[-1])


@pytest.mark.parametrize(
    ("prediction_type", "last"), [("epsilon", 1.0), ("sample", 0.0), ("v_prediction", 0.0)]
)
def test_min_snr_at_zero_terminal_snr_is_its_limit(prediction_type, last):
    ours = objective(prediction_type, min_snr_gamma=5, zero_terminal=True)
    assert float(ours.weight(TIMESTEPS)[-1]) == last


def test_a_schedule_that_the_override_has_not_reached_is_noticed():
    wanted = DiffusionConfig(zero_terminal_snr=True)
    Objective.of(scheduler(zero_terminal=True), wanted)
    with pytest.raises(AssertionError):
        Objective.of(scheduler(), wanted)


def test_without_a_weighting_every_sample_counts_the_same():
    assert objective("v_prediction").weight(TIMESTEPS).tolist() == [1.0] * len(TIMESTEPS)


def test_huber_is_squared_for_small_errors_and_linear_for_large():
    ours = objective("epsilon", loss="huber", huber_delta=0.1, huber_schedule="constant")
    for size, expected in ((1e-4, 1e-8), (100.0, 2 * 0.1 * 100)):
        losses = ours.losses(NOISE + size, NOISE, TIMESTEPS)
        np.testing.assert_allclose(losses, [expected] * len(TIMESTEPS), rtol=3e-3)
    guess = NOISE.clone().requires_grad_()
    ours.losses(guess, NOISE, TIMESTEPS).sum().backward()
    assert not guess.grad.any()


@pytest.mark.parametrize("schedule", ["snr", "exponential"])
def test_huber_forgives_more_the_more_noise_there_is(schedule):
    ours = objective("epsilon", loss="huber", huber_delta=0.1, huber_schedule=schedule)
    losses = ours.losses(NOISE + 1, NOISE, TIMESTEPS)
    assert (losses.diff() < 0).all()


def test_a_masked_loss_is_the_mean_over_the_mask():
    ours = objective("v_prediction")
    mask = torch.zeros_like(MASK)
    mask[:, :, :2, :4] = 1
    mask[-1] = 0
    guess = NOISE + torch.where(mask > 0, 3.0, 100.0)
    losses = ours.losses(guess, NOISE, TIMESTEPS, mask=mask)
    np.testing.assert_allclose(losses, [9.0] * 5 + [0.0], rtol=1e-4)
    whole = ours.losses(guess, NOISE, TIMESTEPS, mask=torch.ones_like(mask))
    torch.testing.assert_close(whole, ours.losses(guess, NOISE, TIMESTEPS))
