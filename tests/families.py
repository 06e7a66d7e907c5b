"""A small random configuration of each family of decoder models, and what is particular about it."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.checkpoints import VOCABULARY

NUM_LAYERS = 6
ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": NUM_LAYERS,
    "max_position_embeddings": 64,
    **ENDS,
}
BARE: dict[str, Any] = {
    key: SMALL[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
} | ENDS

FAMILIES: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "mistral, sliding": lambda: hf.MistralConfig(**SMALL, sliding_window=8),
    "qwen 2, full then sliding": lambda: hf.Qwen2Config(
        **SMALL, use_sliding_window=True, max_window_layers=3, sliding_window=8
    ),
    "qwen 3, norms on q and k": lambda: hf.Qwen3Config(**SMALL, head_dim=8),
    "gemma 2, sliding and full, softcapped": lambda: hf.Gemma2Config(**SMALL, head_dim=8, sliding_window=8),
    "gemma 3, two rotary bases": lambda: hf.Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=8, sliding_window_pattern=3
    ),
    "phi 3, packed projections": lambda: hf.Phi3Config(**SMALL),
    "opt, projected embedding": lambda: hf.OPTConfig(
        **BARE, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=16
    ),
    "bloom, alibi": lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=NUM_LAYERS, n_head=4, **ENDS),
    "gpt 2, learned positions, tied": lambda: hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=NUM_LAYERS, n_head=4, n_positions=64, **ENDS
    ),
    "gpt neox, renamed head, parallel residual": lambda: hf.GPTNeoXConfig(
        **BARE, intermediate_size=48, max_position_embeddings=64
    ),
    "falcon, rotary": lambda: hf.FalconConfig(**BARE, alibi=False),
    "falcon, alibi": lambda: hf.FalconConfig(**BARE, alibi=True),
    "falcon, new decoder": lambda: hf.FalconConfig(**BARE, new_decoder_architecture=True, num_kv_heads=2),
    "mpt, alibi": lambda: hf.MptConfig(
        vocab_size=VOCABULARY, d_model=32, n_layers=NUM_LAYERS, n_heads=4, max_seq_len=64, **ENDS
    ),
    "olmo 2, norms after": lambda: hf.Olmo2Config(**SMALL),
    "starcoder 2, biases": lambda: hf.Starcoder2Config(**SMALL),
    "cohere, parallel": lambda: hf.CohereConfig(**SMALL),
    "granite, multipliers": lambda: hf.GraniteConfig(**SMALL, residual_multiplier=0.5, embedding_multiplier=2.0),
    "stablelm, partial rotary": lambda: hf.StableLmConfig(**SMALL),
    "mixtral, experts": lambda: hf.MixtralConfig(**SMALL, num_local_experts=4),
    "qwen 3 moe, dense and sparse": lambda: hf.Qwen3MoeConfig(
        **SMALL, head_dim=8, num_experts=12, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[1, 4]
    ),
    "deepseek 3, latent attention, dense first": lambda: hf.DeepseekV3Config(
        **(SMALL | {"num_key_value_heads": 4}),
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=2,
    ),
    "gpt oss, sinks": lambda: hf.GptOssConfig(
        **SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
}

EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# Streamed, and pruned with one rule: less is asked of these.
MORE_FAMILIES: dict[str, Any] = {
    "jamba, state space": lambda: hf.JambaConfig(
        **SMALL,
        attn_layer_period=3,
        attn_layer_offset=1,
        expert_layer_period=2,
        num_experts=4,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "qwen 3 next, linear attention": lambda: hf.Qwen3NextConfig(
        **(SMALL | EXPERTS),
        head_dim=8,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "phi moe": lambda: hf.PhimoeConfig(**SMALL, num_local_experts=4),
    "olmoe": lambda: hf.OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2),
    "granite moe": lambda: hf.GraniteMoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "glm 4": lambda: hf.Glm4Config(**SMALL, head_dim=8),
    "qwen 2 moe, a period": lambda: hf.Qwen2MoeConfig(
        **(SMALL | EXPERTS), shared_expert_intermediate_size=16, decoder_sparse_step=2
    ),
    "smollm 3, without rotary now and then": lambda: hf.SmolLM3Config(**SMALL),
    "exaone 4": lambda: hf.Exaone4Config(**SMALL, sliding_window=8),
    "cohere 2": lambda: hf.Cohere2Config(**SMALL, sliding_window=8),
    "llama 4, chunked": lambda: hf.Llama4TextConfig(
        **SMALL, head_dim=8, num_local_experts=4, intermediate_size_mlp=48, attention_chunk_size=8
    ),
    "lfm 2, convolutions": lambda: hf.Lfm2Config(**SMALL),
    "ernie moe": lambda: hf.Ernie4_5_MoeConfig(**SMALL, moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
    "codegen": lambda: hf.CodeGenConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=NUM_LAYERS, n_head=4, rotary_dim=4, n_positions=64, **ENDS
    ),
    "gpt-j": lambda: hf.GPTJConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=NUM_LAYERS, n_head=4, rotary_dim=4, n_positions=64, **ENDS
    ),
    "xglm": lambda: hf.XGLMConfig(
        vocab_size=VOCABULARY, d_model=32, num_layers=NUM_LAYERS, attention_heads=4, ffn_dim=48, **ENDS
    ),
    "nemotron": lambda: hf.NemotronConfig(**SMALL),
    "persimmon": lambda: hf.PersimmonConfig(**BARE, intermediate_size=48, max_position_embeddings=64),
}

# Code of the checkpoint's own, with the traits of models that bring theirs: how it places positions.
OWN_CODE = {"baichuan 2 7b's traits, own code": "rotary", "baichuan 2 13b's traits, own code": "alibi"}

VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "patch_size": 14}

# Models of images and text, by the depth of what sees.
WRAPPERS: dict[str, Any] = {
    "gemma 3 with images": lambda depth: hf.Gemma3Config(
        text_config={**SMALL, "head_dim": 8, "sliding_window": 8},
        vision_config={**VISION, "image_size": 28, "num_hidden_layers": depth},
        mm_tokens_per_image=4,
    ),
    "llava": lambda depth: hf.LlavaConfig(
        text_config=hf.LlamaConfig(**SMALL),
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=28, num_hidden_layers=depth),
    ),
}

# What the tests hold of which families: their parameters, and the table in docs/families.md.
CHECKS: dict[str, list[str]] = {
    "streamed pass": [*FAMILIES, *MORE_FAMILIES],
    "search, every rule": [*FAMILIES],
    "search, some rules": [*FAMILIES, *OWN_CODE, *WRAPPERS],
    "written, loaded again": [*FAMILIES, *MORE_FAMILIES, *OWN_CODE, *WRAPPERS],
    "generates": [*FAMILIES, *OWN_CODE],
    "from PyTorch files": [*FAMILIES, *MORE_FAMILIES],
    "evaluated": [*FAMILIES, *MORE_FAMILIES],
}


def matrix() -> str:
    """The table of families and checks, in Markdown."""
    lines = [f"| family | {' | '.join(CHECKS)} |", "|---" * (len(CHECKS) + 1) + "|"]
    for family in [*FAMILIES, *MORE_FAMILIES, *OWN_CODE, *WRAPPERS]:
        held = ["yes" if family in families else "" for families in CHECKS.values()]
        lines.append(f"| {family} | {' | '.join(held)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/families.md."""
    return PAGE.replace("TABLE\n", matrix())


PAGE = """# Families

Any decoder that transformers runs layer by layer. The tests hold the families below on small random configurations
(the table is made from what they run on, by `docs/generate.py`):

- **streamed pass**: every layer boundary equals the model's own forward pass in float32.
- **search**: similarities and decisions equal a plain search in memory, with every rule or some.
- **written, loaded again**: transformers finds no key missing and none too many.
- **generates**: with a cache as without.
- **from PyTorch files**: plan and weights equal those from safetensors.
- **evaluated**: log-likelihoods of continuations are the model's own within 1e-4, generated texts exactly (float32).

All of it with transformers 5 and, but for the last, again with 4.57.

TABLE

Experts are merged as they are stored, and put together one layer at a time by transformers' own conversion. Of models
of images and text the language model is pruned and the rest goes through untouched. What a layer is (sliding or full
attention, dense or sparse) follows its base into the pruned config; layers of unlike shape are not merged. Models with
code of their own need `--trust-remote-code`; without it none of that code runs.

## Refused

- Models whose layers get constants from their own number (DiffLlama, GPT-2 with inverse layer scaling), or whose kinds
  of layers follow a fixed period that what is left does not fit (Jamba, but for what leaves whole periods): they cannot
  lose layers without becoming something else. Also models whose layers hand on more than hidden states (RWKV).
- Each with a line that says what would work: quantised and packed weights, GGUF, Meta's `consolidated.*.pth`, adapters,
  encoders and encoder-decoders, TorchScript and pickled modules.
"""
