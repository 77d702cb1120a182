"""Opening a checkpoint in the published layout: its configuration, and where each tensor of the model is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from blip3o_rt.checkpoint.parts import HEAD, PREFIXES, PartSource, layouts, published_name
from blip3o_rt.checkpoint.published_config import (
    ConfigFile,
    parse_ar,
    parse_dit,
    parse_edit,
    parse_image_tokens,
    parse_scheduler,
    parse_ta_tok,
    parse_vae,
)
from blip3o_rt.checkpoint.source import (
    KNOWN,
    KNOWN_SIGLIP,
    SANA_NAME,
    SIGLIP_NAME,
    Source,
    checkpoint_folder,
    is_file,
    known_folder,
)
from blip3o_rt.checkpoint.tensor_file import (
    WEIGHT_DTYPES,
    StoredTensor,
    Tensors,
    read_safetensors,
    read_torch_file,
    torch_tensors,
)
from blip3o_rt.config import DiTConfig, ModelConfig, TATokConfig
from blip3o_rt.errors import CheckpointError
from blip3o_rt.weights import Source as Needed

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
COMPONENTS = {
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
STOCK_WEIGHTS = "diffusion_pytorch_model"  # how files of a diffusers component begin

# Tensors that a published checkpoint has and inference does not use.
_TOWER = re.escape(PREFIXES["ta_tok"])
UNUSED = re.compile(
    rf"lm_head\.weight$|.*rotary_emb\.inv_freq$|model\.sana\.patch_embed\.pos_embed$|.*position_ids$"
    rf"|model\.(und_image_vae|und_image_vae_as_noise|tar_siglip_features)_connector\."
    rf"|(?:{_TOWER})?(decoder|decode_task_layer|bottleneck\.out_linear|scale_layer|teacher)\."
    rf"|(?:{_TOWER})?encoder\.(post_layernorm|head|encoder\.layers)\."
    rf"|(?:{_TOWER})?bottleneck\.regularizer\.stochastic_temperature_inv$"
)


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A published checkpoint, opened: everything is known and checked except the tensors' values.

    Attributes:
        path: Its folder.
        config: The model's configuration.
        sources: Where each part's tensors are, by part.
        files: Every file that was read or will be, each once.
        tokenizer_files: The tokenizer's files.
        stored_dtype: bfloat16 where the checkpoint stores that, else float32.
        warnings: What is left out.
    """

    path: Path
    config: ModelConfig
    sources: dict[str, PartSource]
    files: list[Path]
    tokenizer_files: list[Path]
    stored_dtype: torch.dtype
    warnings: list[str] = field(default_factory=list)


def open_published(source: Source) -> PublishedCheckpoint:
    """Find and check everything of a published checkpoint except the tensors' values.

    Raises:
        ConfigError: A configuration that this runtime does not compute.
        CheckpointError: Files or tensors that are missing, damaged, or of another shape or type.
    """
    root = checkpoint_folder(source.path)
    config = ConfigFile.read(root / "config.json")
    tensors = read_tensors(root, "model")
    folder = _diffusion_folder(root, config, source)
    tower = _Tower.find(root, config, tensors, source)
    parts = {name: ConfigFile.read(folder / file) for name, file in COMPONENTS.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    model = ModelConfig(
        ar=parse_ar(config, shapes),
        image_tokens=parse_image_tokens(config, tower.tokens),
        dit=_dit_config(parts["transformer"], shapes),
        vae=parse_vae(parts["vae"]),
        scheduler=parse_scheduler(parts["scheduler"]),
        edit=parse_edit(config),
        ta_tok=tower.config,
    )
    config.checked(model)
    sources = {part: PartSource(part, tensors, str(root), True) for part in ("ar", "connector")}
    sources["dit"] = _diffusion_source("dit", tensors, root, folder / "transformer")
    sources["vae"] = _diffusion_source("vae", tensors, root, folder / "vae")
    if tower.source is not None:
        sources["ta_tok"] = tower.source
    configs = [folder / file for file in COMPONENTS.values()] + tower.config_files
    return PublishedCheckpoint(
        path=root,
        config=model,
        sources=sources,
        files=list(_files_read(root, configs, sources)),
        tokenizer_files=_tokenizer_files(root),
        stored_dtype=_stored_dtype(tensors),
        warnings=tower.warnings(model) + _check_tensors(model, sources),
    )


def read_tensors(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """The tensors of the safetensors files named `stem`*: those its index lists, else all of them."""
    found: dict[str, StoredTensor] = {}
    for path in _weight_files(folder, stem):
        for name, tensor in read_safetensors(path).items():
            if name in found:
                raise CheckpointError(
                    f"{name} is in both {found[name].path} and {path}; remove one of the files"
                )
            found[name] = tensor
    return found


def _weight_files(folder: Path, stem: str) -> list[Path]:
    indexes = sorted(folder.glob(f"{stem}*.safetensors.index.json"))
    if indexes:
        return [folder / name for name in _shard_names(indexes[0])]
    single = folder / f"{stem}.safetensors"
    found = [single] if single.is_file() else sorted(folder.glob(f"{stem}*.safetensors"))
    if found:
        return found
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


def _stored_dtype(tensors: Tensors) -> torch.dtype:
    embedding = tensors.get(published_name("ar", "embed_tokens.weight"))
    return torch.bfloat16 if embedding is not None and embedding.dtype == torch.bfloat16 else torch.float32


def _diffusion_folder(root: Path, config: ConfigFile, source: Source) -> Path:
    """The diffusers folder: the one given, the one that config.json names, or a published one's known
    configurations, which come without weights."""
    if source.diffusion is not None:
        given = checkpoint_folder(source.diffusion)
        if not is_file(given / COMPONENTS["transformer"]):
            raise CheckpointError(
                f"{given}: no transformer/config.json in it; accepted: a diffusers folder with "
                "transformer/, vae/ and scheduler/"
            )
        return given
    name = config.text("diffusion_name_or_path")
    if is_file(root / name / COMPONENTS["transformer"]):
        return root / name
    known = known_folder(name, SANA_NAME)
    if known is None:
        accepted = f"a diffusers folder on this machine (give yours with --diffusion), or {SANA_NAME}"
        raise config.error("diffusion_name_or_path", accepted)
    return known


def _diffusion_source(part: str, tensors: Tensors, root: Path, stock: Path) -> PartSource:
    """The checkpoint's own tensors where it has the part (trained further), else the diffusers folder's."""
    if any(name.startswith(PREFIXES[part]) for name in tensors):
        return PartSource(part, tensors, str(root), True)
    if KNOWN in stock.parents:
        raise CheckpointError(
            f"{root}: no tensors under {PREFIXES[part]} and no diffusers folder to take them from; "
            "give one with --diffusion"
        )
    return PartSource(part, read_tensors(stock, STOCK_WEIGHTS), str(stock), False)


def _dit_config(config: ConfigFile, shapes: Mapping[str, tuple[int, ...]]) -> DiTConfig:
    """The DiT's numbers. Its channel counts are those of the trained weights where the checkpoint has them:
    the channel-wise editing variant widens them without writing that into any configuration file."""
    patch = shapes.get(published_name("dit", "patch_embed.proj.weight"))
    projection = shapes.get(published_name("dit", "proj_out.weight"))
    if patch is not None and projection is not None and len(patch) == 4 and len(projection) == 2:
        stated = config.integer("in_channels")
        if patch[1] == 2 * stated:
            widened = {"in_channels": patch[1], "out_channels": projection[0] // max(1, patch[2] * patch[3])}
            config = ConfigFile(config.name, {**config.data, **widened})
    return parse_dit(config)


@dataclass(frozen=True)
class _Tower:
    """The vision tower: its numbers and source, both None in a text-to-image-only checkpoint."""

    config: TATokConfig | None
    source: PartSource | None
    tokens: int  # image tokens per image
    config_files: list[Path]

    @classmethod
    def find(cls, root: Path, config: ConfigFile, tensors: Tensors, given: Source) -> _Tower:
        """Weights: of the file given, else of the checkpoint, else of a ta_tok.pth it names or has beside it.
        Settings: of the ta_tok.pth where there is one, else those that the weights' shapes tell."""
        file = _ta_tok_file(root, config) if given.ta_tok is None else Path(given.ta_tok).expanduser()
        settings, loose = (None, None) if file is None else _read_ta_tok(file)
        inside = any(name.startswith(PREFIXES["ta_tok"]) for name in tensors)
        if not inside and loose is None:
            return cls(None, None, _tokens_without_tower(root), [])
        if loose is not None and (given.ta_tok is not None or not inside):
            source = PartSource("ta_tok", loose, str(file), False)
        else:
            source = PartSource("ta_tok", tensors, str(root), True)
        settings = settings or _settings_from_shapes(root, tensors)
        vision_path = _vision_config(root, file, settings)
        ta_tok = parse_ta_tok(settings, _vision_section(vision_path))
        return cls(ta_tok, source, ta_tok.tokens, [path for path in (file, vision_path) if path is not None])

    def warnings(self, model: ModelConfig) -> list[str]:
        if self.config is None and model.edit.use_tar_siglip_features:
            return ["use_tar_siglip_features is set but there is no vision tower: editing is not possible"]
        return []


def _ta_tok_file(root: Path, config: ConfigFile) -> Path | None:
    named = config.text("mm_vision_tower", "ta_tok.pth")
    return next(filter(is_file, (root / named, root / "ta_tok.pth")), None)


def _read_ta_tok(path: Path) -> tuple[ConfigFile, dict[str, StoredTensor]]:
    """Settings and tensors of a ta_tok.pth, {"model": {"args": settings, "sd": tensors}}."""
    data = read_torch_file(path)
    model = data.get("model") if isinstance(data, dict) else None
    arguments = model.get("args") if isinstance(model, dict) else None
    state = model.get("sd") if isinstance(model, dict) else None
    if not isinstance(arguments, dict) or not isinstance(state, dict):
        raise CheckpointError(
            f'{path}: not a TA-Tok file; accepted: {{"model": {{"args": settings, "sd": tensors}}}}'
        )
    return ConfigFile(f"{path}: args", arguments), torch_tensors(path, state)


def _tokens_without_tower(root: Path) -> int:
    """Tokens per image of a checkpoint that has no tower: its SigLIP configuration's patches, or 729."""
    own = root / "siglip2" / "config.json"
    vision = _vision_section(own if own.is_file() else KNOWN_SIGLIP / "config.json")
    return (vision.integer("image_size", 224) // vision.integer("patch_size", 16)) ** 2


def _vision_section(path: Path) -> ConfigFile:
    """The vision part of a SigLIP configuration, which is either all of the file or a section of it."""
    config = ConfigFile.read(path)
    return config.section("vision_config") if "vision_config" in config.data else config


def _settings_from_shapes(root: Path, tensors: Tensors) -> ConfigFile:
    """TA-Tok's settings as its weights show them, for a checkpoint that has the tower but no ta_tok.pth."""
    name = published_name("ta_tok", "bottleneck.regularizer.embedding.weight")
    if name not in tensors or len(tensors[name].shape) != 2:
        raise CheckpointError(f"{root}: {name} is missing or not a matrix; accepted: a complete vision tower")
    codes, width = tensors[name].shape
    regularizer = {"name": "simvq", "args": {"codebook_size": codes, "l2_normalized": True}}
    bottleneck = {"args": {"bottleneck_dim": width, "regularizer": regularizer}}
    return ConfigFile(f"{root}: vision tower", {"bottleneck": bottleneck})


def _vision_config(root: Path, ta_tok: Path | None, settings: ConfigFile) -> Path:
    """SigLIP's configuration: the teacher's folder, else siglip2/ beside, else the one known by name."""
    teacher = settings.text("teacher", SIGLIP_NAME)
    parents = [root] if ta_tok is None else [ta_tok.parent, root]
    for path in (parent / name / "config.json" for name in (teacher, "siglip2") for parent in parents):
        if is_file(path):
            return path
    known = known_folder(teacher, SIGLIP_NAME)
    if known is None:
        accepted = f"{SIGLIP_NAME}, or a folder with SigLIP's config.json named siglip2"
        raise settings.error("teacher", accepted)
    return known / "config.json"


def _tokenizer_files(root: Path) -> list[Path]:
    found = [root / name for name in TOKENIZER_FILES if (root / name).is_file()]
    names = {path.name for path in found}
    if "tokenizer_config.json" not in names or not ({"tokenizer.json", "vocab.json"} & names):
        raise CheckpointError(
            f"{root}: no tokenizer; accepted: tokenizer_config.json with tokenizer.json (or vocab.json and "
            "merges.txt)"
        )
    return found


def _files_read(root: Path, configs: list[Path], sources: Mapping[str, PartSource]) -> Iterator[Path]:
    """Every file the conversion depends on, each once."""
    paths = [root / "config.json", *(path for path in configs if KNOWN not in path.parents)]
    for source in sources.values():
        paths += sorted({tensor.path for tensor in source.tensors.values()})
    yield from dict.fromkeys(paths)


def _check_tensors(model: ModelConfig, sources: Mapping[str, PartSource]) -> list[str]:
    """Check that every needed tensor is there, of the right shape and of a floating-point type.

    Returns one warning per tensor that is neither needed nor known to be unused. Raises CheckpointError.
    """
    needed = {
        part: {source.name(n.name): n for spec in layouts(model)[part] for n in spec.sources}
        for part, source in sources.items()
    }
    files = {id(source.tensors): source.tensors for source in sources.values()}
    used = {
        key: {name for part, s in sources.items() if id(s.tensors) == key for name in needed[part]}
        for key in files
    }
    for part, source in sources.items():
        for name, tensor in needed[part].items():
            _check_tensor(source, name, tensor, used[id(source.tensors)])
    elsewhere = tuple(
        PREFIXES[part]
        for part in ("dit", "vae", "ta_tok")
        if part not in sources or not sources[part].prefixed
    )
    return [
        f"{name} is not known and was left out"
        for key, tensors in files.items()
        for name in sorted(set(tensors) - used[key])
        if not UNUSED.match(name) and not name.startswith(elsewhere)
    ]


def _check_tensor(source: PartSource, name: str, needed: Needed, used: set[str]) -> None:
    if name not in source.tensors:
        spare = difflib.get_close_matches(name, sorted(set(source.tensors) - used), n=1, cutoff=0.8)
        hint = f"; the closest unused name there is {spare[0]!r}" if spare else ""
        tied = " (absent only where tie_word_embeddings is true)" if name == HEAD else ""
        raise CheckpointError(
            f"{source.where}: tensor {name!r} of shape {list(needed.shape)} is missing{tied}{hint}"
        )
    tensor = source.tensors[name]
    if tensor.shape != needed.shape:
        raise CheckpointError(
            f"{tensor.path}: tensor {name!r} has shape {list(tensor.shape)}; accepted: {list(needed.shape)}, "
            "as the configuration files say"
        )
    if tensor.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"{tensor.path}: tensor {name!r} is stored as {tensor.dtype}; accepted: floating point "
            "of 16, 32 or 64 bits"
        )
