"""One image's denoising a step at a time: the bits of the loop, and the estimate of the clean latent."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from blip3o_rt.ops.random import normal_noise
from blip3o_rt.params import DiffusionParams
from blip3o_rt.pipeline import Pipeline

STEPS = 3


def test_steps_of_two_images_in_turns_are_those_of_the_loop_and_the_estimate_ends_as_the_latent() -> None:
    pipeline = Pipeline.load(device="cpu", dtype="fp32")
    renderer = pipeline._renderer
    plan = pipeline.plan("a red circle on a blue background", seed=7)
    params = DiffusionParams(STEPS, 2.0)
    noises = [normal_noise(seed, renderer.latent_shape) for seed in (1, 2)]
    stack = ExitStack()
    images = [stack.enter_context(renderer.denoising(plan, params, noise)) for noise in noises]
    sigmas = images[0]._sigmas
    estimates = []
    for step in range(STEPS):
        for image in images:
            before = image.latent
            image.step()
            estimates.append(image.estimate)
            # the estimate x0 is where the step's straight line from `before` reaches the noise level 0
            ratio = sigmas[step + 1] / sigmas[step]
            line = ratio * before + (1 - ratio) * estimates[-1]
            torch.testing.assert_close(line, image.latent, rtol=1e-5, atol=1e-5)
    stack.close()
    for noise, image, estimate in zip(noises, images, estimates[-2:], strict=True):
        with renderer.denoising(plan, params, noise) as alone:
            for _ in range(STEPS):
                alone.step()
            expected = alone.latent
        assert torch.equal(image.latent, expected)
        torch.testing.assert_close(estimate, expected, rtol=1e-5, atol=1e-5)
