"""GPT-2 in plain PyTorch: one body for packed training, whole logits and cached decoding.

    python -c "import model; print(model.GPT(model.GPTConfig(n_layer=2, n_head=2, n_embd=64)))"

The body works on a stream of N tokens and asks `attend` what each of them may look at. `attend`
is a DocumentAttention in training (each conversation by itself) and a KVCache in decoding.
Sources: Radford et al. 2019. Weights have the names of https://github.com/openai/gpt-2, which
nanoGPT and `transformers` use too.
"""
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import Count, Fraction

# The embedding has a multiple of so many rows: matrix units like that.
VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. vocab_size counts real tokens, without the padding rows."""
    n_layer: Count = 12
    n_head: Count = 12
    n_embd: Count = 768
    block_size: Count = 1024
    vocab_size: Count = 50257
    dropout: Fraction = 0.0
    bias: bool = True
    # GPT-2's approximation, or the exact GELU, which nanoGPT uses
    gelu: Literal['tanh', 'none'] = 'tanh'

    @property
    def padded_vocab_size(self):
        """Rows of the embedding. Padding rows are never sampled, trained or exported."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Block(nn.Module):
    """A transformer layer in two halves: before and after attention."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        bias = config.bias
        self.ln_1 = nn.LayerNorm(C, bias=bias)
        self.attn = nn.ModuleDict({
            'c_attn': nn.Linear(C, 3 * C, bias),
            'c_proj': nn.Linear(C, C, bias)})
        self.ln_2 = nn.LayerNorm(C, bias=bias)
        self.mlp = nn.ModuleDict({
            'c_fc': nn.Linear(C, 4 * C, bias),
            'c_proj': nn.Linear(4 * C, C, bias)})
        # No dropout inside attention: on a CPU it makes attention three to six times slower.
        self.dropout = nn.Dropout(config.dropout)
        self.gelu = config.gelu

    def before(self, x):
        """The stream (N, C) -> queries, keys and values (N, 3C)."""
        return self.attn.c_attn(self.ln_1(x))

    def after(self, x, y):
        """The stream x (N, C) and attention's output y (N, C) -> the stream (N, C)."""
        x = x + self.dropout(self.attn.c_proj(y))
        h = F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate=self.gelu)
        return x + self.dropout(self.mlp.c_proj(h))


class GPT(nn.Module):
    """GPT-2, with the output head tied to the token embedding."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, (config.n_embd, config.n_head)
        self.config = config
        # Not nn.Embedding(…), which would draw random numbers that init_weights draws again.
        wte = torch.empty(config.padded_vocab_size, config.n_embd)
        wpe = torch.empty(config.block_size, config.n_embd)
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding.from_pretrained(wte, freeze=False),
            'wpe': nn.Embedding.from_pretrained(wpe, freeze=False),
            'drop': nn.Dropout(config.dropout),
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
        x = self.transformer.drop(x)
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
        attend = DocumentAttention([(B, T)], self.config.n_head)
        x = self.body(idx.reshape(-1), positions, attend)
        return self.head(x).view(B, T, -1)

    def loss(self, batch):
        """Summed cross-entropy in nats over the supervised tokens of a rows.Batch.

        The sum, not the mean: the caller divides once per optimizer step, by the supervised tokens
        of all micro-batches and processes, so that each of them counts the same. Logits are
        computed for supervised positions only.
        """
        idx, positions, at, targets = (
            torch.as_tensor(part, device=self.device)
            for part in (batch.idx, batch.positions, batch.at, batch.targets))
        x = self.body(idx, positions, DocumentAttention(batch.runs, self.config.n_head))
        wte = self.transformer.wte.weight
        return LinearCrossEntropy.apply(x[at], wte, targets, self.config.vocab_size)

    def compile(self):
        """torch.compile the two halves of a layer. All layers share one compiled pair."""
        for block in self.transformer.h:
            block.before = torch.compile(block.before, dynamic=True)
            block.after = torch.compile(block.after, dynamic=True)

    def set_dropout(self, dropout):
        """Change the dropout of a model that was loaded."""
        self.config = replace(self.config, dropout=dropout)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout

    @torch.no_grad()
    def add_tokens(self, pieces):
        """Add tokens to the vocabulary: {new id: ids of the pieces it would be as text}.

        A new row starts as the mean of its pieces' embeddings. A random row would wreck a small
        GPT-2; with the mean, the new logit is the mean of theirs and no other logit changes.
        The new ids must follow the vocabulary, in order.
        """
        old = self.config.vocab_size
        new_ids = sorted(pieces)
        assert new_ids == list(range(old, old + len(pieces))), (old, new_ids)
        wte = self.transformer.wte.weight
        new_rows = torch.stack([wte[pieces[i]].mean(0) for i in new_ids])
        self.set_embedding(torch.cat([wte[:old], new_rows]))

    def set_embedding(self, rows):
        """Replace the token embedding by rows (vocab_size, C), and pad it."""
        self.config = replace(self.config, vocab_size=len(rows))
        rows = F.pad(rows.detach(), (0, 0, 0, self.config.padded_vocab_size - len(rows)))
        self.transformer.wte = nn.Embedding.from_pretrained(rows, freeze=False)


class DocumentAttention:
    """Causal attention within each document of a stream that holds them one after another.

    runs: [(how many, length), …]. Documents of equal length stand side by side, so that each run
    is one dense call, without mask or padding.
    """

    def __init__(self, runs, n_head):
        self.runs = runs
        self.n_head = n_head
        # Where each document starts; made on first use.
        self.cu_seqlens = None

    def __call__(self, layer, qkv):
        """qkv (N, 3C) -> (N, C)."""
        if can_use_varlen(qkv, self.n_head):
            return self.varlen(qkv)
        if not qkv.is_cuda:
            # A CPU's kernel is faster in float32 than in bfloat16.
            qkv = qkv.float()
        out = []
        sizes = [n * length for n, length in self.runs]
        with torch.autocast(qkv.device.type, enabled=False):
            for (n, length), part in zip(self.runs, qkv.split(sizes)):
                # (n length, 3C) -> three of (n, n_head, length, C / n_head)
                q, k, v = part.view(n, length, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                out.append(y.transpose(1, 2).reshape(n * length, -1))
        return torch.cat(out)

    def varlen(self, qkv):
        """The same with FlashAttention's variable-length kernel: one call for all documents."""
        # Imported here, because it takes a second, and only CUDA needs it.
        from torch.nn.attention.varlen import varlen_attn
        if self.cu_seqlens is None:
            lengths = []
            for n, length in self.runs:
                lengths += n * [length]
            starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            self.cu_seqlens = starts.to(qkv.device)
            self.longest = max(lengths)
        q, k, v = qkv.view(len(qkv), 3, self.n_head, -1).unbind(1)
        y = varlen_attn(q, k, v, self.cu_seqlens, self.cu_seqlens, self.longest, self.longest,
                        # Look back without limit, never ahead.
                        window_size=(-1, 0))
        return y.reshape(len(qkv), -1)


def can_use_varlen(qkv, n_head):
    """Whether FlashAttention's kernel takes these: half precision, on Ampere or newer."""
    if not qkv.is_cuda or qkv.dtype not in (torch.bfloat16, torch.float16):
        return False
    size = qkv.shape[1] // 3 // n_head
    fits = size % 8 == 0 and size <= 256
    return fits and torch.cuda.get_device_capability(qkv.device) >= (8, 0)


# How many logits exist at once. A CPU wants few, to reuse its cache; a GPU enough to be busy.
LOGITS_AT_ONCE = {'cpu': 1 << 25, 'cuda': 1 << 28}


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy in nats of the logits x @ weight.T, without holding all of them.

    x (S, C), weight (V, C), targets (S,) int64. Only the first n_classes <= V rows count.
    The gradients are computed on the way forward, chunk by chunk, from the probabilities that are
    there anyway, so neither those nor the logits are kept. Products are in autocast's dtype, the
    softmax and all sums in float32. Idea: Hsu et al. 2024, https://arxiv.org/abs/2410.10989
    """

    @staticmethod
    def forward(ctx, x, weight, targets, n_classes):
        kind = x.device.type
        dtype = weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        needs_grad = ctx.needs_input_grad[0]
        loss = x.new_zeros((), dtype=torch.float32)
        with torch.autocast(kind, enabled=False):
            # All rows, although those past n_classes are padding: a GPU is faster with a
            # multiple of 128, and a logit of minus infinity has no probability and no gradient.
            w = weight.to(dtype)
            if needs_grad:
                grad_x = torch.empty(x.shape, dtype=dtype, device=x.device)
                grad_w = torch.zeros_like(weight)
            chunk = max(1, LOGITS_AT_ONCE.get(kind, 1 << 25) // len(w))
            for first in range(0, len(x), chunk):
                part = x[first:first + chunk].to(dtype)
                target = targets[first:first + chunk]
                at_target = (torch.arange(len(part), device=x.device), target)
                logits = part @ w.t()  # (chunk, V)
                logits[:, n_classes:] = -torch.inf
                log_p = logits.log_softmax(-1, dtype=torch.float32)
                loss -= log_p[at_target].sum()
                if not needs_grad:
                    continue
                # The gradient of the logits: the probabilities, minus 1 at the target.
                grad = log_p.exp_()
                grad[at_target] -= 1
                grad = grad.to(dtype)
                if kind == 'mps':
                    # torch 2.13's product is wrong there for inner dimensions of 32,767 and more:
                    # https://github.com/pytorch/pytorch/issues/193487
                    slices = zip(grad.split(16_384, dim=1), w.split(16_384))
                    grad_x[first:first + chunk] = sum(a @ b for a, b in slices)
                else:
                    torch.mm(grad, w, out=grad_x[first:first + chunk])
                if dtype == weight.dtype:
                    grad_w.addmm_(grad.t(), part)
                else:
                    grad_w += grad.t() @ part
        if needs_grad:
            ctx.save_for_backward(grad_x, grad_w)
            ctx.x_dtype = x.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w = ctx.saved_tensors
        grad_x = grad_x.to(ctx.x_dtype) * grad_loss.to(ctx.x_dtype)
        return grad_x, grad_w.mul_(grad_loss), None, None
