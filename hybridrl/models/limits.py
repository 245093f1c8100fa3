"""Limits of a model by its config.json: its longest sequence, and its head sizes."""

from transformers import PreTrainedConfig

LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
"""Config keys for the number of positions; a model without any has no limit (ALiBi, recurrence)."""
ALREADY_SCALED = ("default", "llama3", "longrope", "su", "yarn")
"""Kinds of rotary scaling whose factor is already included in the number of positions."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes of vLLM 0.32's CPU attention (CPUAttentionBackend.get_supported_head_sizes).

On GPUs vLLM serves every size.
"""


def most_positions(config: PreTrainedConfig) -> float:
    """The length of the longest sequence in tokens; infinite if the config sets no limit."""
    text = config.get_text_config()
    lengths = [length for key in LENGTHS if (length := getattr(text, key, None)) is not None]
    return min(lengths, default=float("inf")) * max(_rope_factors(text), default=1.0)


def _rope_factors(config: PreTrainedConfig) -> list[float]:
    """The rotary scaling factors of all kinds of layers, without those of ALREADY_SCALED; a config
    describes rotary embeddings once or for each kind.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return [
        float(kind["factor"])
        for kind in kinds
        if kind.get("factor") and kind.get("rope_type", "default") not in ALREADY_SCALED
    ]


def unserved_head_size(config: PreTrainedConfig) -> int | None:
    """The size of the model's attention heads if vLLM's CPU engine cannot serve it.

    None if it can, or if the model has no such heads.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not heads or getattr(text, "kv_lora_rank", None):  # latent attention uses other sizes
        return None
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return None if size in CPU_HEAD_SIZES else size
