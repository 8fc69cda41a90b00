import pytest
import torch
from diffusers import DDPMScheduler

from train.config import DiffusionConfig
from train.diffusion import Objective

BATCH = torch.Generator().manual_seed(0)
LATENTS = torch.randn(5, 4, 6, 8, generator=BATCH)
NOISE = torch.randn(5, 4, 6, 8, generator=BATCH)
TIMESTEPS = torch.tensor([0, 1, 250, 500, 999])


def scheduler(prediction_type="v_prediction", *, zero_terminal=False):
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal,
    )


def objective(prediction_type, gamma=None, **schedule):
    config = DiffusionConfig(min_snr_gamma=gamma)
    return Objective.of(scheduler(prediction_type, **schedule), config)


def test_noisy_latents_and_velocity_are_diffusers():
    ours, theirs = objective("v_prediction"), scheduler()
    torch.testing.assert_close(
        ours.add_noise(LATENTS, NOISE, TIMESTEPS), theirs.add_noise(LATENTS, NOISE, TIMESTEPS)
    )
    torch.testing.assert_close(
        ours.target(LATENTS, NOISE, TIMESTEPS), theirs.get_velocity(LATENTS, NOISE, TIMESTEPS)
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_prediction_leads_the_sampler_back_to_the_picture(prediction_type):
    ours, theirs = objective(prediction_type), scheduler(prediction_type)
    for index, timestep in enumerate(TIMESTEPS[:4].tolist()):
        one = (LATENTS[[index]], NOISE[[index]], TIMESTEPS[[index]])
        theirs.config.clip_sample = False
        step = theirs.step(ours.target(*one), timestep, ours.add_noise(*one))
        torch.testing.assert_close(step.pred_original_sample, one[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_fp32_where_latents_are_not(dtype):
    ours = objective("v_prediction")
    latents, noise = LATENTS.to(dtype), NOISE.to(dtype)
    noisy = ours.add_noise(latents, noise, TIMESTEPS)
    assert noisy.dtype == torch.float32
    # In bf16 sigma would be 0 at the first timestep.
    alpha_bar = scheduler().alphas_cumprod[0].double()
    expected = alpha_bar.sqrt() * latents[0].double() + (1 - alpha_bar).sqrt() * noise[0].double()
    torch.testing.assert_close(noisy[0].double(), expected, atol=1e-6, rtol=1e-6)
    losses = ours(lambda x, t: x.to(dtype), latents, noise, TIMESTEPS)
    assert losses.dtype == torch.float32


def test_the_loss_is_each_sample_s_own_mean_square():
    ours = objective("v_prediction")
    guess = torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(1))
    losses = ours(lambda x, t: guess, LATENTS, NOISE, TIMESTEPS)
    target = scheduler().get_velocity(LATENTS, NOISE, TIMESTEPS)
    expected = [((guess[i] - target[i]) ** 2).mean() for i in range(5)]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_the_network_sees_the_noisy_latents_and_their_timesteps():
    ours, seen = objective("epsilon"), {}
    ours(lambda x, t: seen.update(x=x, t=t) or x, LATENTS, NOISE, TIMESTEPS)
    assert torch.equal(seen["t"], TIMESTEPS)
    torch.testing.assert_close(seen["x"], scheduler().add_noise(LATENTS, NOISE, TIMESTEPS))


def reference_weight(prediction_type, timestep, gamma, **schedule):
    """What makes every parametrisation the same loss in x, weighted by min(SNR, gamma).

    The error in x is (sigma/alpha)^2 the error in epsilon and sigma^2 the error in v.
    """
    a = scheduler(**schedule).alphas_cumprod[timestep].double()
    x_weight = torch.minimum(a / (1 - a), torch.tensor(gamma))
    return float(
        x_weight * {"sample": 1, "epsilon": (1 - a) / a, "v_prediction": 1 - a}[prediction_type]
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_one_loss_in_three_parametrisations(prediction_type, gamma):
    weights = objective(prediction_type, gamma).weight(TIMESTEPS)
    expected = [reference_weight(prediction_type, t, gamma) for t in TIMESTEPS.tolist()]
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("prediction_type", "last"), [("epsilon", 1.0), ("sample", 0.0), ("v_prediction", 0.0)]
)
def test_zero_terminal_snr_has_finite_weights(prediction_type, last):
    weights = objective(prediction_type, 5.0, zero_terminal=True).weight(TIMESTEPS)
    assert weights.isfinite().all()
    assert weights[-1] == pytest.approx(last, abs=1e-6)
    expected = reference_weight(prediction_type, 500, 5.0, zero_terminal=True)
    assert weights[3] == pytest.approx(expected, rel=1e-3)


def test_without_min_snr_every_sample_counts_the_same():
    assert objective("v_prediction").weight(TIMESTEPS).tolist() == [1.0] * 5


def test_the_prediction_type_is_the_checkpoint_s_and_the_schedule_no_weight():
    ours = objective("epsilon")
    assert ours.prediction_type == "epsilon"
    assert not ours.state_dict() and not list(ours.parameters())


def test_a_masked_loss_is_the_mean_over_the_mask():
    ours = objective("v_prediction")
    mask = torch.zeros(5, 1, 6, 8)
    mask[:, :, :2, :4] = 1
    mask[4] = 0

    def predict(noisy, timesteps):
        return ours.target(LATENTS, NOISE, TIMESTEPS) + torch.where(mask > 0, 3.0, 100.0)

    losses = ours(predict, LATENTS, NOISE, TIMESTEPS, mask=mask)
    torch.testing.assert_close(losses, torch.tensor([9.0, 9.0, 9.0, 9.0, 0.0]), rtol=1e-4, atol=0)
    whole = ours(predict, LATENTS, NOISE, TIMESTEPS, mask=torch.ones_like(mask))
    torch.testing.assert_close(whole, ours(predict, LATENTS, NOISE, TIMESTEPS))
