"""A pre-norm transformer that predicts the next token, without any part of lrules inside (Flax NNX)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array


class Transformer(nnx.Module):
    """Blocks of causal self-attention and a hidden dense layer, with LayerNorm before each (Xiong et al., 2020)."""

    def __init__(
        self,
        vocabulary: int,
        tokens: int,
        *,
        rngs: nnx.Rngs,
        blocks: int = 12,
        width: int = 512,
        heads: int = 8,
        dtype: Any = jnp.float32,
    ):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs, dtype=dtype)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (tokens, width)))
        self.blocks = nnx.List([TransformerBlock(width, heads, rngs, dtype) for _ in range(blocks)])
        self.norm = nnx.LayerNorm(width, rngs=rngs, dtype=dtype)
        self.out = nnx.Linear(width, vocabulary, rngs=rngs, dtype=dtype)

    def __call__(self, tokens: Array) -> Array:
        """[batch, tokens] -> logits [batch, tokens, vocabulary]."""
        x = self.embed(tokens)
        x = x + self.positions[...][None].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


class TransformerBlock(nnx.Module):
    """x + attention(norm(x)), then x + dense(gelu(dense(norm(x)))); the hidden layer is four times as wide."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs, dtype: Any):
        self.heads = heads
        self.norm1, self.norm2 = (nnx.LayerNorm(width, rngs=rngs, dtype=dtype) for _ in range(2))
        self.query, self.key, self.value, self.mix = (
            nnx.Linear(width, width, rngs=rngs, dtype=dtype) for _ in range(4)
        )
        self.up = nnx.Linear(width, 4 * width, rngs=rngs, dtype=dtype)
        self.down = nnx.Linear(4 * width, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        """[batch, tokens, width] -> [batch, tokens, width]."""
        y = self.norm1(x)
        split = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        q, k, v = (layer(y).reshape(split) for layer in (self.query, self.key, self.value))
        x = x + self.mix(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))
