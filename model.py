"""GPT-2 in plain PyTorch: one body for packed training, whole logits and cached decoding.

    python -c "import model; print(model.GPT(model.GPTConfig(n_layer=2, n_head=2, n_embd=64)))"

The body works on a stream of tokens (N, C) and asks `attend` what each of them may look at:
DocumentAttention (every conversation by itself) or a KVCache. Nothing else differs.
Sources: Radford et al. 2019; the names of weights are those of https://github.com/openai/gpt-2 as
`transformers` and nanoGPT use them.
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError
from core.kernels import LinearCrossEntropy

VOCAB_MULTIPLE = 128  # of rows in the embedding: what matrix units like
GELUS = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}  # transformers' names for them, and torch's


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. vocab_size counts real tokens; the padding above it is nobody's business."""
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    vocab_size: int = 50257
    dropout: float = 0.0
    bias: bool = True
    gelu: str = 'tanh'  # as torch names it: GPT-2's; 'none' is the exact one, nanoGPT's

    @property
    def padded_vocab_size(self):
        """vocab_size rounded up to whole multiples of VOCAB_MULTIPLE."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Block(nn.Module):
    """A transformer layer in two halves, what comes before attention and what comes after."""

    def __init__(self, config):
        super().__init__()
        C, bias = config.n_embd, config.bias
        self.ln_1 = nn.LayerNorm(C, bias=bias)
        self.attn = nn.ModuleDict(dict(c_attn=nn.Linear(C, 3 * C, bias), c_proj=nn.Linear(C, C, bias)))
        self.ln_2 = nn.LayerNorm(C, bias=bias)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(C, 4 * C, bias), c_proj=nn.Linear(4 * C, C, bias)))
        # Not inside attention: there it costs a CPU three to six times as much as the rest of it.
        self.dropout, self.gelu = nn.Dropout(config.dropout), config.gelu

    def before(self, x):
        """(N, C) -> queries, keys and values (N, 3C)."""
        return self.attn.c_attn(self.ln_1(x))

    def after(self, x, y):
        """The stream x (N, C) and what attention found, y (N, C) -> the stream (N, C)."""
        x = x + self.dropout(self.attn.c_proj(y))
        h = F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate=self.gelu)
        return x + self.dropout(self.mlp.c_proj(h))


class GPT(nn.Module):
    """GPT-2 with a head tied to the token embedding."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, (config.n_embd, config.n_head)
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding.from_pretrained(torch.empty(config.padded_vocab_size, config.n_embd), freeze=False),
            wpe=nn.Embedding.from_pretrained(torch.empty(config.block_size, config.n_embd), freeze=False),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias)))
        self.unembed = None  # decoding.prepare puts a faster way to multiply by wte here
        for name, p in [] if self.device.type == 'meta' else self.named_parameters():
            # GPT-2's start: 0.02, and smaller where a layer adds to the stream, which 2 n_layer do.
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 0.02
                nn.init.normal_(p, std=std)
        with torch.no_grad():
            self.transformer.wte.weight[config.vocab_size:] = 0

    @property
    def device(self):
        """Where the weights are."""
        return self.transformer.wte.weight.device

    def body(self, idx, positions, attend):
        """idx, positions (N,) int64 -> (N, C), the stream after the last norm."""
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for layer, block in enumerate(self.transformer.h):
            x = block.after(x, attend(layer, block.before(x)))
        return self.transformer.ln_f(x)

    def head(self, x):
        """(..., C) -> logits (..., vocab_size); the padding rows are cut off."""
        logits = self.unembed(x) if self.unembed else F.linear(x, self.transformer.wte.weight)
        return logits[..., :self.config.vocab_size]

    def forward(self, idx):
        """Logits (B, T, vocab_size) of idx (B, T) int64, each row a text of its own."""
        B, T = idx.shape
        positions = torch.arange(T, device=idx.device).repeat(B)
        attend = DocumentAttention([(B, T)], self.config.n_head)
        return self.head(self.body(idx.reshape(-1), positions, attend)).view(B, T, -1)

    def loss(self, batch):
        """Summed cross-entropy in nats over the supervised tokens of a tokenfile.Batch.

        Sum, not mean: the caller divides once per optimizer step, by the tokens of all micro-batches
        and processes, so that each supervised token counts the same. Logits exist only for those.
        """
        idx, positions, at, targets = (torch.as_tensor(part, device=self.device) for part in
                                       (batch.idx, batch.positions, batch.at, batch.targets))
        x = self.body(idx, positions, DocumentAttention(batch.runs, self.config.n_head))
        return LinearCrossEntropy.apply(x[at], self.transformer.wte.weight, targets, self.config.vocab_size)

    def compile(self):
        """torch.compile the two halves of a layer: all layers share one compiled pair."""
        for block in self.transformer.h:
            block.before = torch.compile(block.before, dynamic=True)
            block.after = torch.compile(block.after, dynamic=True)

    def set_dropout(self, dropout):
        """Change the dropout of a model that was loaded."""
        self.config = replace(self.config, dropout=dropout)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout

    def add_tokens(self, pieces):
        """Give the tokens {id: ids of its pieces} the mean of their pieces' embeddings.

        A new row drawn at random wrecks a small GPT-2. The mean's first logit is the mean of theirs,
        and no other logit changes. The ids must follow the vocabulary, in order.
        """
        old = self.config.vocab_size
        assert sorted(pieces) == list(range(old, old + len(pieces))), (old, sorted(pieces))
        self.config = replace(self.config, vocab_size=old + len(pieces))
        rows = self.transformer.wte.weight.detach()
        rows = torch.cat([rows[:old], torch.stack([rows[ids].mean(0) for _, ids in sorted(pieces.items())])])
        rows = F.pad(rows, (0, 0, 0, self.config.padded_vocab_size - len(rows)))
        self.transformer.wte = nn.Embedding.from_pretrained(rows, freeze=False)


class DocumentAttention:
    """Causal attention within each document, over a stream that holds them one after another.

    runs: [(how many, length), …], documents of equal length side by side, so that each run is one
    dense call without mask or padding. What stands in the stream behind them gets zeros.
    """

    def __init__(self, runs, n_head):
        self.runs, self.n_head = runs, n_head
        self.sizes = [n * length for n, length in runs]
        self.cu_seqlens = None  # where each document starts, for CUDA; made when first needed

    def __call__(self, layer, qkv):
        """qkv (N, 3C) -> (N, C)."""
        N, C = len(qkv), qkv.shape[1] // 3
        if qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16):
            return self.varlen(qkv)
        padding = N - sum(self.sizes)
        out = []
        with torch.autocast(qkv.device.type, enabled=False):  # a CPU's kernel is faster in float32 than in bfloat16
            for (n, length), part in zip(self.runs, qkv.float().split(self.sizes + [padding])):
                q, k, v = part.view(n, length, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (n, n_head, length, C / n_head)
                out.append(y.transpose(1, 2).reshape(n * length, C))
        return torch.cat(out + [qkv.new_zeros(padding, C)] if padding else out)

    def varlen(self, qkv):
        """The same by FlashAttention's variable-length kernel: one call for all documents."""
        from torch.nn.attention.varlen import varlen_attn
        if self.cu_seqlens is None:
            lengths = [length for n, length in self.runs for _ in range(n)]
            starts = torch.tensor([0] + lengths).cumsum(0)
            if starts[-1] < len(qkv):
                lengths.append(len(qkv) - int(starts[-1]))  # padding is a document of its own
                starts = torch.cat([starts, torch.tensor([len(qkv)])])
            self.cu_seqlens, self.longest = starts.to(qkv.device, torch.int32), max(lengths)
        q, k, v = (part.contiguous() for part in qkv.view(len(qkv), 3, self.n_head, -1).unbind(1))
        return varlen_attn(q, k, v, self.cu_seqlens, self.cu_seqlens, self.longest, self.longest,
                           window_size=(-1, 0)).reshape(len(qkv), -1)


# ---- weights in and out of transformers' form ----

# What transformers' GPT-2 keeps as (in, out) and torch's Linear as (out, in).
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')


def from_transformers(config, weights, dropout=0.0):
    """A GPT with the weights of transformers' GPT-2: config.json as a dict, {name: tensor}.

    Older files have no 'transformer.' before the names, or carry mask buffers and the tied head;
    neither matters. UserError for a model that is no GPT-2, or not the kind this code computes.
    """
    expected = {'model_type': 'gpt2', 'n_inner': None, 'scale_attn_weights': True, 'layer_norm_epsilon': 1e-5,
                'scale_attn_by_inverse_layer_idx': False, 'tie_word_embeddings': True}
    for key, value in expected.items():
        if config.get(key, value) != value and not (key == 'n_inner' and config[key] == 4 * config['n_embd']):
            raise UserError(f'its config.json has {key}={config[key]!r}; this code computes GPT-2 with {value!r}.')
    gelu = config.get('activation_function', 'gelu_new')
    if not isinstance(gelu, str) or gelu not in GELUS:
        raise UserError(f'its config.json has activation_function={gelu!r}; expected gelu_new or gelu.')
    try:
        shape = {key: config[key] for key in ('n_layer', 'n_head', 'n_embd', 'vocab_size')}
        block_size = config.get('n_positions', config.get('n_ctx'))
        weights = {('' if name.startswith('transformer.') else 'transformer.') + name: tensor
                   for name, tensor in weights.items()}
        with torch.device('meta'):
            model = GPT(GPTConfig(**shape, block_size=block_size, dropout=dropout, gelu=GELUS[gelu]))
        state = {}
        for name, p in model.state_dict().items():
            tensor = weights[name].float()
            if name.endswith(TRANSPOSED):
                tensor = tensor.t()  # not moved here: a third of the time from the command to the first token
            if name == 'transformer.wte.weight':
                tensor = F.pad(tensor, (0, 0, 0, p.shape[0] - tensor.shape[0]))
            if tensor.shape != p.shape:
                raise UserError(f'its weight {name} is {tuple(tensor.shape)}, expected {tuple(p.shape)}.')
            state[name] = tensor
    except (KeyError, TypeError, AssertionError, RuntimeError) as error:
        raise UserError(f'it is not a GPT-2 of transformers: {type(error).__name__} {error}.') from None
    model.load_state_dict(state, assign=True)
    return model


def to_transformers(model):
    """(config.json as a dict, {name: tensor}) that transformers' GPT2LMHeadModel loads."""
    c = model.config
    config = {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], 'n_layer': c.n_layer,
              'n_head': c.n_head, 'n_embd': c.n_embd, 'n_positions': c.block_size, 'n_ctx': c.block_size,
              'vocab_size': c.vocab_size, 'activation_function': 'gelu_new' if c.gelu == 'tanh' else 'gelu', 'layer_norm_epsilon': 1e-5,
              'tie_word_embeddings': True}
    weights = {}
    for name, tensor in model.state_dict().items():
        if name == 'transformer.wte.weight':
            tensor = tensor[:c.vocab_size]
        weights[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).detach().cpu().contiguous().clone()
    for name, p in list(weights.items()):
        if name.endswith('.weight') and not c.bias and not name.endswith(('wte.weight', 'wpe.weight')):
            size = p.shape[1] if name.endswith(TRANSPOSED) else p.shape[0]
            weights[name[:-6] + 'bias'] = torch.zeros(size)  # a model without biases is one of zeros
    return config, weights


# ---- where and how to compute ----

def pick_device(name):
    """'auto' -> cuda, mps or cpu, whichever is there; UserError for one that is not."""
    there = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    kind = next(k for k in there if there[k]) if name == 'auto' else name.split(':')[0]
    if not there.get(kind):
        raise UserError(f'device={name!r} is not on this machine; it has '
                        f'{", ".join(k for k in there if there[k])}. Use --device=auto.')
    return kind if name == 'auto' else name


def pick_dtype(name, device):
    """'auto' -> bfloat16 where the hardware computes in it, else float16 on CUDA, else float32."""
    kind = device.split(':')[0]
    if name == 'auto':
        if kind == 'cuda':
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        fast = kind == 'cpu' and (torch.cpu.get_capabilities().get('avx512_bf16') or torch.cpu.get_capabilities().get('amx_bf16'))
        return torch.bfloat16 if fast else torch.float32
    if name == 'float16' and kind != 'cuda':
        raise UserError(f'dtype=float16 needs a CUDA device, found {kind}. Use --dtype=auto.')
    return getattr(torch, name)


def autocast(device, dtype):
    """The context to compute in: weights stay float32, matrix products are of dtype."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.split(':')[0], dtype)
