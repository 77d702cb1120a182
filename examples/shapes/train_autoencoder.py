"""Stage 1: trains the DC-AE autoencoder on rendered scenes (python -m examples.shapes.train_autoencoder).

After a while the encoder is frozen and only the decoder trains on: latents then stay what they are, so that
the joint stage can begin while the decoder still gets sharper.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC

from blip3o_rt.measure.shapes.judge import judge, read_image
from blip3o_rt.measure.shapes.render import render_batch, to_image
from blip3o_rt.measure.shapes.scene import IMAGE_SIZE, PLACES, Scene, random_scene, training_scene

from .model_config import AUTOENCODER
from .training import (
    SAVE_EVERY,
    Bars,
    Log,
    WeightAverage,
    add_gate_option,
    autocast,
    enforce,
    learning_rate,
    load_state,
    save_atomically,
)

LATENT_NOISE = 0.1  # added while training, so that the decoder forgives a diffusion model's small errors
LATENT_PENALTY = 1e-3  # keeps latents near unit scale, where that noise means something
COVERED_WEIGHT = 4.0  # shapes are a few per cent of the pixels
EDGE_WEIGHT = 8.0
CROP = IMAGE_SIZE // 2  # side of the crops around shapes that the first part of training sees
BARS = {"scenes_read": 0.97}
GATE_SCENES, GATE_BATCH = 600, 50
CROP_SHARE = 0.8  # of the steps; the network is convolutional, and crops hold four times the shapes per pixel


def build_autoencoder() -> AutoencoderDC:
    """An untrained autoencoder of the embedded model's geometry; scaling_factor is set at export."""
    return AutoencoderDC(**AUTOENCODER)


def pixel_weight(covered: torch.Tensor) -> torch.Tensor:
    """Weight of every pixel in the loss, [N, 1, H, W]: more on shapes, most on their edges."""
    edge = F.max_pool2d(covered, 3, 1, 1) + F.max_pool2d(-covered, 3, 1, 1)
    return 1 + COVERED_WEIGHT * covered + EDGE_WEIGHT * edge


def crop_around_shapes(scenes: list[Scene], images: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The CROP x CROP window around one shape of every scene (the middle of a scene without any)."""
    windows = []
    for scene, image in zip(scenes, images, strict=True):
        place = PLACES.index(rng.choice(scene.shapes).place if scene.shapes else "centre")
        top, left = (CROP // 2 * cell for cell in divmod(place, 3))
        windows.append(image[:, top : top + CROP, left : left + CROP])
    return torch.stack(windows)


def training_batch(rng: random.Random, batch: int, crops: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 3, S, S] and their coverage [N, 1, S, S], whole or as crops around shapes."""
    scenes = [training_scene(rng) for _ in range(batch)]
    images, covered = render_batch(scenes)
    if not crops:
        return images, covered
    cropped = crop_around_shapes(scenes, torch.cat([images, covered], dim=1), rng)
    return cropped[:, :3], cropped[:, 3:]


def reconstruction_loss(
    model: AutoencoderDC, images: torch.Tensor, covered: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Weighted L1 of the reconstruction through noisy latents, and the latents' mean square."""
    target = images * 2 - 1
    with autocast():
        latents = model.encode(target).latent
        noisy = latents + LATENT_NOISE * torch.randn_like(latents)
        output = model.decode(noisy).sample
    weight = pixel_weight(covered)
    error = ((output.float() - target).abs() * weight).sum() / (weight.sum() * 3)
    return {"l1": error, "latent_square": latents.float().square().mean()}


@torch.no_grad()
def reconstruction_psnr(model: AutoencoderDC, seed: int = 7, count: int = 64) -> float:
    """PSNR in dB of float32 reconstructions of fixed unseen scenes."""
    rng = random.Random(seed)
    images, _ = render_batch([training_scene(rng) for _ in range(count)])
    output = model.decode(model.encode(images * 2 - 1).latent).sample
    error = ((output / 2 + 0.5).clamp(0, 1) - images).square().mean()
    return round(float(-10 * error.log10()), 2)


@torch.no_grad()
def gate(model: AutoencoderDC, count: int, seed: int = 11) -> dict[str, float]:
    """Share of scenes (held-out ones too) whose reconstruction is read back right."""
    rng = random.Random(seed)
    right = 0
    for _ in range(count // GATE_BATCH):
        scenes = [random_scene(rng) for _ in range(GATE_BATCH)]
        output = model.decode(model.encode(render_batch(scenes)[0] * 2 - 1).latent).sample / 2 + 0.5
        right += sum(judge(read_image(to_image(p)), s).right for p, s in zip(output, scenes, strict=True))
    return {"scenes_read": round(right / (count // GATE_BATCH * GATE_BATCH), 4)}


def freeze_encoder(model: AutoencoderDC, average: WeightAverage) -> None:
    """Gives the encoder its averaged weights for good."""
    encoder = {id(parameter) for parameter in model.encoder.parameters()}
    with torch.no_grad():
        for parameter, averaged in zip(average.parameters, average.average, strict=True):
            if id(parameter) in encoder:
                parameter.copy_(averaged)
    model.encoder.requires_grad_(False)


def train(
    run: Path,
    steps: int,
    encoder_steps: int,
    batch: int,
    peak: float,
    seed: int,
    crop_share: float = CROP_SHARE,
    bars: Bars | None = None,
) -> None:
    """Runs or resumes the stage; leaves run/autoencoder.pt (encoder final from encoder_steps on).

    Raises GateError where the finished stage is under a bar.
    """
    path = run / "autoencoder.pt"
    torch.manual_seed(seed)
    model = build_autoencoder().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    average = WeightAverage([model], 0.998)
    first = 0
    if (state := load_state(path)) is not None:
        first = state["step"]
        model.load_state_dict(state["weights"])
        if first:  # an imported state has the weights alone
            optimiser.load_state_dict(state["optimiser"])
        average.average = state["average"] if first else [p.detach().clone() for p in model.parameters()]
    kept = {key: value for key, value in (state or {}).items() if key == "scaling_factor"}  # if imported
    log = Log(run / "autoencoder.jsonl", every=50)

    def save(step: int) -> None:
        average.swap()
        averaged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        average.swap()
        save_atomically(
            {
                "step": step,
                "model": averaged,
                "weights": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "average": average.average,
                "encoder_final": not next(model.encoder.parameters()).requires_grad,
                **kept,
            },
            path,
        )

    def measure() -> dict[str, float]:
        average.swap()
        psnr = reconstruction_psnr(model)
        average.swap()
        return {"psnr": psnr}

    for step in range(first, steps):
        if step >= encoder_steps and next(model.encoder.parameters()).requires_grad:
            freeze_encoder(model, average)
            save(step)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        rng = random.Random(seed * 1_000_003 + step)
        torch.manual_seed(seed * 1_000_003 + step)
        crops = step < crop_share * steps
        losses = reconstruction_loss(model, *training_batch(rng, batch, crops))
        optimiser.zero_grad(set_to_none=True)
        (losses["l1"] + LATENT_PENALTY * losses["latent_square"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.update(step)
        log.add(step, {name: float(value.detach()) for name, value in losses.items()}, measure)
        if (step + 1) % SAVE_EVERY == 0:
            save(step + 1)
    freeze_encoder(model, average)
    save(steps)
    average.swap()
    enforce("autoencoder", gate(model, GATE_SCENES), bars or {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of training states and logs")
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--encoder-steps", type=int, default=1000, help="then the encoder is frozen")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peak", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--crop-share", type=float, default=CROP_SHARE, help="of the steps, which see crops")
    add_gate_option(parser)
    arguments = parser.parse_args()
    train(
        arguments.run,
        arguments.steps,
        arguments.encoder_steps,
        arguments.batch,
        arguments.peak,
        arguments.seed,
        arguments.crop_share,
        BARS if arguments.gate else {},
    )


if __name__ == "__main__":
    main()
