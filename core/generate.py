"""Writing answers token by token: the cache of keys and values, and the choice of the next token.

    python sample.py --init_from=resume --user="What's the capital of France?"
"""
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F

from configurator import UserError


class KVCache:
    """Keys and values (n_layer, B, n_head, n_positions, C / n_head) of B texts of any lengths."""

    def __init__(self, model, B, n_positions):
        c = model.config
        size = c.n_embd // c.n_head
        wte = model.transformer.wte.weight
        self.k = wte.new_zeros(c.n_layer, B, c.n_head, n_positions, size)
        self.v = torch.zeros_like(self.k)
        # Filled positions of each text.
        self.lengths = [0] * B
        # Attention looks at the positions before this one.
        self.end = 0
        # What each new position may see, if causal does not say it.
        self.mask = None
        # (rows, positions) where the new keys and values go, if not at the end.
        self.at = None

    def __call__(self, layer, qkv):
        """Attention: qkv (B t, 3C) of the next t positions of each text -> (B t, C)."""
        _, B, n_head, _, size = self.k.shape
        q, k, v = qkv.view(B, -1, 3, n_head, size).permute(2, 0, 3, 1, 4)
        # q, k and v are (B, n_head, t, size).
        t = q.shape[2]
        keys = self.k[layer, :, :, :self.end]
        values = self.v[layer, :, :, :self.end]
        # Write the new keys and values, then attend over all that are filled.
        if self.at is None:
            keys[:, :, -t:] = k
            values[:, :, -t:] = v
        else:
            rows, positions = self.at
            keys[rows, :, positions] = k[:, :, 0]
            values[rows, :, positions] = v[:, :, 0]
        causal = t > 1 and self.mask is None
        y = F.scaled_dot_product_attention(q, keys, values, self.mask, is_causal=causal)
        return y.transpose(1, 2).reshape(len(qkv), -1)

    def step(self, model, idx):
        """Feed idx (B, t), the next tokens of each text -> logits (B, vocab_size) after the last.

        t > 1 only if all texts are equally long.
        """
        B, t = idx.shape
        lengths = torch.tensor(self.lengths, device=idx.device)
        self.end = max(self.lengths) + t
        self.mask = None
        self.at = None
        seen = torch.arange(self.end, device=idx.device)
        if len(set(self.lengths)) > 1:
            # Each text writes at its own end and sees nothing of the unfilled positions behind it.
            assert t == 1, (t, self.lengths)
            self.mask = (seen <= lengths[:, None])[:, None, None]  # (B, 1, 1, end)
            self.at = (torch.arange(B, device=idx.device), lengths)
        elif t > 1 and self.lengths[0]:
            # A further piece of a prompt: each position sees what is before it.
            self.mask = seen <= seen[-t:, None]  # (t, end)
        positions = lengths[:, None] + torch.arange(t, device=idx.device)
        x = model.body(idx.reshape(-1), positions.reshape(-1), self)
        self.lengths = [length + t for length in self.lengths]
        return model.head(x.view(B, t, -1)[:, -1])

    def read(self, model, prompts):
        """Fill the cache with the prompts -> logits (B, vocab_size) after each.

        Prompts of equal length are read together.
        """
        self.lengths = [len(prompt) for prompt in prompts]
        logits = [None] * len(prompts)
        for length in set(self.lengths):
            rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            idx = torch.tensor([prompts[i] for i in rows], device=self.k.device)
            part = KVCache(model, len(rows), length)
            found = part.step(model, idx)
            self.k[:, rows, :, :length] = part.k
            self.v[:, rows, :, :length] = part.v
            for i, row in zip(rows, found):
                logits[i] = row
        return torch.stack(logits)

    def repeat(self, n):
        """Each text n times, so that n samples share the reading of their prompt."""
        self.k = self.k.repeat_interleave(n, dim=1)
        self.v = self.v.repeat_interleave(n, dim=1)
        self.lengths = [length for length in self.lengths for _ in range(n)]

    def keep(self, rows):
        """Only these texts, a list of row numbers."""
        self.k = self.k[:, rows]
        self.v = self.v[:, rows]
        self.lengths = [self.lengths[row] for row in rows]


class Sampling(NamedTuple):
    """How the next token is chosen: first the penalties, then temperature, top_k, top_p, min_p.

    The first six are as transformers defines them, the last two as OpenAI does, over the answer.
    """
    temperature: float = 1.0  # below 1e-5: always the likeliest token
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the likeliest tokens that together have this probability
    min_p: float = 0.0  # drop tokens that are less likely than this, relative to the likeliest
    repetition_penalty: float = 1.0  # over 1: tokens that are in the text become less likely
    no_repeat_ngram_size: int = 0  # n: no n tokens stand in the text twice; 0 allows all
    frequency_penalty: float = 0.0  # subtracted from a logit for each time the token was written
    presence_penalty: float = 0.0  # subtracted once if the token was written


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, sampling, num_samples=1, seed=0, stops=()):
    """Yield the next tokens of num_samples answers to each prompt, step by step: a list of ids.

    prompts: lists of ids, of any lengths. An answer ends with a token of `stops`, or when its
    window is full: learned positions cannot be moved on. From then on the list has None for it.
    The generator ends when all answers have, or after max_new_tokens.
    """
    window = model.config.block_size
    longest = max(len(prompt) for prompt in prompts)
    assert 0 < longest <= window and all(prompts), [len(prompt) for prompt in prompts]
    # Samples of a prompt share the reading of it.
    generator = torch.Generator(model.device).manual_seed(seed)
    cache = KVCache(model, len(prompts), min(window, longest + max_new_tokens - 1))
    logits = cache.read(model, prompts).repeat_interleave(num_samples, dim=0)
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite: its weights are damaged, or it was "
                        'trained with too high a learning rate.')
    cache.repeat(num_samples)
    # The answer that each row of the cache belongs to.
    answers = list(range(len(logits)))
    texts = [(prompt, []) for prompt in prompts for _ in range(num_samples)]
    for step in range(max_new_tokens):
        idx = choose(logits.float(), sampling, generator, [texts[answer] for answer in answers])
        tokens = idx.tolist()
        found = [None] * len(texts)
        open_rows = []
        for row, (answer, token) in enumerate(zip(answers, tokens)):
            found[answer] = token
            texts[answer][1].append(token)
            if token not in stops and cache.lengths[row] < window:
                open_rows.append(row)
        yield found
        if not open_rows or step == max_new_tokens - 1:
            return
        # Answers that have ended leave the batch.
        if len(open_rows) < len(answers):
            cache.keep(open_rows)
            answers = [answers[row] for row in open_rows]
            idx = idx[open_rows]
        logits = cache.step(model, idx[:, None])


def choose(logits, sampling, generator=None, texts=()):
    """Tokens (B,) int64 for logits (B, V) float32.

    texts: for each row (ids of the prompt, ids of the answer so far), for the penalties.
    """
    # The fields from the fifth on are the penalties.
    if sampling[4:] != Sampling()[4:]:
        logits = logits.clone()
        for row, (prompt, answer) in zip(logits, texts):
            penalize(row, prompt, answer, sampling)
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
        # The mass of all likelier tokens.
        before = probabilities.cumsum(-1) - probabilities
        # The likeliest one always stays.
        before[:, 0] = -1
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    if sampling.min_p:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    if order is not None:
        drawn = order.gather(-1, drawn)
    return drawn[:, 0]


def penalize(logits, prompt, answer, sampling):
    """Change the logits (V,) of one text in place, by its ids."""
    text = prompt + answer
    if sampling.repetition_penalty != 1:
        ids = torch.tensor(text, device=logits.device)
        found = logits[ids]
        penalty = sampling.repetition_penalty
        logits[ids] = torch.where(found < 0, found * penalty, found / penalty)
    for token, n in Counter(answer).items():
        logits[token] -= sampling.frequency_penalty * n + sampling.presence_penalty
    if sampling.no_repeat_ngram_size:
        # Tokens before the one to be chosen.
        n = sampling.no_repeat_ngram_size - 1
        last = text[len(text) - n:]
        for i in range(len(text) - n):
            if text[i:i + n] == last:
                logits[text[i + n]] = -torch.inf
