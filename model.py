"""GPT-2 in plain PyTorch: one body for packed training, whole logits and cached decoding.

    python -c "import model; print(model.GPT(model.GPTConfig(n_layer=2, n_head=2, n_embd=64)))"

The body works on a stream of N tokens and asks `attend` what each of them may look at. `attend`
is a DocumentAttention in training (each conversation by itself) and a KVCache in decoding.
Shapes: B texts of T tokens, or a stream of N tokens; C = n_embd; V = vocab_size; S supervised
tokens. Source: Radford et al. 2019, https://github.com/openai/gpt-2
"""
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import Count, Fraction


@dataclass
class GPTConfig:
    """The shape of a model. vocab_size counts real tokens, without the padding rows."""
    n_layer: Count = 12
    n_head: Count = 12
    n_embd: Count = 768
    block_size: Count = 1024
    vocab_size: Count = 50257
    dropout: Fraction = 0.0
    bias: bool = True
    # tanh is GPT-2's approximation of the GELU; none the exact one, which nanoGPT uses
    gelu: Literal['tanh', 'none'] = 'tanh'

    @property
    def padded_vocab_size(self):
        """Rows of the embedding: a multiple of 128, which matrix units like."""
        return math.ceil(self.vocab_size / 128) * 128


class Block(nn.Module):
    """A transformer layer in two halves: before and after attention."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        bias = config.bias
        # The names are those of transformers' files.
        self.ln_1 = nn.LayerNorm(C, bias=bias)
        self.attn = nn.ModuleDict({
            'c_attn': nn.Linear(C, 3 * C, bias), 'c_proj': nn.Linear(C, C, bias)})
        self.ln_2 = nn.LayerNorm(C, bias=bias)
        self.mlp = nn.ModuleDict({
            'c_fc': nn.Linear(C, 4 * C, bias), 'c_proj': nn.Linear(4 * C, C, bias)})
        self.config = config

    def before(self, x):
        """The stream (N, C) -> queries, keys and values (N, 3C)."""
        return self.attn.c_attn(self.ln_1(x))

    def after(self, x, y):
        """The stream x (N, C) and attention's output y (N, C) -> the stream (N, C)."""
        # No dropout inside attention: on a CPU it makes attention three to six times slower.
        p = self.config.dropout
        x = x + F.dropout(self.attn.c_proj(y), p, self.training)
        h = F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate=self.config.gelu)
        return x + F.dropout(self.mlp.c_proj(h), p, self.training)


# nn.Embedding(…) would draw random numbers, and init_weights draws them again.
embedding = partial(nn.Embedding.from_pretrained, freeze=False)


class GPT(nn.Module):
    """GPT-2, with the output head tied to the token embedding."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, (config.n_embd, config.n_head)
        self.config = config
        self.transformer = nn.ModuleDict({
            'wte': embedding(torch.empty(config.padded_vocab_size, config.n_embd)),
            'wpe': embedding(torch.empty(config.block_size, config.n_embd)),
            'h': nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            'ln_f': nn.LayerNorm(config.n_embd, bias=config.bias)})
        # Decoding puts a faster way to multiply by wte here.
        self.unembed = None
        if self.device.type != 'meta':
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's random start."""
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif name.endswith('c_proj.weight'):
                # Smaller, because 2 n_layer of these add up in the stream.
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        self.transformer.wte.weight[self.config.vocab_size:] = 0

    @property
    def device(self):
        """Where the weights are."""
        return self.transformer.wte.weight.device

    def body(self, idx, positions, attend):
        """idx, positions (N,) int64 -> the stream after the last norm (N, C)."""
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.transformer.h):
            qkv = block.before(x)
            x = block.after(x, attend(layer, qkv))
        return self.transformer.ln_f(x)

    def head(self, x):
        """(..., C) -> logits (..., vocab_size), without the padding rows."""
        if self.unembed:
            logits = self.unembed(x)
        else:
            logits = F.linear(x, self.transformer.wte.weight)
        return logits[..., :self.config.vocab_size]

    def forward(self, idx):
        """Logits (B, T, vocab_size) of idx (B, T) int64, each row a text of its own."""
        B, T = idx.shape
        # All rows as one stream, each a document of its own.
        positions = torch.arange(T, device=idx.device).repeat(B)
        starts = torch.arange(0, B * T + 1, T, device=idx.device)
        attend = DocumentAttention([(B, T)], self.config.n_head, starts)
        x = self.body(idx.reshape(-1), positions, attend)
        return self.head(x).view(B, T, -1)

    def loss(self, batch):
        """Summed cross-entropy in nats over the supervised tokens of a rows.Batch.

        The caller divides once a step, by the supervised tokens of all micro-batches and
        processes. Only supervised positions have logits.
        """
        counts, lengths = zip(*batch.runs)
        starts = np.cumsum([0, *np.repeat(lengths, counts)])
        # One copy to the GPU, in the background.
        parts = [batch.idx, batch.positions, batch.at, batch.targets, starts]
        packed = torch.from_numpy(np.concatenate(parts))
        if self.device.type == 'cuda':
            packed = packed.pin_memory().to(self.device, non_blocking=True)
        packed = packed.to(self.device)
        idx, positions, at, targets, starts = packed.split([len(part) for part in parts])
        attend = DocumentAttention(batch.runs, self.config.n_head, starts)
        x = self.body(idx, positions, attend)[at]
        wte = self.transformer.wte.weight
        if self.device.type == 'mps':
            # torch 2.13's products are wrong there if they sum over 32,767 terms or more:
            # https://github.com/pytorch/pytorch/issues/193487
            logits = torch.cat([F.linear(x, rows) for rows in wte.split(16_384)], dim=1)
        else:
            logits = F.linear(x, wte)
        return CrossEntropy.apply(logits, targets, self.config.vocab_size)

    def compile(self):
        """torch.compile the halves of each layer. What is compiled serves all layers."""
        for block in self.transformer.h:
            block.before = torch.compile(block.before, dynamic=True)
            block.after = torch.compile(block.after, dynamic=True)

    @torch.no_grad()
    def add_tokens(self, pieces):
        """Add tokens to the vocabulary. pieces: for each, the ids that it would be as text.

        A new row is the mean of its pieces' embeddings, so that its logit is the mean of theirs.
        The old logits stay as they were.
        """
        wte = self.transformer.wte.weight
        new_rows = torch.stack([wte[ids].mean(0) for ids in pieces])
        self.set_embedding(torch.cat([wte[:self.config.vocab_size], new_rows]))

    def set_embedding(self, rows):
        """Replace the token embedding by rows (vocab_size, C), and pad it."""
        self.config.vocab_size = len(rows)
        rows = F.pad(rows.detach(), (0, 0, 0, self.config.padded_vocab_size - len(rows)))
        self.transformer.wte = embedding(rows)


class DocumentAttention:
    """Causal attention within each document of a stream that holds them one after another.

    runs: [(how many, length), …]: documents of equal length stand side by side.
    starts (documents + 1,): where each begins, and where the last one ends.
    """

    def __init__(self, runs, n_head, starts):
        self.runs = runs
        self.n_head = n_head
        self.starts = starts.int()
        self.longest = max(length for _, length in runs)

    def __call__(self, layer, qkv):
        """qkv (N, 3C) -> (N, C)."""
        if can_use_varlen(qkv, self.n_head):
            # Imported here because it takes a second.
            from torch.nn.attention.varlen import varlen_attn
            q, k, v = qkv.view(len(qkv), 3, self.n_head, -1).unbind(1)
            # The window: look back without limit, never ahead.
            y = varlen_attn(q, k, v, self.starts, self.starts, self.longest, self.longest,
                            window_size=(-1, 0))
            return y.reshape(len(qkv), -1)
        out = []
        sizes = [n * length for n, length in self.runs]
        for (n, length), part in zip(self.runs, qkv.split(sizes)):
            # (n length, 3C) -> three of (n, n_head, length, C / n_head)
            q, k, v = part.view(n, length, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
            if qkv.is_cpu and qkv.dtype == torch.bfloat16:
                y = attention_by_products(q, k, v)
            else:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            out.append(y.transpose(1, 2).reshape(n * length, -1))
        return torch.cat(out)


def attention_by_products(q, k, v):
    """Causal attention with two matrix products: on a CPU, in bfloat16, the fastest way.

    q, k, v (n, n_head, T, C / n_head), and so is the result.
    """
    n, n_head, T, size = q.shape
    q, k, v = torch.stack([q, k, v]).view(3, n * n_head, T, size)
    mask = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(mask, q, k.mT, alpha=size ** -0.5)
    # The dtype is named because autocast would choose float32.
    p = scores.softmax(-1, dtype=q.dtype)
    return (p @ v).view(n, n_head, T, size)


def can_use_varlen(qkv, n_head):
    """Whether FlashAttention's kernel takes these: half precision, on Ampere or newer."""
    if not qkv.is_cuda or qkv.dtype not in (torch.bfloat16, torch.float16):
        return False
    size = qkv.shape[1] // 3 // n_head
    fits = size % 8 == 0 and size <= 256
    return fits and torch.cuda.get_device_capability(qkv.device) >= (8, 0)


class CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy in nats of logits (S, V), of which the first n_classes columns count.

    targets (S,) int64. Computed in float32, some rows at a time. Their gradient, made of the same
    probabilities, replaces the logits, so that nothing else of that size ever exists.
    """

    @staticmethod
    def forward(ctx, logits, targets, n_classes):
        logits[:, n_classes:] = -torch.inf
        loss = logits.new_zeros((), dtype=torch.float32)
        # A CPU wants few rows at once, which fit its cache; a GPU wants many, to be busy.
        n_rows = 32 if logits.is_cpu else 2048
        for part, target in zip(logits.split(n_rows), targets.split(n_rows)):
            at_target = (torch.arange(len(part), device=part.device), target)
            p = part.softmax(-1, dtype=torch.float32)
            # The logarithm of the sum of all exp(logit), from the likeliest class: its logit
            # minus the logarithm of its probability, which is never tiny.
            log_sum = part.amax(-1).float() - p.amax(-1).log()
            loss += (log_sum - part[at_target].float()).sum()
            if ctx.needs_input_grad[0]:
                # The gradient of the logits: the probabilities, minus 1 at the target.
                p[at_target] -= 1
                part.copy_(p)
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad, = ctx.saved_tensors
        return grad.mul_(grad_loss), None, None
