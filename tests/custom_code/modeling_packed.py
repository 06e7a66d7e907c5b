"""A small decoder whose code comes with its checkpoint: query, key and value in one matrix, rotary positions or ALiBi,
layers that return tuples, and a head whose rows are normalised."""

import math

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_packed import PackedConfig


class PackedNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)


class PackedAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.positions = config.positions
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden, attention_mask, cos, sin):
        rows, tokens, size = hidden.shape
        packed = self.W_pack(hidden).view(rows, tokens, 3, self.heads, size // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        if self.positions == "rotary":
            query, key = turned(query, cos, sin), turned(key, cos, sin)
        scores = query @ key.transpose(-1, -2) / math.sqrt(size // self.heads) + attention_mask
        mixed = scores.softmax(-1) @ value
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, tokens, size))


class PackedMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden):
        return self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class PackedLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = PackedAttention(config)
        self.mlp = PackedMLP(config)
        self.input_layernorm = PackedNorm(config.hidden_size)
        self.post_attention_layernorm = PackedNorm(config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, cos=None, sin=None):
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), attention_mask, cos, sin)
        return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)


class PackedPreTrainedModel(PreTrainedModel):
    config_class = PackedConfig
    base_model_prefix = "model"

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(std=0.02)


class PackedModel(PackedPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([PackedLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = PackedNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, output_hidden_states=False, **unused):
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tokens, size = hidden.shape[1], hidden.shape[2] // self.config.num_attention_heads
        distance = torch.arange(tokens)[None, :] - torch.arange(tokens)[:, None]
        mask = torch.zeros(tokens, tokens).masked_fill(distance > 0, torch.finfo(torch.float32).min)
        if self.config.positions == "alibi":
            slopes = 2.0 ** -torch.arange(1, self.config.num_attention_heads + 1)
            mask = mask + slopes[:, None, None] * distance.clamp(max=0)
        angles = torch.arange(tokens)[:, None] / 10000 ** (torch.arange(0, size, 2) / size)[None, :]
        cos, sin = (f(torch.cat([angles, angles], -1)).to(hidden.dtype) for f in (torch.cos, torch.sin))
        every = []
        for layer in self.layers:
            every.append(hidden)
            hidden = layer(hidden, attention_mask=mask.to(hidden.dtype), cos=cos, sin=sin)[0]
        hidden = self.norm(hidden)
        states = (*every, hidden) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=hidden, hidden_states=states)


class NormHead(nn.Module):
    def __init__(self, size, vocabulary):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, size).normal_())

    def forward(self, hidden):
        return functional.linear(hidden, functional.normalize(self.weight))


class PackedForCausalLM(PackedPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = PackedModel(config)
        self.lm_head = NormHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def get_decoder(self):
        return self.model

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, output_hidden_states=False, **unused):
        output = self.model(input_ids, attention_mask, inputs_embeds, output_hidden_states)
        logits = self.lm_head(output.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, hidden_states=output.hidden_states)

    def prepare_inputs_for_generation(self, input_ids, **unused):
        return {"input_ids": input_ids}


def turned(states, cos, sin):
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat([-second, first], -1) * sin
