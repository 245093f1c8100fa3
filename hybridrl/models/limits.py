"""How long a sequence a model can read, and which models the engine can serve, as far as
config.json tells.
"""

from transformers import PreTrainedConfig

LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
"""Where architectures keep the number of their positions; those without any have no limit (ALiBi,
recurrent layers).
"""
ALREADY_SCALED = ("default", "llama3", "longrope", "su", "yarn")
"""Kinds of rotary scaling whose factor the number of positions includes already."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of vLLM 0.32's attention on CPUs, CPUAttentionBackend.get_supported_head_sizes(); on GPUs vLLM
serves every size.
"""


def most_positions(config: PreTrainedConfig) -> float:
    """Tokens of the longest sequence; infinite where the config sets no limit."""
    text = config.get_text_config()
    lengths = [length for key in LENGTHS if (length := getattr(text, key, None)) is not None]
    return min(lengths, default=float("inf")) * max(_rope_factors(text), default=1.0)


def _rope_factors(config: PreTrainedConfig) -> list[float]:
    """Of every kind of layer; its rotary embedding may be described once, or once for each kind."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return [
        float(kind["factor"])
        for kind in kinds
        if kind.get("factor") and kind.get("rope_type", "default") not in ALREADY_SCALED
    ]


def unserved_head_size(config: PreTrainedConfig) -> int | None:
    """The size of an attention head, if vLLM's CPU engine cannot serve it; None where it can or
    there are no such heads.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not heads or getattr(text, "kv_lora_rank", None):  # latent attention has sizes of its own
        return None
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return None if size in CPU_HEAD_SIZES else size
