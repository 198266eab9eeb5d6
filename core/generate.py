"""Writing answers token by token: a cache of keys and values, and how the next token is chosen.

    python sample.py --init_from=resume --user="What's the capital of France?"

A step reads every weight once, and on a CPU that is nearly all of its time: `prepare` lays them out
for it, in the precision that is asked for.
"""
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from configurator import UserError
from core.kernels import Int8Linear, PackedLinear
from model import pick_dtype
from core.progress import Bar

DTYPES = ('auto', 'float32', 'bfloat16', 'float16', 'int8')  # of the weights


def prepare(model, device, dtype='auto', compiled=False):
    """Change the model, in place, into one to decode with; the name of the dtype its weights have now.

    dtype: one of DTYPES; 'auto' is bfloat16 on CUDA and float32 elsewhere. On a CPU it is only how
    the weights of linear layers are kept: embeddings, norms, attention and sums stay float32.
    """
    if dtype == 'auto' and 'cuda' not in device:
        dtype = 'float32'
    if dtype == 'int8':
        if device != 'cpu':
            raise UserError(f'dtype=int8 is for the CPU, found {device}. Use --dtype=auto or --device=cpu.')
        convert = lambda weight, bias: Int8Linear(weight, bias, compiled)  # noqa: E731
    else:
        kind = pick_dtype(dtype, device)
        dtype = str(kind).removeprefix('torch.')
        convert = lambda weight, bias: PackedLinear(weight, bias, kind)  # noqa: E731
    if device != 'cpu':
        model.to(device, kind).eval()
        return dtype
    # One thread a matrix: half the work is the kernel's, handing out memory, and torch's threads wait for it.
    n_threads = torch.get_num_threads()
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        unembed = pool.submit(convert, model.transformer.wte.weight, None)
        linears = [(part, name, pool.submit(convert, linear.weight, linear.bias)) for block in model.transformer.h
                   for part in (block.attn, block.mlp) for name, linear in part.items()]
        for part, name, converted in Bar(linears, 'laying out the weights', unit=' matrices'):
            part[name] = converted.result()
        model.unembed = unembed.result()
    torch.set_num_threads(n_threads)  # theirs is what every thread that starts later would begin with, such as serve.py's
    model.eval()
    return dtype


class KVCache:
    """Keys and values (n_layer, B, n_head, n_positions, C / n_head) of B texts of any lengths."""

    def __init__(self, model, B, n_positions):
        c, wte = model.config, model.transformer.wte.weight
        self.k = wte.new_zeros(c.n_layer, B, c.n_head, n_positions, c.n_embd // c.n_head)
        self.v = torch.zeros_like(self.k)
        self.lengths = [0] * B  # how many positions of each text are filled
        self.end = 0  # attention looks at the positions before this one
        self.mask = None  # which of them each new position may see, bool for attention, where causal does not say it
        self.at = None  # (rows, positions), each (B,), where the new keys and values go, unless at the end of all

    def __call__(self, layer, qkv):
        """qkv (B t, 3C) of the next t positions of each text -> (B t, C)."""
        _, B, n_head, _, size = self.k.shape
        q, k, v = qkv.view(B, -1, 3, n_head, size).permute(2, 0, 3, 1, 4)  # each (B, n_head, t, size)
        keys, values = self.k[layer, :, :, :self.end], self.v[layer, :, :, :self.end]
        if self.at is None:
            keys[:, :, -q.shape[2]:], values[:, :, -q.shape[2]:] = k, v
        else:
            rows, at = self.at
            keys[rows, :, at], values[rows, :, at] = k[:, :, 0], v[:, :, 0]
        y = F.scaled_dot_product_attention(q, keys, values, self.mask,
                                           is_causal=q.shape[2] > 1 and self.mask is None)
        return y.transpose(1, 2).reshape(len(qkv), -1)

    def step(self, model, idx):
        """Feed idx (B, t), the next tokens of each text -> logits (B, vocab_size) after the last.

        t > 1 only where all texts are equally long.
        """
        B, t = idx.shape
        lengths, self.end = torch.tensor(self.lengths, device=idx.device), max(self.lengths) + t
        self.mask = self.at = None
        if len(set(self.lengths)) > 1:
            assert t == 1, (t, self.lengths)
            self.see(lengths)
        elif t > 1 and self.lengths[0]:  # a further piece of a prompt
            positions = torch.arange(self.end, device=idx.device)
            self.mask = positions <= positions[-t:, None]  # (t, end)
        positions = (lengths[:, None] + torch.arange(t, device=idx.device)).reshape(-1)
        x = model.body(idx.reshape(-1), positions, self).view(B, t, -1)
        self.lengths = [length + t for length in self.lengths]
        return model.head(x[:, -1])

    def see(self, lengths):
        """Let text b write at position lengths[b] and see what is before, not what is unfilled behind it."""
        self.at = torch.arange(len(lengths), device=lengths.device), lengths
        self.mask = (torch.arange(self.end, device=lengths.device) <= lengths[:, None])[:, None, None]

    def read(self, model, prompts):
        """Fill the empty cache with the prompts, a list of B lists of ids -> logits (B, vocab_size)."""
        logits = [None] * len(prompts)
        for length in sorted({len(prompt) for prompt in prompts}):
            rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            part = KVCache(model, len(rows), length)
            found = part.step(model, torch.tensor([prompts[i] for i in rows], device=self.k.device))
            self.k[:, rows, :, :length], self.v[:, rows, :, :length] = part.k, part.v
            for i, row in zip(rows, found):
                logits[i] = row
        self.lengths = [len(prompt) for prompt in prompts]
        return torch.stack(logits)

    def repeat(self, n):
        """Each text n times: a prefill shared by n samples."""
        self.k, self.v = (x.repeat_interleave(n, dim=1) for x in (self.k, self.v))
        self.lengths = [length for length in self.lengths for _ in range(n)]

    def keep(self, rows):
        """Only these texts, a list of row numbers."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.lengths = [self.lengths[row] for row in rows]


def wants_graph(cache):
    """Whether generate replays a GraphedStep: on CUDA."""
    return cache.k.is_cuda


class GraphedStep:
    """KVCache.step of one token as a CUDA graph: a GPU does it sooner than Python can ask for it.

    Shapes and addresses must stay as they are, so every step attends over the whole cache under a
    mask, and texts that have ended go on being computed. On a CPU it computes the same without a graph.
    """

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.idx = torch.zeros(len(cache.lengths), dtype=torch.int64, device=cache.k.device)
        self.lengths = torch.tensor(cache.lengths, device=cache.k.device)
        self.graph, cache.end = None, cache.k.shape[3]
        if cache.k.is_cuda:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what the first call sets up must not be in the graph
                self.compute()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.compute()

    def compute(self):
        """Logits (B, vocab_size) after idx, whose keys and values are written at lengths."""
        self.cache.see(self.lengths)
        return self.model.head(self.model.body(self.idx, self.lengths, self.cache))

    def __call__(self, idx):
        """Feed idx (B,), the next token of each text."""
        self.idx.copy_(idx)
        if self.graph:
            self.graph.replay()
        logits = self.logits if self.graph else self.compute()
        self.lengths.add_(1).clamp_(max=self.cache.end - 1)  # of an ended text the last position is written again
        self.cache.lengths = [length + 1 for length in self.cache.lengths]
        return logits


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, num_samples=1, temperature=1.0, top_k=0, top_p=1.0, seed=0, stops=()):
    """Yield the next tokens of num_samples answers to each prompt, step by step: a list of ids.

    prompts: lists of ids, of any lengths; each is read once for all of its samples. In a step's list
    stands None for an answer that has ended: with a token of `stops` the step before, or because its
    window is full, since learned positions cannot be moved on. The generator ends when all have, or
    after max_new_tokens. temperature=0 is greedy.
    """
    window = model.config.block_size
    assert all(0 < len(prompt) <= window for prompt in prompts), [len(prompt) for prompt in prompts]
    generator = torch.Generator(model.device).manual_seed(seed)
    cache = KVCache(model, len(prompts), min(window, max(map(len, prompts)) + max_new_tokens - 1))
    logits = cache.read(model, prompts).repeat_interleave(num_samples, dim=0)
    cache.repeat(num_samples)
    answers = list(range(len(logits)))  # which each row of the cache belongs to; None to one that has ended
    graphed = GraphedStep(model, cache) if wants_graph(cache) else None
    for step in range(max_new_tokens):
        idx = choose(logits.float(), temperature, top_k, top_p, generator)
        tokens, found = idx.tolist(), [None] * len(prompts) * num_samples
        for row, answer in enumerate(answers):
            if answer is not None:
                found[answer] = tokens[row]
        yield found
        going_on = [row for row, answer in enumerate(answers)
                    if answer is not None and tokens[row] not in stops and cache.lengths[row] < window]
        if not going_on or step == max_new_tokens - 1:
            return
        if graphed:
            answers = [answer if row in going_on else None for row, answer in enumerate(answers)]
            logits = graphed(idx)
            continue
        if len(going_on) < len(answers):
            cache.keep(going_on)
            answers, idx = [answers[row] for row in going_on], idx[going_on]
        logits = cache.step(model, idx[:, None])


def choose(logits, temperature, top_k, top_p, generator):
    """Tokens (B,) int64 for logits (B, V) float32: the likeliest, or drawn from what top_k and top_p leave."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = logits / temperature, None
    if 0 < top_k < logits.shape[-1]:
        logits, order = logits.topk(top_k)  # drawn among these few: of all 50,257 it takes ten times as long
    elif top_p < 1:
        logits, order = logits.sort(descending=True)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # the mass of all that are likelier
        before[:, 0] = -1  # the likeliest stays, however small top_p is
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return (drawn if order is None else order.gather(-1, drawn))[:, 0]
