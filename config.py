"""The architecture: LlamaConfig, read from and written to Hugging Face config.json, and the presets.

Every spelling of the RoPE keys that transformers has used is read, and both the old and the new one are written, so that
each reader finds its own. What is not a Llama, or a RoPE type that model.py does not know, is refused by name.
"""

from __future__ import annotations

from settings import UserError

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _rope_problems(rope: dict | None, head_dim: int) -> list[str]:
    if rope is None:
        return []
    if not isinstance(rope, dict) or rope.get("rope_type") not in _ROPE_NEEDS:
        kind = rope.get("rope_type") if isinstance(rope, dict) else rope
        return [f"rope type {kind!r} is not known (known: {', '.join(_ROPE_NEEDS)})"]
    found = [f"rope type {rope['rope_type']} needs {key}" for key in _ROPE_NEEDS[rope["rope_type"]] if key not in rope]
    if not _number(rope.get("factor", 1.0)) or rope.get("factor", 1.0) < 1:
        found.append(f"rope factor must be a number of at least 1, not {rope['factor']!r}")
    found += [f"rope {key} must be a positive number, not {rope[key]!r}"
              for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
              if rope.get(key) is not None and not _number(rope[key])]  # fmt: skip
    if rope["rope_type"] == "dynamic" and head_dim < 4:
        found.append(f"dynamic NTK needs a head_dim of at least 4, not {head_dim}")
    if not found and rope["rope_type"] == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        found.append(f"rope low_freq_factor {rope['low_freq_factor']} must be below high_freq_factor {rope['high_freq_factor']}")
    return found


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture. Field names are Hugging Face's, except where config.json has had several spellings of RoPE."""

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": …, "factor": …}; None is plain RoPE
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2
    pad_token_id: int | None = None
    dropout: float = 0.0  # a training setting: never written to config.json

    def __post_init__(self):
        if not self.head_dim and self.num_attention_heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        problems = self.problems()
        if problems:
            raise UserError("; ".join(problems))

    def problems(self) -> list[str]:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
        found = [f"{name} must be a positive whole number, not {getattr(self, name)!r}" for name in sizes
                 if not isinstance(getattr(self, name), int) or getattr(self, name) < 1]  # fmt: skip
        found += [f"{name} must be a positive number, not {getattr(self, name)!r}" for name in ("rms_norm_eps", "rope_theta")
                  if not _number(getattr(self, name))]  # fmt: skip
        found += [f"{name} must be true or false, not {getattr(self, name)!r}"
                  for name in ("tie_word_embeddings", "attention_bias", "mlp_bias") if not isinstance(getattr(self, name), bool)]
        if found:
            return found
        if self.num_attention_heads % self.num_key_value_heads:
            found.append(f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                         f"{self.num_key_value_heads}")
        if self.head_dim * self.num_attention_heads != self.hidden_size and self.hidden_size % self.num_attention_heads:
            found.append(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                         f"{self.num_attention_heads}, and head_dim does not say otherwise")
        if self.head_dim % 2:
            found.append(f"head_dim {self.head_dim} is odd; rotary embedding turns pairs")
        return found + _rope_problems(self.rope_scaling, self.head_dim)

    @property
    def context_length(self) -> int:
        """Tokens the model is meant to read. Dynamic NTK keeps the original length in max_position_embeddings."""
        if self.rope_scaling and self.rope_scaling["rope_type"] == "dynamic":
            return int(self.max_position_embeddings * self.rope_scaling["factor"])
        return self.max_position_embeddings

    def with_rope_scaling(self, rope_type: str, factor: float) -> LlamaConfig:
        """The same model reading `factor` times as far. The original length comes from the model, never from a flag."""
        length, old = self.max_position_embeddings, self.rope_scaling
        if old and old["rope_type"] not in (rope_type, "default"):
            raise UserError(f"this model's RoPE is already scaled ({old['rope_type']}); it cannot be scaled by {rope_type} as well")
        if old and old["rope_type"] in ("linear", "yarn"):
            length = int(old.get("original_max_position_embeddings", length / old["factor"]))
        scaling = {"rope_type": rope_type, "factor": float(factor)}
        if rope_type == "yarn":
            scaling["original_max_position_embeddings"] = length
        longer = length if rope_type == "dynamic" else int(length * factor)
        return dataclasses.replace(self, rope_scaling=scaling, max_position_embeddings=longer)

    @classmethod
    def from_json(cls, path) -> LlamaConfig:
        """Read a Hugging Face config.json (or the directory that holds it): Llama-2, 3, 3.1, 3.2, every RoPE spelling.

        Raises UserError for a missing or broken file, another architecture, an unknown rope type, sizes that do not fit.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            data = json.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; a model directory has a config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{getattr(error, 'lineno', 1)}: not valid JSON: {error}") from None
        try:
            return cls.from_dict(data)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, data: dict) -> LlamaConfig:
        if not isinstance(data, dict) or data.get("model_type", "llama") != "llama":
            kind = data.get("model_type") if isinstance(data, dict) else type(data).__name__
            raise UserError(f"model_type is {kind!r}; only 'llama' is known")
        if data.get("hidden_act", "silu") not in ("silu", "swish"):
            raise UserError(f"hidden_act {data['hidden_act']!r} is not Llama's silu")
        missing = [key for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                   "num_attention_heads") if key not in data]  # fmt: skip
        if missing:
            raise UserError(f"{', '.join(missing)} missing")
        known = {field.name for field in dataclasses.fields(cls)} - {"dropout", "rope_scaling", "rope_theta"}
        values = {key: data[key] for key in known if data.get(key) is not None}
        values["num_key_value_heads"] = data.get("num_key_value_heads") or data["num_attention_heads"]
        values.setdefault("max_position_embeddings", 2048)
        values.setdefault("rms_norm_eps", 1e-6)  # Hugging Face's default, from LLaMA-1

        # transformers <= 4.42 wrote rope_scaling["type"], <= 4.57 rope_scaling["rope_type"], 5.x rope_parameters with theta.
        rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise UserError(f"rope_scaling must be an object or null, not {rope!r}")
        rope = dict(rope)
        values["rope_theta"] = rope.pop("rope_theta", None) or data.get("rope_theta") or 10000.0
        rope_type = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
        rope.pop("type", None)
        if rope.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
            raise UserError("partial_rotary_factor is not Llama's")
        if rope_type != "default":
            rope = {"rope_type": rope_type, **rope}
            if rope_type in ("yarn", "llama3"):
                rope["original_max_position_embeddings"] = (
                    rope.get("original_max_position_embeddings") or values["max_position_embeddings"])  # fmt: skip
            values["rope_scaling"] = rope
        return cls(**values)

    def to_dict(self) -> dict:
        """The Hugging Face dictionary. RoPE is written in the old and the new spelling, which every reader resolves alike."""
        data = dataclasses.asdict(self)
        del data["dropout"]
        rope = self.rope_scaling or {"rope_type": "default"}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **data,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
        }

    def to_json(self, path) -> None:
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")


_LLAMA3 = dict(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0,
               bos_token_id=128000, eos_token_id=128001)  # fmt: skip

# Sizes are counted at V = 64,793 (ChatGLM2's vocabulary) up to 1b; a new model's vocabulary is its tokenizer's.
PRESETS = {
    "tiny": LlamaConfig(6400, 192, 512, 4, 3, 1, max_position_embeddings=256, tie_word_embeddings=True),
    "92m": LlamaConfig(64793, 512, 1376, 8, 8, 8, max_position_embeddings=512),
    "218m": LlamaConfig(64793, 1024, 2752, 12, 8, 8, max_position_embeddings=1024, tie_word_embeddings=True),
    "500m": LlamaConfig(64793, 1536, 4096, 16, 12, 4, max_position_embeddings=2048, rope_theta=500000.0,
                        tie_word_embeddings=True),
    "1b": LlamaConfig(64793, 2048, 8192, 16, 32, 8, max_position_embeddings=4096, rope_theta=500000.0,
                      tie_word_embeddings=True),
    "llama2-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, max_position_embeddings=4096),
    "llama2-13b": LlamaConfig(32000, 5120, 13824, 40, 40, 40, max_position_embeddings=4096),
    "llama-65b": LlamaConfig(32000, 8192, 22016, 80, 64, 64, max_position_embeddings=2048),
    "llama3-8b": LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                             **_LLAMA3),
    "llama3-70b": LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                              **_LLAMA3),
}  # fmt: skip
