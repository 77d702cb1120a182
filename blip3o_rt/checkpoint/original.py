"""Reading a published checkpoint: its configuration files, and where each tensor of the model is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from blip3o_rt.checkpoint import published
from blip3o_rt.checkpoint.config_file import ConfigFile
from blip3o_rt.checkpoint.original_config import (
    parse_ar,
    parse_dit,
    parse_edit,
    parse_image_tokens,
    parse_scheduler,
    parse_ta_tok,
    parse_vae,
)
from blip3o_rt.checkpoint.parts import PREFIXES, published_name
from blip3o_rt.checkpoint.tensor_file import SafetensorsFile, TensorFile, TorchTensors, read_torch_file
from blip3o_rt.config import DiTConfig, ModelConfig, TATokConfig
from blip3o_rt.errors import CheckpointError, ConfigError

PathName = str | os.PathLike[str]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class TensorIndex:
    """Tensors of several files under one set of names, as a sharded checkpoint has them."""

    def __init__(self, files: list[TensorFile]) -> None:
        self._owner: dict[str, TensorFile] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            for name, shape in file.shapes.items():
                if name in self._owner:
                    first = self._owner[name].path
                    raise CheckpointError(
                        f"{name} is in both {first} and {file.path}; remove one of the files"
                    )
                self._owner[name] = file
                self.shapes[name] = shape

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def has_part(self, part: str) -> bool:
        """Whether any tensor stands under the part's prefix."""
        return any(name.startswith(PREFIXES[part]) for name in self.shapes)

    def file(self, name: str) -> TensorFile:
        """The file that holds a tensor."""
        return self._owner[name]


@dataclass(frozen=True)
class PartSource:
    """Where one part's original tensors are: an index, and how names within the part are spelled there."""

    part: str
    index: TensorIndex
    where: str
    prefixed: bool

    def name(self, source: str) -> str:
        """The tensor's name in the index."""
        return published_name(self.part, source) if self.prefixed else source


@dataclass(frozen=True)
class OriginalCheckpoint:
    """A published checkpoint: geometry, source of each part, tokenizer files, and every file read."""

    path: Path
    config: ModelConfig
    sources: dict[str, PartSource]
    files: list[Path]
    tokenizer_files: list[Path]
    stored_dtype: torch.dtype
    warnings: list[str] = field(default_factory=list)


def read_original(
    path: PathName, *, diffusion: PathName | None = None, ta_tok: PathName | None = None
) -> OriginalCheckpoint:
    """Find and check everything of a published checkpoint folder except the tensors' values and shapes.

    `diffusion` is a diffusers folder (transformer/, vae/, scheduler/) in place of the one config.json names;
    `ta_tok` is a ta_tok.pth whose weights and settings are used in place of the checkpoint's own.
    Raises ConfigError for a configuration this runtime does not compute, CheckpointError for missing files.
    """
    root = Path(path)
    if not root.is_dir():
        raise CheckpointError(f"{root}: not a folder; accepted: a checkpoint folder with config.json")
    config = ConfigFile.read(root / "config.json")
    index = TensorIndex(_weight_files(root, "model"))
    folder = _DiffusionFolder.find(root, config, None if diffusion is None else Path(diffusion))
    tower = _Tower.find(root, config, index, None if ta_tok is None else Path(ta_tok))

    vae = parse_vae(folder.config("vae"))
    model = ModelConfig(
        ar=parse_ar(config, index.shapes),
        image_tokens=parse_image_tokens(config, tower.tokens),
        dit=_dit_config(folder.config("transformer"), index),
        vae=vae,
        scheduler=parse_scheduler(folder.config("scheduler")),
        edit=parse_edit(config),
        ta_tok=tower.config,
    )
    _check_latent_channels(model, folder)
    sources = {part: PartSource(part, index, str(root), True) for part in ("ar", "connector")}
    sources["dit"] = folder.source("dit", "transformer", index, root)
    sources["vae"] = folder.source("vae", "vae", index, root)
    if tower.source is not None:
        sources["ta_tok"] = tower.source
    return OriginalCheckpoint(
        path=root,
        config=model,
        sources=sources,
        files=list(_files_read(root, folder, tower, sources)),
        tokenizer_files=_tokenizer_files(root),
        stored_dtype=_stored_dtype(index),
        warnings=tower.warnings(model),
    )


def _weight_files(folder: Path, stem: str) -> list[TensorFile]:
    """The safetensors files named `stem`*: those its index lists, else all of them."""
    indexes = sorted(folder.glob(f"{stem}*.safetensors.index.json"))
    if indexes:
        return [SafetensorsFile(folder / name) for name in _shard_names(indexes[0])]
    single = folder / f"{stem}.safetensors"
    found = [single] if single.is_file() else sorted(folder.glob(f"{stem}*.safetensors"))
    if found:
        return [SafetensorsFile(path) for path in found]
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
    hint = f" ({pickles[0].name} is a pickle; save it as safetensors)" if pickles else ""
    raise CheckpointError(
        f"{folder}: no weights{hint}; accepted: {stem}.safetensors, or shards with "
        f"{stem}.safetensors.index.json"
    )


def _shard_names(index_path: Path) -> list[str]:
    weight_map = ConfigFile.read(index_path).data.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(
            f"{index_path}: no weight_map; accepted: an index of tensor names to shard files"
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index_path}: shard {name!r} is not a plain file name in the same folder")
    return names


def _stored_dtype(index: TensorIndex) -> torch.dtype:
    """bfloat16 where the checkpoint stores that, else float32."""
    name = published_name("ar", "embed_tokens.weight")
    stored = index.file(name).dtype(name) if name in index else torch.float32
    return torch.bfloat16 if stored == torch.bfloat16 else torch.float32


@dataclass(frozen=True)
class _DiffusionFolder:
    """A diffusers folder, or a published one known by name (configurations only, no weights)."""

    path: Path | None
    known: Mapping[str, dict[str, Any]]
    name: str

    @classmethod
    def find(cls, root: Path, config: ConfigFile, given: Path | None) -> _DiffusionFolder:
        if given is not None:
            if not (given / "transformer" / "config.json").is_file():
                raise CheckpointError(
                    f"{given}: no transformer/config.json in it; accepted: a diffusers folder with "
                    "transformer/, vae/ and scheduler/"
                )
            return cls(given, {}, str(given))
        name = config.text("diffusion_name_or_path")
        if (root / name / "transformer" / "config.json").is_file():
            return cls(root / name, {}, str(root / name))
        known = published.known_name(name, published.DIFFUSION)
        if known is None:
            raise config.error(
                "diffusion_name_or_path",
                "a diffusers folder on this machine (give yours with --diffusion), or "
                + " or ".join(published.DIFFUSION),
            )
        return cls(None, published.DIFFUSION[known], known)

    def config(self, component: str) -> ConfigFile:
        if self.path is None:
            return ConfigFile(f"{self.name}: {component}", dict(self.known[component]))
        return ConfigFile.read(self.config_path(component))

    def config_path(self, component: str) -> Path:
        file = "scheduler_config.json" if component == "scheduler" else "config.json"
        return (self.path or Path()) / component / file

    def source(self, part: str, component: str, index: TensorIndex, root: Path) -> PartSource:
        """The checkpoint's own tensors where it has the part (trained further), else the folder's."""
        if index.has_part(part):
            return PartSource(part, index, str(root), True)
        if self.path is None:
            raise CheckpointError(
                f"{root}: no tensors under {PREFIXES[part]} and no diffusers folder to take them from; "
                "give one with --diffusion"
            )
        folder = self.path / component
        return PartSource(
            part, TensorIndex(_weight_files(folder, "diffusion_pytorch_model")), str(folder), False
        )


def _dit_config(config: ConfigFile, index: TensorIndex) -> DiTConfig:
    """The DiT's geometry. Its channel counts are those of the trained weights where the checkpoint has them:
    the channel-wise editing variant widens them without writing that into any configuration file."""
    patch = index.shapes.get(published_name("dit", "patch_embed.proj.weight"))
    projection = index.shapes.get(published_name("dit", "proj_out.weight"))
    if patch is not None and projection is not None and len(patch) == 4 and len(projection) == 2:
        stated = config.integer("in_channels")
        if patch[1] == 2 * stated:
            widened = {"in_channels": patch[1], "out_channels": projection[0] // max(1, patch[2] * patch[3])}
            config = ConfigFile(config.name, {**config.data, **widened})
    return parse_dit(config)


def _check_latent_channels(model: ModelConfig, folder: _DiffusionFolder) -> None:
    latent, dit = model.vae.latent_channels, model.dit
    accepted = [latent, 2 * latent] if model.edit.use_und_image_vae_as_noise else [latent]
    where = f"{folder.name}: transformer"
    if dit.in_channels not in accepted:
        options = " or ".join(str(channels) for channels in accepted)
        raise ConfigError(
            f"{where}: in_channels is {dit.in_channels}; accepted: {options}, from the autoencoder's "
            f"{latent} latent channels (twice that only with use_und_image_vae_as_noise)"
        )
    if dit.out_channels not in (latent, dit.in_channels):
        raise ConfigError(
            f"{where}: out_channels is {dit.out_channels}; accepted: {latent} or {dit.in_channels}"
        )


@dataclass(frozen=True)
class _Tower:
    """The vision tower: its geometry and source, both None in a text-to-image-only checkpoint."""

    config: TATokConfig | None
    source: PartSource | None
    tokens: int  # image tokens per picture
    config_files: tuple[Path, ...]

    @classmethod
    def find(cls, root: Path, config: ConfigFile, index: TensorIndex, given: Path | None) -> _Tower:
        """Weights: of `given`, else of the checkpoint, else of a ta_tok.pth it names or has beside it.
        Settings: of the ta_tok.pth where there is one, else those that the weights' shapes tell."""
        file = given if given is not None else _ta_tok_file(root, config)
        settings, tensors = (None, None) if file is None else _read_ta_tok(file)
        inside = index.has_part("ta_tok")
        if not inside and tensors is None:
            return cls(None, None, _tokens_without_tower(root), ())
        if tensors is not None and (given is not None or not inside):
            source = PartSource("ta_tok", TensorIndex([tensors]), str(file), False)
        else:
            source = PartSource("ta_tok", index, str(root), True)
        settings = settings or _settings_from_shapes(root, index)
        vision, vision_path = _vision_config(root, file, settings)
        ta_tok = parse_ta_tok(settings, vision)
        read = tuple(path for path in (file, vision_path) if path is not None)
        return cls(ta_tok, source, ta_tok.tokens, read)

    def warnings(self, model: ModelConfig) -> list[str]:
        if self.config is None and model.edit.use_tar_siglip_features:
            return ["use_tar_siglip_features is set but there is no vision tower: editing is not possible"]
        return []


def _ta_tok_file(root: Path, config: ConfigFile) -> Path | None:
    named = config.text("mm_vision_tower", "ta_tok.pth")
    for candidate in (root / named, root / "ta_tok.pth"):
        if candidate.is_file():
            return candidate
    return None


def _read_ta_tok(path: Path) -> tuple[ConfigFile, TorchTensors]:
    """Settings and tensors of a ta_tok.pth, {"model": {"args": settings, "sd": tensors}}."""
    data = read_torch_file(path)
    model = data.get("model") if isinstance(data, dict) else None
    arguments = model.get("args") if isinstance(model, dict) else None
    state = model.get("sd") if isinstance(model, dict) else None
    if not isinstance(arguments, dict) or not isinstance(state, dict):
        raise CheckpointError(
            f'{path}: not a TA-Tok file; accepted: {{"model": {{"args": settings, "sd": tensors}}}}'
        )
    tensors = {str(name): value for name, value in state.items() if _is_plain(value)}
    return ConfigFile(f"{path}: args", arguments), TorchTensors(path, tensors)


def _is_plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized


def _tokens_without_tower(root: Path) -> int:
    """Tokens per picture of a checkpoint that has no tower: its SigLIP configuration's patches, or 729."""
    path = root / "siglip2" / "config.json"
    vision = (
        ConfigFile("published", published.SIGLIP2_VISION) if not path.is_file() else _vision_section(path)
    )
    return (vision.integer("image_size", 224) // vision.integer("patch_size", 16)) ** 2


def _vision_section(path: Path) -> ConfigFile:
    """The vision part of a SigLIP configuration, which is either all of the file or a section of it."""
    config = ConfigFile.read(path)
    return config.section("vision_config") if "vision_config" in config.data else config


def _settings_from_shapes(root: Path, index: TensorIndex) -> ConfigFile:
    """TA-Tok's settings as its weights show them, for a checkpoint that has the tower but no ta_tok.pth."""
    name = published_name("ta_tok", "bottleneck.regularizer.embedding.weight")
    shape = index.shapes.get(name)
    if shape is None or len(shape) != 2:
        raise CheckpointError(f"{root}: {name} is missing or not a matrix; accepted: a complete vision tower")
    bottleneck = published.TA_TOK_ARGUMENTS["bottleneck"]["args"]
    regularizer = {"name": "simvq", "args": {"codebook_size": shape[0], "l2_normalized": True}}
    arguments = {**bottleneck, "bottleneck_dim": shape[1], "regularizer": regularizer}
    return ConfigFile(f"{root}: vision tower", {"bottleneck": {"name": "bottleneck", "args": arguments}})


def _vision_config(root: Path, ta_tok: Path | None, settings: ConfigFile) -> tuple[ConfigFile, Path | None]:
    """SigLIP's vision configuration: the teacher's folder, else siglip2/ beside, else one known by name."""
    teacher = settings.text("teacher", published.SIGLIP_NAME)
    parents = [root] if ta_tok is None else [ta_tok.parent, root]
    candidates = [parent / name / "config.json" for name in (teacher, "siglip2") for parent in parents]
    for path in candidates:
        if path.is_file():
            return _vision_section(path), path
    known = published.known_name(teacher, published.VISION)
    if known is None:
        raise settings.error(
            "teacher", f"{' or '.join(published.VISION)}, or a folder with SigLIP's config.json named siglip2"
        )
    return ConfigFile(known, dict(published.VISION[known])), None


def _tokenizer_files(root: Path) -> list[Path]:
    found = [root / name for name in TOKENIZER_FILES if (root / name).is_file()]
    names = {path.name for path in found}
    if "tokenizer_config.json" not in names or not ({"tokenizer.json", "vocab.json"} & names):
        raise CheckpointError(
            f"{root}: no tokenizer; accepted: tokenizer_config.json with tokenizer.json (or vocab.json and "
            "merges.txt)"
        )
    return found


def _files_read(
    root: Path, folder: _DiffusionFolder, tower: _Tower, sources: Mapping[str, PartSource]
) -> Iterator[Path]:
    """Every file the conversion depends on, each once."""
    paths = [root / "config.json"]
    if folder.path is not None:
        paths += [folder.config_path(component) for component in ("transformer", "vae", "scheduler")]
    paths += tower.config_files
    for source in sources.values():
        paths += sorted({source.index.file(name).path for name in source.index.shapes})
    yield from dict.fromkeys(paths)
