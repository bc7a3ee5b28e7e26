"""Settings of an adapter as PEFT writes them (adapter_config.json): its modules, with their ranks and scales.

Names are matched as PEFT 0.21 matches them, so that what it would not put an adapter on has none here.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4mm_jax.config.keys import Keys
from phi4mm_jax.config.sizes import DecoderConfig, LoraConfig
from phi4mm_jax.errors import ConfigError
from phi4mm_jax.utils.checks import is_number, is_whole

# The decoder's matrices, of which each can have a LoRA; and how a layer is named: in transformers' model and in the
# release's, whose code wraps the decoder alone.
MODULES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_PREFIXES = ("model.layers.", "layers.")


@dataclass(frozen=True)
class ModuleLora:
    """LoRA of one module, which adds alpha / rank times A B; with rsLoRA, alpha includes the root."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """Factor of A B."""
        return self.alpha / self.rank


Module = tuple[int, str]  # layer, and one of MODULES


def module_loras(name: str, settings: Mapping[str, Any], num_layers: int) -> dict[Module, ModuleLora]:
    """Return rank and alpha of each module of the decoder that an adapter is on.

    Args:
        name: of the settings, for errors.
        settings: the parsed adapter_config.json.
        num_layers: of the decoder.

    Raises:
        ConfigError: a setting is missing or malformed, or the adapter is on no module of the decoder; it names the
            setting.
    """
    rank, alpha = _rank(name, "r", settings.get("r")), _alpha(name, "lora_alpha", settings.get("lora_alpha"))
    ranks = {k: _rank(name, "rank_pattern", v) for k, v in _pattern(name, settings, "rank_pattern").items()}
    alphas = {k: _alpha(name, "alpha_pattern", v) for k, v in _pattern(name, settings, "alpha_pattern").items()}
    by_root = settings.get("use_rslora") or False
    if not isinstance(by_root, bool):
        raise ConfigError(f"{name}: use_rslora is {by_root!r:.60}; expected true or false")
    try:
        named = [
            {(i, module): f"{prefix}{i}.{module}" for i in range(num_layers) for module in MODULES}
            for prefix in _PREFIXES
        ]
        targeted = [{at: key for at, key in keys.items() if _is_targeted(settings, key)} for keys in named]
        found = {
            at: (_by_pattern(ranks, key, rank), _by_pattern(alphas, key, alpha))
            for at, key in (targeted[0] or targeted[1]).items()
        }
    except (re.error, TypeError) as error:
        raise ConfigError(
            f"{name}: target_modules, exclude_modules, layers_to_transform, layers_pattern or a pattern of ranks or "
            f"alphas cannot be matched with names ({error}); write them as PEFT takes them"
        ) from error
    if not found:
        raise ConfigError(
            f"{name}: target_modules is {settings.get('target_modules')!r:.200}, by which the adapter is on none of "
            f"the decoder's {num_layers} layers; adapters can be on {', '.join(MODULES)} of each"
        )
    return {at: ModuleLora(r, a * math.sqrt(r) if by_root else a) for at, (r, a) in found.items()}


def common_lora(loras: Mapping[Module, ModuleLora]) -> ModuleLora:
    """Return one rank and scale for all modules: the largest rank, to which the others are padded, and the most common
    scale; the ratios of the others go into B."""
    rank = max(lora.rank for lora in loras.values())
    counts = Counter(lora.scale for lora in loras.values())
    scale = max(counts, key=lambda scale: (counts[scale], scale))
    exact = next((lora for lora in loras.values() if (lora.rank, lora.scale) == (rank, scale)), None)
    return exact or ModuleLora(rank, scale * rank)


def is_uniform(loras: Mapping[Module, ModuleLora], num_layers: int) -> bool:
    """Return whether all modules of the decoder have a LoRA, all of one rank and alpha."""
    return len(loras) == num_layers * len(MODULES) and len(set(loras.values())) == 1


# Of an adapter_config.json: what is read, what the tensors themselves show, and what changes no number.
_ADAPTER_KEYS = frozenset({
    "peft_type", "r", "lora_alpha", "lora_dropout", "dp", "use_rslora", "rank_pattern", "alpha_pattern",
    "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type",
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "runtime_config",
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
})  # fmt: skip
_PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica")  # they leave the base's weights alone
_MERGEABLE = ("use_dora", "modules_to_save", "trainable_token_indices", "bias")
_PLAIN_BIASES = (("bias", "none"), ("bias", "lora_only"))  # the decoder's maps have none
_CONVERTIBLE_INITS = ("pissa", "corda", "olora")


def check_adapter_settings(name: str | Path, settings: Mapping[str, Any]) -> None:
    """Check the settings with which PEFT saved an adapter: each is honoured, known to be harmless, or refused by name.

    Args:
        name: of the settings, for errors.

    Raises:
        ConfigError: a setting by which PEFT would compute something else than base weights plus A B.
    """
    if (kind := settings.get("peft_type") or "LORA") != "LORA":
        raise ConfigError(
            f"{name}: peft_type is {kind!r:.60}, and only LORA is supported; train it as LoRA or, where PEFT can, "
            "convert it (save_as_lora(FOLDER, model, rank=8)) or merge it (merge_and_unload(), then "
            "save_pretrained(FOLDER)), and give FOLDER"
        )
    init = settings.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _PLAIN_INITS)):
        remedy = "train it with init_lora_weights=True"
        if isinstance(init, str) and init.lower().startswith(_CONVERTIBLE_INITS):
            remedy = (
                "let PEFT save it as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion), or "
                f"{remedy}"
            )
        raise ConfigError(f"{name}: init_lora_weights is {init!r:.60}, which changes the base's weights; {remedy}")
    for key, value in settings.items():
        plain = value in (None, False, [], {}) or (key, value) in _PLAIN_BIASES
        if not plain and key not in _ADAPTER_KEYS:
            remedy = "or remove it where it has no effect"
            if key in _MERGEABLE:
                remedy = "or merge it (PEFT: merge_and_unload(), then save_pretrained(FOLDER)) and give FOLDER"
            raise ConfigError(
                f"{name}: {key} is {value!r:.60}, which is not supported; train the adapter without it, {remedy}"
            )


def read_adapter(name: str, settings: Mapping[str, Any], decoder: DecoderConfig) -> LoraConfig:
    """Read an adapter's adapter_config.json: its modules' ranks and scales as one rank and scale (see `common_lora`).

    Args:
        name: of the settings, for errors.

    Raises:
        ConfigError: a setting is missing, malformed or not supported; it names the key.
    """
    check_adapter_settings(name, settings)
    lora = common_lora(module_loras(name, settings, decoder.num_layers))
    return LoraConfig(lora.rank, lora.alpha, read_dropout(Keys(settings, name)))


def read_dropout(keys: Keys) -> float:
    """Return the rate of dropout of an adapter's settings, 0 where they state none.

    Raises:
        ConfigError: it is no number from 0 to 1, or 1, by which nothing would be left.
    """
    return keys.below_one("dp" if keys.has("dp") else "lora_dropout", 0.0)


def _is_targeted(settings: Mapping[str, Any], key: str) -> bool:
    excluded, targets = settings.get("exclude_modules"), settings.get("target_modules")
    if excluded and _matches(excluded, key):
        return False
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return True
    if not _matches(targets, key):
        return False
    layers = settings.get("layers_to_transform")
    if isinstance(targets, str) or key in targets or layers is None or layers == []:
        return True
    patterns = settings.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [rf"(?:^|.*?\.){p}\.(?P<layer>\d+)\." for p in patterns] or [r".*?\.[^.]*\.(?P<layer>\d+)\."]
    matched = next((m for m in (re.match(e, key) for e in expressions) if m), None)
    return matched is not None and int(matched["layer"]) in ([layers] if isinstance(layers, int) else layers)


def _matches(names: Any, key: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    return any(key == name or key.endswith(f".{name}") for name in names)


def _by_pattern(pattern: Mapping[str, Any], key: str, usual: Any) -> Any:
    """Return the value of the first expression that a module's name ends with."""
    return next((value for name, value in pattern.items() if re.match(rf"(.*\.)?({name})$", key)), usual)


def _pattern(name: str, settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    pattern = settings.get(key) or {}
    if not isinstance(pattern, Mapping):
        raise ConfigError(f"{name}: {key} is {pattern!r:.60}; expected an object of module names to numbers")
    return pattern


def _rank(name: str, key: str, value: Any) -> int:
    if value is None:
        raise ConfigError(f"{name}: {key} is missing; expected a positive whole number")
    if not is_whole(value, 1):
        raise ConfigError(f"{name}: {key} is {value!r:.60}; expected a positive whole number")
    return value


def _alpha(name: str, key: str, value: Any) -> float:
    if value is None:
        raise ConfigError(f"{name}: {key} is missing; expected a positive number")
    if not is_number(value) or not 0.0 < value < math.inf:
        raise ConfigError(
            f"{name}: {key} is {value!r:.60}; expected a positive number, or the adapter would do nothing"
        )
    return float(value)
