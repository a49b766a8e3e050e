"""The arguments that Megatron stores beside the weights: what they say of the architecture, and what to write.

Megatron-LM's arguments know linear scaling of positions and one llama3 scaling, ModelLink's llama3 and YaRN.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch

from config import LlamaConfig
from doors.megatron_layout import padded_vocabulary
from weights import Weights

NUMBERS = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers", "hidden_size", "ffn_hidden_size", "vocab_size",
           "true_vocab_size", "num_attention_heads", "num_query_groups", "kv_channels", "norm_epsilon", "layernorm_epsilon", "rotary_base",
           "max_position_embeddings", "seq_length", "rope_scaling_factor", "rotary_seq_len_interpolation_factor")  # fmt: skip


def as_dict(args) -> dict:
    """The arguments as a dictionary, from whatever object holds them."""
    if isinstance(args, Mapping):
        return dict(args)
    return dict(getattr(args, "__dict__", {}))


def strangeness(args: dict, rope: bool) -> list[str]:
    """What the arguments say that is not Llama's. `rope`: they also have to tell how positions are scaled."""
    llama = {"normalization": "RMSNorm", "swiglu": True, "rotary_percent": 1.0, "rotary_interleaved": False, "num_experts": None,
             "qk_layernorm": False, "multi_latent_attention": False, "multi_head_latent_attention": False, "apply_layernorm_1p": False,
             "post_norm": False, "use_glm_rope": False, "noop_layers": None, "add_output_layer_bias": False,
             "embed_layernorm": False, "mtp_num_layers": None}  # fmt: skip
    found = [f"{name} {args[name]!r}" for name, value in llama.items()
             if args.get(name) is not None and args[name] != value and (args[name] or value)]  # fmt: skip
    if args.get("position_embedding_type", "rope") != "rope" and not args.get("use_rotary_position_embeddings"):
        found.append(f"position_embedding_type {args['position_embedding_type']!r}")
    if rope and args.get("rope_scaling_type") not in (None, "llama3", "yarn"):
        found.append(f"rope_scaling_type {args['rope_scaling_type']!r}")
    if rope and (args.get("dynamic_factor") or 1) != 1:
        found.append(f"dynamic_factor {args['dynamic_factor']!r}")
    return found


def rope_scaling(args: dict) -> dict | None:
    """config.json's rope_scaling, from the arguments of either project."""
    kind, length = args.get("rope_scaling_type"), "original_max_position_embeddings"
    told = {"rope_type": kind, "factor": args.get("rope_scaling_factor")}
    if kind == "llama3":
        told |= {name: args.get(name) for name in ("low_freq_factor", "high_freq_factor", length)}
    elif kind == "yarn":
        told |= {name: args.get(name, args.get(f"rope_scaling_{name}")) for name in ("beta_fast", "beta_slow")}
        told |= {name: args.get(f"rope_scaling_{name}") for name in ("mscale", "mscale_all_dim", length)}
        if not told["mscale_all_dim"] and told["mscale"] in (None, 1):  # ModelLink's way to say what Hugging Face does without them
            del told["mscale"], told["mscale_all_dim"]
    elif args.get("use_rope_scaling"):
        told |= {"rope_type": "llama3", "factor": told["factor"] or 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, length: 8192}
    elif args.get("rotary_seq_len_interpolation_factor"):
        told = {"rope_type": "linear", "factor": args["rotary_seq_len_interpolation_factor"]}
    else:
        return None
    return {name: value for name, value in told.items() if value is not None}


def rope_arguments(config: LlamaConfig) -> dict:
    """The opposite of rope_scaling, for what `problems` lets through."""
    rope = config.rope_scaling or {"rope_type": "default"}
    base = int(config.rope_theta) if config.rope_theta == int(config.rope_theta) else config.rope_theta
    told = {"rotary_base": base}
    if rope["rope_type"] == "linear":
        return told | {"rotary_seq_len_interpolation_factor": int(rope["factor"])}
    if rope["rope_type"] == "llama3":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        told |= {"rope_scaling_type": "llama3", "rope_scaling_factor": rope["factor"], **{name: rope[name] for name in names}}
        return told | {"use_rope_scaling": [rope[name] for name in names] == [1, 4, 8192]}
    if rope["rope_type"] == "yarn":
        told |= {"rope_scaling_type": "yarn", "rope_scaling_factor": rope["factor"],
                 "rope_scaling_original_max_position_embeddings": rope["original_max_position_embeddings"]}  # fmt: skip
        fast, slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
        both = rope.get("mscale") and rope.get("mscale_all_dim")
        told |= {"beta_fast": fast, "beta_slow": slow, "rope_scaling_beta_fast": fast, "rope_scaling_beta_slow": slow}
        return told | {"rope_scaling_mscale": rope["mscale"] if both else 1.0,
                       "rope_scaling_mscale_all_dim": rope["mscale_all_dim"] if both else 0.0}  # fmt: skip
    return told


def rope_problems(config: LlamaConfig) -> list[str]:
    rope = config.rope_scaling or {"rope_type": "default"}
    if rope["rope_type"] == "dynamic":
        return ["dynamic NTK scaling: ModelLink's dynamic_factor stretches for one fixed length, not for each text's; set rope_scaling to "
                "null in config.json if the model is trained further without it"]  # fmt: skip
    if rope["rope_type"] == "linear" and rope["factor"] != int(rope["factor"]):
        return [f"linear RoPE scaling by {rope['factor']}: Megatron's rotary_seq_len_interpolation_factor is a whole number"]
    if rope["rope_type"] == "yarn":
        return [f"YaRN with {key} {rope[key]!r}: ModelLink has no argument for it" for key, usual in
                (("attention_factor", None), ("truncate", True)) if rope.get(key, usual) != usual]  # fmt: skip
    return []


def arguments(source: Weights, tp: int, pp: int, layers: tuple[int, ...] | None, names: str, vocab_divisor: int,
              vpp: int | None) -> argparse.Namespace:  # fmt: skip
    """What Megatron compares when it loads (check_checkpoint_args) or takes over (--use-checkpoint-args), and what its converters
    ask for. hf_config is ours: with it the way back is exact to the last setting."""
    config = source.config
    dtype = source.tensors["model.embed_tokens.weight"].dtype
    grouped = config.num_key_value_heads != config.num_attention_heads
    return argparse.Namespace(
        num_layers=config.num_hidden_layers, hidden_size=config.hidden_size, ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads, group_query_attention=grouped,
        num_query_groups=config.num_key_value_heads if grouped else 1, kv_channels=config.head_dim,
        seq_length=config.max_position_embeddings, max_position_embeddings=config.max_position_embeddings,
        position_embedding_type="rope", use_rotary_position_embeddings=True, add_position_embedding=True, rotary_percent=1.0,
        rotary_interleaved=False, **rope_arguments(config), normalization="RMSNorm", norm_epsilon=config.rms_norm_eps,
        apply_layernorm_1p=False, swiglu=True, add_bias_linear=config.mlp_bias, disable_bias_linear=not config.mlp_bias,
        add_qkv_bias=config.attention_bias and not config.mlp_bias, add_dense_bias=config.attention_bias and not config.mlp_bias,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings, vocab_size=config.vocab_size,
        padded_vocab_size=padded_vocabulary(config.vocab_size, tp, vocab_divisor), make_vocab_size_divisible_by=vocab_divisor,
        tokenizer_type="Llama2Tokenizer", bert_binary_head=True, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        world_size=tp * pp, num_layer_list=",".join(map(str, layers)) if layers else None,
        virtual_pipeline_model_parallel_size=vpp,
        num_layers_per_virtual_pipeline_stage=None if vpp is None else config.num_hidden_layers // (pp * vpp),
        params_dtype=dtype, bf16=dtype is torch.bfloat16, fp16=dtype is torch.float16, use_mcore_models=names == "mcore",
        transformer_impl="local", iteration=1, consumed_train_samples=0, consumed_valid_samples=0, hf_config=config.to_dict(),
    )  # fmt: skip
