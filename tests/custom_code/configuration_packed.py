"""Configuration of a small decoder whose code comes with its checkpoint."""

from transformers import PretrainedConfig


class PackedConfig(PretrainedConfig):
    model_type = "packed"

    def __init__(
        self,
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=64,
        positions="rotary",
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.positions = positions
        super().__init__(**{"tie_word_embeddings": False, **kwargs})
