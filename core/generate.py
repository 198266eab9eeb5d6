"""Writing answers token by token: the cache of keys and values, and the choice of the next token.

    python sample.py --init_from=resume --user="What's the capital of France?"
"""
import torch
import torch.nn.functional as F


class KVCache:
    """Keys and values (n_layer, B, n_head, n_positions, C / n_head) of B texts of any lengths."""

    def __init__(self, model, B, n_positions):
        c = model.config
        size = c.n_embd // c.n_head
        wte = model.transformer.wte.weight
        self.k = wte.new_zeros(c.n_layer, B, c.n_head, n_positions, size)
        self.v = torch.zeros_like(self.k)
        self.lengths = [0] * B  # filled positions of each text
        self.end = 0  # attention looks at the positions before this one
        self.mask = None  # what each new position may see, if causal does not say it
        self.at = None  # (rows, positions) where the new keys and values go, if not at the end

    def __call__(self, layer, qkv):
        """Attention: qkv (B t, 3C) of the next t positions of each text -> (B t, C)."""
        _, B, n_head, _, size = self.k.shape
        q, k, v = qkv.view(B, -1, 3, n_head, size).permute(2, 0, 3, 1, 4)
        t = q.shape[2]  # each of them is (B, n_head, t, size)
        keys = self.k[layer, :, :, :self.end]
        values = self.v[layer, :, :, :self.end]
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


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, num_samples=1, temperature=1.0, top_k=0, top_p=1.0,
             seed=0, stops=()):
    """Yield the next tokens of num_samples answers to each prompt, step by step: a list of ids.

    prompts: lists of ids, of any lengths. An answer ends with a token of `stops`, or when its
    window is full: learned positions cannot be moved on. From then on the list has None for it.
    The generator ends when all answers have, or after max_new_tokens. temperature=0 is greedy.
    """
    window = model.config.block_size
    longest = max(len(prompt) for prompt in prompts)
    assert 0 < longest <= window and all(prompts), [len(prompt) for prompt in prompts]
    generator = torch.Generator(model.device).manual_seed(seed)
    cache = KVCache(model, len(prompts), min(window, longest + max_new_tokens - 1))
    logits = cache.read(model, prompts).repeat_interleave(num_samples, dim=0)
    cache.repeat(num_samples)
    answers = list(range(len(logits)))  # the answer that each row of the cache belongs to
    n_answers = len(answers)
    for step in range(max_new_tokens):
        idx = choose(logits.float(), temperature, top_k, top_p, generator)
        tokens = idx.tolist()
        found = [None] * n_answers
        for answer, token in zip(answers, tokens):
            found[answer] = token
        yield found
        open_rows = []
        for row, token in enumerate(tokens):
            if token not in stops and cache.lengths[row] < window:
                open_rows.append(row)
        if not open_rows or step == max_new_tokens - 1:
            return
        if len(open_rows) < len(answers):
            cache.keep(open_rows)
            answers = [answers[row] for row in open_rows]
            idx = idx[open_rows]
        logits = cache.step(model, idx[:, None])


def choose(logits, temperature, top_k, top_p, generator):
    """Tokens (B,) int64 for logits (B, V) float32: the likeliest, or drawn."""
    if temperature < 1e-5:  # 0, or so little that the logits would overflow
        return logits.argmax(-1)
    logits = logits / temperature
    order = None
    if 0 < top_k < logits.shape[-1]:
        logits, order = logits.topk(top_k)  # drawing among all 50,257 takes ten times as long
    elif top_p < 1:
        logits, order = logits.sort(descending=True)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # the mass of all likelier tokens
        before[:, 0] = -1  # the likeliest one always stays
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    if order is not None:
        drawn = order.gather(-1, drawn)
    return drawn[:, 0]
