"""Writing answers token by token: the cache of keys and values, and the next token.

    python sample.py --init_from=resume --user="What's the capital of France?"
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F


class KVCache:
    """Keys and values (n_layer, B, n_head, n_positions, C / n_head) of B texts."""

    def __init__(self, model, B, n_positions):
        c = model.config
        wte = model.transformer.wte.weight
        self.k = wte.new_zeros(c.n_layer, B, c.n_head, n_positions, c.n_embd // c.n_head)
        self.v = torch.zeros_like(self.k)
        self.lengths = [0] * B  # filled positions of each text

    def __call__(self, layer, qkv):
        """Attention: qkv (B t, 3C) of the next t positions of each text -> (B t, C)."""
        _, B, n_head, _, size = self.k.shape
        # Each of q, k and v is (B, n_head, t, size).
        q, k, v = qkv.view(B, -1, 3, n_head, size).permute(2, 0, 3, 1, 4)
        self.k[layer][self.at] = k
        self.v[layer][self.at] = v
        keys = self.k[layer, :, :, :self.end]
        values = self.v[layer, :, :, :self.end]
        causal = self.mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, keys, values, self.mask, is_causal=causal)
        return y.transpose(1, 2).reshape(len(qkv), -1)

    def step(self, model, texts):
        """Append ids to each text, a list of lists -> logits (B, vocab_size) after them.

        Into an empty cache they may have different lengths, later only equal ones.
        """
        # Shorter ones are padded at the end, where nothing looks at the padding.
        device = self.k.device
        B = len(texts)
        t = max(len(ids) for ids in texts)
        idx = torch.tensor([ids + [0] * (t - len(ids)) for ids in texts], device=device)
        positions = torch.tensor(self.lengths)[:, None] + torch.arange(t)  # (B, t)
        positions = positions.to(device)
        start = max(self.lengths)
        self.end = start + t
        # Where the new keys and values go; which keys each position sees, if not all or
        # simply those before it.
        self.at = (slice(None), slice(None), slice(start, self.end))
        self.mask = None
        ragged = min(self.lengths) < start
        if ragged:
            row = torch.arange(B, device=device)[:, None, None]
            head = torch.arange(self.k.shape[2], device=device)[:, None]
            self.at = (row, head, positions[:, None])
        if ragged or start and t > 1:
            seen = torch.arange(self.end, device=device)
            self.mask = seen <= positions[:, None, :, None]  # (B, 1, t, end)
        x = model.body(idx.view(-1), positions.reshape(-1), self)
        last = [row * t + len(ids) - 1 for row, ids in enumerate(texts)]
        self.lengths = [n + len(ids) for n, ids in zip(self.lengths, texts)]
        return model.head(x[last])

    def keep(self, rows):
        """Only these texts, a list of row numbers. A row may be there several times."""
        self.k = self.k[:, rows]
        self.v = self.v[:, rows]
        self.lengths = [self.lengths[row] for row in rows]


class Sampling(NamedTuple):
    """How the next token is chosen, as in transformers."""
    temperature: float = 1.0  # below 1e-5: always the likeliest token
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the likeliest tokens that together have this probability
    min_p: float = 0.0  # drop tokens less likely than this, relative to the likeliest
    repetition_penalty: float = 1.0  # over 1: tokens of the text become less likely
    no_repeat_ngram_size: int = 0  # n: no n tokens stand in the text twice; 0 allows all


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, sampling, num_samples=1, seed=0, stops=()):
    """Yield, step by step, a list of the next ids of num_samples answers to each prompt.

    An answer ends with a token of `stops`, after max_new_tokens, or when the window is full.
    After that the list has None for it. Each prompt must fit the window.
    """
    window = model.config.block_size
    longest = max(len(prompt) for prompt in prompts)
    generator = torch.Generator(model.device).manual_seed(seed)
    cache = KVCache(model, len(prompts), min(window, longest + max_new_tokens - 1))
    logits = cache.step(model, prompts)
    # Samples of a prompt share the reading of it.
    rows = [i // num_samples for i in range(len(prompts) * num_samples)]
    cache.keep(rows)
    logits = logits[rows]
    texts = [list(prompts[row]) for row in rows]
    answers = list(range(len(texts)))  # which of them is in each row of the cache
    for step in range(max_new_tokens):
        if step:
            logits = cache.step(model, [texts[i][-1:] for i in answers])
        chosen = choose(logits.float(), sampling, generator, [texts[i] for i in answers])
        tokens = [None] * len(texts)
        rows = []  # of the answers that go on
        for row, token in enumerate(chosen.tolist()):
            tokens[answers[row]] = token
            texts[answers[row]].append(token)
            if token not in stops and cache.lengths[row] < window:
                rows.append(row)
        yield tokens
        if not rows:
            return
        if len(rows) < len(answers):
            # The others leave the batch.
            cache.keep(rows)
            answers = [answers[row] for row in rows]


def choose(logits, sampling, generator=None, texts=()):
    """Tokens (B,) int64 for logits (B, V) float32. texts: each row's ids, for the penalties."""
    if sampling.repetition_penalty != 1 or sampling.no_repeat_ngram_size:
        logits = logits.clone()
        for row, text in zip(logits, texts):
            penalize(row, text, sampling)
    if sampling.temperature < 1e-5:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    # Keep the likely tokens only, and remember which ones they are.
    order = None
    if 0 < sampling.top_k < logits.shape[-1]:
        # Drawing among all 50,257 takes ten times as long.
        logits, order = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits, order = logits.sort(descending=True)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        # The mass of all likelier tokens. The likeliest one always stays.
        before = probabilities.cumsum(-1) - probabilities
        before[:, 0] = -1
        probabilities[before >= sampling.top_p] = 0
    least = sampling.min_p * probabilities.amax(-1, keepdim=True)
    probabilities[probabilities < least] = 0
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    if order is not None:
        drawn = order.gather(-1, drawn)
    return drawn[:, 0]


def penalize(logits, text, sampling):
    """Change the logits (V,) after a text, a list of ids, in place."""
    ids = torch.tensor(text, device=logits.device)
    found = logits[ids]
    penalty = sampling.repetition_penalty
    logits[ids] = torch.where(found < 0, found * penalty, found / penalty)
    n = sampling.no_repeat_ngram_size
    if 0 < n <= len(text):
        # The tokens that once came after the last n - 1.
        ngrams = ids.unfold(0, n, 1)
        last = ids[len(ids) - n + 1:]
        repeated = (ngrams[:, :-1] == last).all(-1)
        logits.index_add_(0, ngrams[:, -1], torch.where(repeated, -torch.inf, 0.0))
