"""BLIP3o-NEXT run the published way, on transformers, diffusers and torch alone: what the runtime must equal.

Everything is written out: a second full pass for the hidden states, every null token, both branches of
guidance at every step, the whole vision tower. Nothing of the runtime is imported but the published
configurations that a checkpoint refers to by name, so a mistake cannot be in both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from blip3o_rt.checkpoint.source import SANA_NAME, SIGLIP_NAME, known_folder

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
    """One reference image as the model sees it.

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
    """One step of the loop, unconditional branch first: what the transformer saw and what it answered."""

    model_input: Tensor
    timestep: Tensor
    prediction: Tensor


class PublishedModel:
    """A checkpoint folder in the original layout, in one dtype on one device.

    diffusion: a diffusers folder in place of the one that config.json names; ta_tok: a ta_tok.pth in place of
    the checkpoint's own image tokenizer. What config.json names and is not there is known by name.

    Every part is loaded when it is first used, and `release` gives the memory back; on the CPU, weights in
    the dtype of the file are mapped. float64 computes in float64 throughout; the latents are float32, or
    float64 then. Results are on the device.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        *,
        diffusion: Path | None = None,
        ta_tok: Path | None = None,
    ) -> None:
        self.folder, self.dtype, self.device = folder, dtype, torch.device(device)
        self.compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.config = _json(folder / "config.json")
        name = self.config["diffusion_name_or_path"]
        self._diffusers = diffusion or folder / name
        self._diffusion_configs = _diffusion_configs(self._diffusers, name)
        self._vae_config = self._diffusion_configs["vae"]
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(self._diffusion_configs["scheduler"])
        self._own_tower = ta_tok is None
        named = folder / (self.config.get("mm_vision_tower") or "ta_tok.pth")
        files = [ta_tok] if ta_tok else [file for file in (named, folder / "ta_tok.pth") if file.is_file()]
        self._ta_tok = files[0] if files else None
        content = torch.load(files[0], weights_only=True, mmap=True)["model"] if files else {}
        arguments = content.get("args", {})
        self.tower_config = _vision_config([*(file.parent for file in files), folder], arguments)
        self.tokens_per_image = arguments.get(
            "bottleneck_token_num", (self.tower_config["image_size"] // self.tower_config["patch_size"]) ** 2
        )
        self.selected_layer: int = arguments.get("select_layer_id", -2)
        self.latent_size: int = self._diffusion_configs["transformer"]["sample_size"]

    def release(self) -> None:
        """Forget every loaded part; each is loaded again when it is next used."""
        for part in ("weights", "tokenizer", "language", "transformer", "vae", "tower_weights", "tower"):
            self.__dict__.pop(part, None)

    @property
    def image_size(self) -> int:
        """Pixels a side of an image of `latent_size`, which may be set to draw smaller or larger ones."""
        return self.latent_size * self.vae.spatial_compression_ratio

    @property
    def latent_channels(self) -> int:
        return self._vae_config["latent_channels"]

    # Weights

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Every tensor of the checkpoint's safetensors files by name, mapped."""
        found: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob("model*.safetensors")):
            found |= load_file(path)
        return found

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def language(self) -> Qwen3ForCausalLM:
        """The language model with its head."""
        config = Qwen3Config(**{name: self.config[name] for name in QWEN3_KEYS.split()})
        state = {
            name: tensor
            for name, tensor in self.weights.items()
            if name.startswith(("model.layers.", "model.norm.", "model.embed_tokens.", "lm_head."))
        }
        if config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        with torch.device("meta"):
            model = Qwen3ForCausalLM(config)
        # Computed, not loaded; float32 in a bfloat16 model too, as from_pretrained leaves it.
        model.model.rotary_emb = Qwen3RotaryEmbedding(config)
        return self._loaded(model, state)

    @cached_property
    def _transformer_config(self) -> dict[str, Any]:
        """The channels are those of the weights: channel-wise editing widens them, and no file says so."""
        state = self._diffusion_part("model.sana.", "transformer")
        inwards, outwards = state["patch_embed.proj.weight"].shape, state["proj_out.weight"].shape
        channels = {"in_channels": inwards[1], "out_channels": outwards[0] // math.prod(inwards[2:])}
        return {**self._diffusion_configs["transformer"], **channels}

    @cached_property
    def transformer(self) -> Any:
        with torch.device("meta"):
            model = SanaTransformer2DModel.from_config(self._transformer_config)
        return self._loaded(model, self._diffusion_part("model.sana.", "transformer"))

    @cached_property
    def vae(self) -> Any:
        with torch.device("meta"):
            model = AutoencoderDC.from_config(self._vae_config)
        return self._loaded(model, self._diffusion_part("model.sana_vae.", "vae"))

    @cached_property
    def tower_weights(self) -> dict[str, Tensor]:
        """Every tensor of the image tokenizer, from the checkpoint or from ta_tok.pth; both name them alike.

        Empty where there is none.
        """
        state = self._part("model.vision_tower.vision_tower.") if self._own_tower else {}
        if not state and self._ta_tok is not None:
            state = torch.load(self._ta_tok, weights_only=True, mmap=True)["model"]["sd"]
        return {name: self._placed(tensor) for name, tensor in state.items()}

    @cached_property
    def tower(self) -> SiglipVisionModel:
        """The vision tower; the image tokenizer's own layers are only in `tower_weights`."""
        state = {n.removeprefix("encoder."): t for n, t in self.tower_weights.items()}
        state = {name: state[name] for name in state if f"encoder.{name}" in self.tower_weights}
        layers = self.tower_config["num_hidden_layers"]
        tower = SiglipVisionModel(SiglipVisionConfig(**self.tower_config))
        missing, unexpected = tower.load_state_dict(state, strict=False)
        # A checkpoint may leave out what stands above the selected hidden state, and only that.
        selected = range(layers + 1)[self.selected_layer]
        unused = (*(f"encoder.layers.{i}." for i in range(selected, layers)), "post_layernorm.", "head.")
        missing = [name for name in missing if not name.startswith(unused)]
        if missing or unexpected:
            raise ValueError(f"vision tower: {missing} missing, {unexpected} unexpected")
        return tower.eval().requires_grad_(False).to(self.device, self.dtype)

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.weights.items()
            if name.startswith(prefix)
        }

    def _diffusion_part(self, prefix: str, component: str) -> dict[str, Tensor]:
        """The checkpoint's own tensors where it has the part (trained further), else those of the folder."""
        state = self._part(prefix)
        if state:
            return state
        single = self._diffusers / component / "diffusion_pytorch_model.safetensors"
        shards = sorted(single.parent.glob(f"{single.stem}-*.safetensors"))
        for path in [single] if single.is_file() else shards:
            state |= load_file(path)
        return state

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype) if tensor.is_floating_point() else tensor.to(self.device)

    def _loaded(self, module: Any, state: dict[str, Tensor]) -> Any:
        """A module without values given those of the state, tensor by tensor."""
        module.load_state_dict({name: self._placed(t) for name, t in state.items()}, assign=True)
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            raise ValueError(f"{type(module).__name__} has tensors that no checkpoint gives")
        if self.dtype == torch.float64:
            module.to(torch.float64)
        return module.eval().requires_grad_(False).to(self.device)

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
        return self._loaded(layers, state)

    # The reference image

    def reference(self, image: Image.Image) -> Reference:
        """What an edit takes from one RGB image."""
        pixels = self.tower_pixels(image)
        features, codes = self.tokenize(pixels)
        latent = self.encode(self.vae_pixels(image))
        return Reference(pixels, features, codes + self.config["image_start_token_id"], latent)

    def tower_pixels(self, image: Image.Image) -> Tensor:
        side = self.tower_config["image_size"]
        return (_pixels(image.resize((side, side), Image.Resampling.BICUBIC)) - 0.5) / 0.5

    def tokenize(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features [1, T, width] and codes [T] of TA-Tok."""
        features = self.features(pixels)
        return features, self.code_scores(features).argmax(dim=-1)

    def features(self, pixels: Tensor) -> Tensor:
        """Features [1, T, width] of TA-Tok: the selected hidden state after Linear and Tanh."""
        with self._arithmetic("tower"):
            states = self.tower(
                pixel_values=pixels.to(self.device, self.dtype), output_hidden_states=True
            ).hidden_states
            if len(states) != self.tower_config["num_hidden_layers"] + 1:
                raise ValueError(f"the vision tower returned {len(states)} hidden states")
            return torch.tanh(self._tower_linear(states[self.selected_layer], "encode_task_layer.0"))

    def code_scores(self, features: Tensor) -> Tensor:
        """Cosines [T, C] of features [1, T, width] with every code."""
        with self._arithmetic("tower_weights"):
            projected = F.normalize(self._tower_linear(features, "bottleneck.in_linear"), dim=-1)
            embedding = self.tower_weights["bottleneck.regularizer.embedding.weight"]
            codebook = self._tower_linear(embedding, "bottleneck.regularizer.embedding_proj")
            return projected[0] @ F.normalize(codebook, dim=-1).T

    def _tower_linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tower_weights[f"{name}.weight"], self.tower_weights[f"{name}.bias"])

    def vae_pixels(self, image: Image.Image) -> Tensor:
        """Short side to the image's size (bilinear), the long side's fraction dropped, centre cut out."""
        size, (width, height) = self.image_size, image.size
        resized = (
            (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
        )
        left, top = (int(round((side - size) / 2.0)) for side in resized)  # noqa: RUF046
        image = image.resize(resized, Image.Resampling.BILINEAR)
        return (_pixels(image.crop((left, top, left + size, top + size))) - 0.5) / 0.5

    def encode(self, pixels: Tensor) -> Tensor:
        with self._arithmetic("vae"):
            return self.vae.encode(pixels.to(self.device, self.dtype)).latent * self.vae.config.scaling_factor

    # The autoregressive stage

    def prompt_ids(self, text: str, count: int = 0) -> Tensor:
        """Ids [1, P] of an image's prompt, or of an edit's with placeholders for `count` images."""
        pads = "<|image_pad|>" * (self.tokens_per_image * count)
        content = TEXT_TO_IMAGE + text
        if count:
            content = EDIT + text + ".\n" + f"<|vision_start|>{pads}<|vision_end|>"
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        rendered = str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
        return torch.tensor([self.tokenizer(rendered + "<im_start><S0>")["input_ids"]])

    def prompt(self, text: str, references: Sequence[Reference] = ()) -> Prompt:
        """The prompt of an image, or of an edit where there are references."""
        ids = self.prompt_ids(text, len(references))
        pad = ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        if not references:
            return self.embed(ids)
        if not self.config.get("use_tar_siglip_features"):
            ids[pad] = torch.cat([reference.token_ids for reference in references]).cpu()
            return self.embed(ids)
        prompt = self.embed(ids)
        connector = self.connector("tar_siglip_features_connector")
        with self._arithmetic():
            prompt.embeddings[pad] = connector(torch.cat([reference.features[0] for reference in references]))
        return prompt

    def embed(self, ids: Tensor) -> Prompt:
        """A prompt of token ids [1, P] alone."""
        with self._arithmetic("language"):
            return Prompt(ids, self.language.model.embed_tokens(ids.to(self.device)))

    def greedy_tokens(self, prompt: Prompt, *, image_tokens_only: bool) -> Tensor:
        """Token ids [1, T]: the likeliest one each time, of the image tokens or of the whole vocabulary."""
        start = self.config["image_start_token_id"] if image_tokens_only else 0
        stop = start + self.config["num_image_tokens"] if image_tokens_only else self.config["vocab_size"]
        tokens: list[int] = []
        embeddings, cache = prompt.embeddings, None
        while len(tokens) < self.tokens_per_image:
            with self._arithmetic("language"):
                output = self.language(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
            tokens.append(start + int(output.logits[0, -1, start:stop].argmax()))
            embeddings, cache = self.embed(torch.tensor([tokens[-1:]])).embeddings, output.past_key_values
        return torch.tensor([tokens])

    def hidden_states(self, prompt: Prompt, token_ids: Tensor) -> Tensor:
        """[1, T + 1, hidden] after the final norm, from a pass over prompt and tokens [1, T] at once."""
        with self._arithmetic("language"):
            whole = torch.cat([prompt.embeddings, self.embed(token_ids).embeddings], dim=1)
            states = self.language.model(inputs_embeds=whole, use_cache=False).last_hidden_state
        first_tag = int((prompt.ids[0] == self.config["image_start_tag_id"]).nonzero()[0])
        return states[:, first_tag + 1 :]

    def logits(self, hidden: Tensor) -> Tensor:
        """[1, N, vocabulary] of hidden states [1, N, hidden]."""
        with self._arithmetic("language"):
            return self.language.lm_head(hidden.to(self.device))

    # The diffusion stage

    def condition(self, hidden: Tensor, references: Sequence[Reference] = ()) -> Tensor:
        """Condition tokens [2, M, width], every null token written out, the unconditional branch first."""
        looks = bool(references) and self.config.get("use_und_image_vae", False)
        of_hidden = self.connector("diffusion_connector")
        of_latents = self.connector("und_image_vae_connector") if looks else None
        with self._arithmetic():
            hidden = torch.cat([torch.zeros_like(hidden), hidden])
            branches = of_hidden(hidden.to(self.device, self.dtype))
            if of_latents is None:
                return branches
            cells = torch.cat(
                [reference.latent.permute(0, 2, 3, 1).flatten(1, 2) for reference in references], 1
            )
            seen = of_latents(cells.to(self.device, self.dtype))
            return torch.cat([branches, torch.cat([torch.zeros_like(seen), seen])], dim=1)

    def predict(self, model_input: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """Noise predictions [2, C, H, W] for a model input [2, C, H, W]."""
        with self._arithmetic("transformer"):
            return self.transformer(
                model_input.to(self.device, self.dtype),
                encoder_hidden_states=condition,
                timestep=timestep.to(self.device).expand(2),
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
        latent = noise.to(self.device, self.compute_dtype)
        channelwise = self._transformer_config["in_channels"] == 2 * self.latent_channels
        beside = channelwise or self.config.get("use_und_image_vae_as_noise", False)
        self.scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1.0 / steps, steps))
        sigmas = self.scheduler.sigmas.to(self.compute_dtype)
        for index, timestep in enumerate(self.scheduler.timesteps):
            seen = latent
            if references and beside:
                seen = torch.cat([latent, references[0].latent.to(latent)], dim=1 if channelwise else 3)
            model_input = torch.cat([seen, seen])
            prediction = self.predict(model_input, timestep, condition)
            null, conditional = prediction.to(self.compute_dtype).chunk(2)
            guided = null + guidance * (conditional - null)
            guided = guided[:, : self.latent_channels, :, : self.latent_size]
            if self.compute_dtype == torch.float64:  # the scheduler itself would round the latent to float32
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
        with self._arithmetic("vae"):
            decoded = self.vae.decode(
                (latent / self.vae.config.scaling_factor).to(self.device, self.dtype)
            ).sample
            return (decoded / 2 + 0.5).clamp(0, 1)

    def _arithmetic(self, *parts: str) -> Any:
        """The mode to compute in; the parts are loaded before it begins, which keeps it off their values."""
        for part in parts:
            getattr(self, part)
        return Float64() if self.dtype == torch.float64 else torch.inference_mode()


def levels(pixels: Tensor) -> np.ndarray:
    """[1, 3, H, W] in 0..1 as gray levels uint8 [H, W, 3]."""
    return (pixels[0].permute(1, 2, 0).float().cpu().numpy() * 255).round().astype("uint8")


def _pixels(image: Image.Image) -> Tensor:
    """[1, 3, H, W] in 0..1."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).astype(np.float32) / 255).permute(2, 0, 1)[None]


def _diffusion_configs(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Configurations of transformer, vae and scheduler: the folder's, else those known by the name."""
    found = folder if (folder / "transformer" / "config.json").is_file() else known_folder(name, SANA_NAME)
    if found is None:
        raise ValueError(f"{folder} is no diffusers folder, and {name} is not known by name")
    return {
        "transformer": SanaTransformer2DModel.load_config(found / "transformer"),
        "vae": AutoencoderDC.load_config(found / "vae"),
        "scheduler": FlowMatchEulerDiscreteScheduler.load_config(found / "scheduler"),
    }


def _vision_config(folders: Sequence[Path], arguments: dict[str, Any]) -> dict[str, Any]:
    """The vision tower's configuration: below one of the folders, else known by the teacher's name."""
    teacher = arguments.get("teacher", SIGLIP_NAME)
    for name in (teacher, "siglip2"):
        for folder in folders:
            if (folder / name / "config.json").is_file():
                config = _json(folder / name / "config.json")
                return config.get("vision_config", config)
    known = known_folder(teacher, SIGLIP_NAME)
    if known is None:
        raise ValueError(f"the vision tower {teacher} is not known by name, and there is no folder siglip2")
    return _json(known / "config.json")


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
