"""BLIP3o-NEXT run the published way, on transformers, diffusers and torch alone: what the runtime must equal.

Everything is written out: a second full pass for the hidden states, every null token, both halves of guidance
at every step, whole vision tower. Nothing of the runtime is imported, so a mistake cannot be in both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from diffusers.models.normalization import RMSNorm
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

SYSTEM = "You are a helpful assistant."
TEXT_TO_IMAGE = "Please generate image based on the following caption: "
EDIT = "Please edit this image according to the following instruction: "
CONNECTOR_EPS = 1e-5
QWEN3_KEYS = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim hidden_act attention_bias rms_norm_eps rope_theta max_position_embeddings tie_word_embeddings
"""


class Float64(TorchFunctionMode):
    """Within it, modules that compute in float32 whatever their dtype (norms, sums) compute in float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        wider = {torch.float32: torch.float64}
        args = [wider.get(value, value) if isinstance(value, torch.dtype) else value for value in args]
        kwargs = {
            name: wider.get(value, value) if isinstance(value, torch.dtype) else value
            for name, value in (kwargs or {}).items()
        }
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Reference:
    """One reference picture as the model sees it.

    pixels [1, 3, S, S] of the tower, features [1, T, width] after Linear and Tanh, token_ids [T] (vocabulary
    ids), latent [1, C, h, w] times the scaling factor.
    """

    pixels: Tensor
    features: Tensor
    token_ids: Tensor
    latent: Tensor


@dataclass(frozen=True)
class Prompt:
    """Token ids [1, P], and the embeddings [1, P, hidden] that stand for them."""

    ids: Tensor
    embeddings: Tensor


@dataclass(frozen=True)
class Step:
    """One step of the loop, null half first: what the transformer saw and what it answered."""

    model_input: Tensor
    timestep: Tensor
    prediction: Tensor


class PublishedModel:
    """A checkpoint folder in the original layout, in one dtype on the CPU.

    float64 computes in float64 throughout; the latents are float32, or float64 then.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.dtype = folder, dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.config = _json(folder / "config.json")
        self.weights: dict[str, Tensor] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            self.weights |= load_file(path)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.language = self._language_model()
        sana = folder / self.config["diffusion_name_or_path"]
        self.transformer = SanaTransformer2DModel.from_config(
            SanaTransformer2DModel.load_config(sana / "transformer")
        )
        self.transformer.load_state_dict(self._part("model.sana."))
        self.vae = AutoencoderDC.from_config(AutoencoderDC.load_config(sana / "vae"))
        self.vae.load_state_dict(self._part("model.sana_vae."))
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            FlowMatchEulerDiscreteScheduler.load_config(sana / "scheduler")
        )
        self.latent_size: int = self.transformer.config.sample_size
        self.latent_channels: int = self.vae.config.latent_channels
        self.image_size: int = self.latent_size * self.vae.spatial_compression_ratio
        for module in (self.language, self.transformer, self.vae):
            self._settle(module)
        self._load_tower()

    # Weights

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.weights.items()
            if name.startswith(prefix)
        }

    def _settle(self, module: nn.Module) -> None:
        module.eval().requires_grad_(False)
        if self.dtype != torch.float32:
            module.to(self.dtype)

    def _language_model(self) -> Qwen3ForCausalLM:
        config = Qwen3Config(**{name: self.config[name] for name in QWEN3_KEYS.split()})
        model = Qwen3ForCausalLM(config)
        state = {
            name: tensor
            for name, tensor in self.weights.items()
            if name.startswith(("model.layers.", "model.norm.", "model.embed_tokens.", "lm_head."))
        }
        if config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)
        return model

    def _load_tower(self) -> None:
        """The vision tower's modules, from the checkpoint or from ta_tok.pth; both name them alike."""
        self.tower_config = _json(self.folder / "siglip2" / "config.json")["vision_config"]
        arguments: dict[str, Any] = {}
        state = self._part("model.vision_tower.vision_tower.")
        file = self.folder / "ta_tok.pth"
        if file.is_file():
            content = torch.load(file, weights_only=True)["model"]
            arguments, state = content["args"], state or content["sd"]
        self.tokens_per_image = arguments.get(
            "bottleneck_token_num", (self.tower_config["image_size"] // self.tower_config["patch_size"]) ** 2
        )
        self.selected_layer: int = arguments.get("select_layer_id", -2)
        self.tower: SiglipVisionModel | None = None
        if not state:
            return
        self.tower = SiglipVisionModel(SiglipVisionConfig(**self.tower_config))
        encoder = {n.removeprefix("encoder."): t for n, t in state.items() if n.startswith("encoder.")}
        missing, unexpected = self.tower.load_state_dict(encoder, strict=False)
        # A checkpoint may leave out what stands above the selected hidden state, and only that.
        layers = self.tower_config["num_hidden_layers"]
        selected = range(layers + 1)[self.selected_layer]
        unused = (*(f"encoder.layers.{i}." for i in range(selected, layers)), "post_layernorm.", "head.")
        assert not unexpected
        assert all(name.startswith(unused) for name in missing)
        self._settle(self.tower)
        self.tower_weights = {name: tensor.to(self.dtype) for name, tensor in state.items()}

    def connector(self, name: str) -> nn.Sequential:
        """Linear, GELU (tanh), Linear, RMSNorm."""
        state = self._part(f"model.{name}.")
        (hidden, width), output = state["0.weight"].shape, state["2.weight"].shape[0]
        layers = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(approximate="tanh"),
            nn.Linear(hidden, output),
            RMSNorm(output, eps=CONNECTOR_EPS, elementwise_affine=True),
        )
        layers.load_state_dict(state)
        self._settle(layers)
        return layers

    # The reference picture

    def reference(self, image: Image.Image) -> Reference:
        """What an edit takes from one RGB picture."""
        pixels = self.tower_pixels(image)
        features, codes = self.tokenize(pixels)
        latent = self.encode(self.vae_pixels(image))
        return Reference(pixels, features, codes + self.config["image_start_token_id"], latent)

    def tower_pixels(self, image: Image.Image) -> Tensor:
        side = self.tower_config["image_size"]
        return (_pixels(image.resize((side, side), Image.Resampling.BICUBIC)) - 0.5) / 0.5

    def tokenize(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features [1, T, width] and codes [T] of TA-Tok."""
        assert self.tower is not None
        weights = self.tower_weights

        def linear(x: Tensor, name: str) -> Tensor:
            return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

        with self._arithmetic():
            states = self.tower(pixel_values=pixels.to(self.dtype), output_hidden_states=True).hidden_states
            assert len(states) == self.tower_config["num_hidden_layers"] + 1
            features = torch.tanh(linear(states[self.selected_layer], "encode_task_layer.0"))
            projected = F.normalize(linear(features, "bottleneck.in_linear"), dim=-1)
            embedding = weights["bottleneck.regularizer.embedding.weight"]
            codebook = F.normalize(linear(embedding, "bottleneck.regularizer.embedding_proj"), dim=-1)
            return features, (projected[0] @ codebook.T).argmax(dim=-1)

    def vae_pixels(self, image: Image.Image) -> Tensor:
        """Short side to the picture's size (bilinear), the long side's fraction dropped, centre cut out."""
        size, (width, height) = self.image_size, image.size
        resized = (
            (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
        )
        left, top = (int(round((side - size) / 2.0)) for side in resized)  # noqa: RUF046
        image = image.resize(resized, Image.Resampling.BILINEAR)
        return (_pixels(image.crop((left, top, left + size, top + size))) - 0.5) / 0.5

    def encode(self, pixels: Tensor) -> Tensor:
        with self._arithmetic():
            return self.vae.encode(pixels.to(self.dtype)).latent * self.vae.config.scaling_factor

    # The autoregressive stage

    def prompt(self, text: str, references: Sequence[Reference] = ()) -> Prompt:
        """The prompt of a picture, or of an edit where there are references."""
        pads = "<|image_pad|>" * (self.tokens_per_image * len(references))
        content = TEXT_TO_IMAGE + text
        if references:
            content = EDIT + text + ".\n" + f"<|vision_start|>{pads}<|vision_end|>"
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        rendered = str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
        ids = torch.tensor([self.tokenizer(rendered + "<im_start><S0>")["input_ids"]])
        pad = ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        if not references:
            return self.embed(ids)
        if not self.config.get("use_tar_siglip_features"):
            ids[pad] = torch.cat([reference.token_ids for reference in references])
            return self.embed(ids)
        prompt = self.embed(ids)
        with self._arithmetic():
            features = torch.cat([reference.features[0] for reference in references])
            prompt.embeddings[pad] = self.connector("tar_siglip_features_connector")(features)
        return prompt

    def embed(self, ids: Tensor) -> Prompt:
        """A prompt of token ids [1, P] alone."""
        with self._arithmetic():
            return Prompt(ids, self.language.model.embed_tokens(ids))

    def greedy_tokens(self, prompt: Prompt, *, image_tokens_only: bool) -> Tensor:
        """Token ids [1, T]: the likeliest one each time, of the image tokens or of the whole vocabulary."""
        start = self.config["image_start_token_id"] if image_tokens_only else 0
        stop = start + self.config["num_image_tokens"] if image_tokens_only else self.config["vocab_size"]
        tokens: list[int] = []
        embeddings, cache = prompt.embeddings, None
        while len(tokens) < self.tokens_per_image:
            with self._arithmetic():
                output = self.language(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
            tokens.append(start + int(output.logits[0, -1, start:stop].argmax()))
            embeddings, cache = self.embed(torch.tensor([tokens[-1:]])).embeddings, output.past_key_values
        return torch.tensor([tokens])

    def hidden_states(self, prompt: Prompt, token_ids: Tensor) -> Tensor:
        """[1, T + 1, hidden] after the final norm, from a pass over prompt and tokens [1, T] at once."""
        with self._arithmetic():
            whole = torch.cat([prompt.embeddings, self.embed(token_ids).embeddings], dim=1)
            states = self.language.model(inputs_embeds=whole, use_cache=False).last_hidden_state
        first_tag = int((prompt.ids[0] == self.config["image_start_tag_id"]).nonzero()[0])
        return states[:, first_tag + 1 :]

    def logits(self, hidden: Tensor) -> Tensor:
        """[1, N, vocabulary] of hidden states [1, N, hidden]."""
        with self._arithmetic():
            return self.language.lm_head(hidden)

    # The diffusion stage

    def condition(self, hidden: Tensor, references: Sequence[Reference] = ()) -> Tensor:
        """Condition tokens [2, M, width], every null token written out, the null half first."""
        with self._arithmetic():
            connector = self.connector("diffusion_connector")
            halves = connector(torch.cat([torch.zeros_like(hidden), hidden]).to(self.dtype))
            if not (references and self.config.get("use_und_image_vae")):
                return halves
            cells = torch.cat(
                [reference.latent.permute(0, 2, 3, 1).flatten(1, 2) for reference in references], 1
            )
            seen = self.connector("und_image_vae_connector")(cells.to(self.dtype))
            return torch.cat([halves, torch.cat([torch.zeros_like(seen), seen])], dim=1)

    def predict(self, model_input: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """Noise predictions [2, C, H, W] for a model input [2, C, H, W]."""
        with self._arithmetic():
            return self.transformer(
                model_input.to(self.dtype), encoder_hidden_states=condition, timestep=timestep.expand(2)
            ).sample

    def denoise(
        self,
        noise: Tensor,
        condition: Tensor,
        references: Sequence[Reference] = (),
        *,
        steps: int = 30,
        guidance: float = 2.0,
    ) -> Iterator[tuple[Step, Tensor]]:
        """Every step of the loop, and the latent [1, C, h, w] after it."""
        latent = noise.to(self.wide)
        channelwise = self.transformer.config.in_channels == 2 * self.latent_channels
        beside = channelwise or self.config.get("use_und_image_vae_as_noise", False)
        self.scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1.0 / steps, steps))
        sigmas = self.scheduler.sigmas.to(self.wide)
        for index, timestep in enumerate(self.scheduler.timesteps):
            seen = latent
            if references and beside:
                seen = torch.cat([latent, references[0].latent.to(self.wide)], dim=1 if channelwise else 3)
            model_input = torch.cat([seen, seen])
            prediction = self.predict(model_input, timestep, condition)
            null, conditional = prediction.to(self.wide).chunk(2)
            guided = null + guidance * (conditional - null)
            guided = guided[:, : self.latent_channels, :, : self.latent_size]
            if self.wide == torch.float64:  # the scheduler itself would round the latent to float32
                latent = latent + (sigmas[index + 1] - sigmas[index]) * guided
            else:
                latent = self.scheduler.step(guided, timestep, latent).prev_sample
            yield Step(model_input, timestep, prediction), latent

    def latent(self, *arguments: Any, **options: Any) -> Tensor:
        """The latent after the last step of `denoise`."""
        latent = torch.empty(0)
        for _, latent in self.denoise(*arguments, **options):  # noqa: B007
            pass
        return latent

    def decode(self, latent: Tensor) -> Tensor:
        """Pixels [1, 3, H, W] in 0..1 of a latent [1, C, h, w]."""
        with self._arithmetic():
            decoded = self.vae.decode((latent / self.vae.config.scaling_factor).to(self.dtype)).sample
            return (decoded / 2 + 0.5).clamp(0, 1)

    def _arithmetic(self) -> Any:
        return Float64() if self.dtype == torch.float64 else torch.inference_mode()


def levels(pixels: Tensor) -> np.ndarray:
    """[1, 3, H, W] in 0..1 as grey levels uint8 [H, W, 3]."""
    return (pixels[0].permute(1, 2, 0).float().numpy() * 255).round().astype("uint8")


def _pixels(image: Image.Image) -> Tensor:
    """[1, 3, H, W] in 0..1."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).astype(np.float32) / 255).permute(2, 0, 1)[None]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
