"""A page about a prepared data set: what the model will learn, and what was left out.

    python data/oasst/prepare.py --report
    python data/report.py --folder=data/oasst       # of a folder that is prepared already

Everything is read back from the token files and meta.json; the page needs nothing from outside.
"""
import codecs
import html
import os
import sys
from dataclasses import dataclass

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import configurator
from core import tokenfile
from core import tokenizer as tokenizers
from configurator import UserError

SHOWN = 20  # conversations
BARS = 40  # in the histogram, at most

# Why a conversation is left out, as prepare.py names it.
REASONS = {
    'language': 'a message is in a language that --lang leaves out',
    'deleted': 'a message was deleted by its author or a moderator',
    'review_result': 'a message did not pass review',
    'empty text': 'a message has no text',
    'synthetic': 'a model wrote a message, and --synthetic=False leaves such out',
    'roles': 'user and assistant do not take turns',
    'top_k': 'the reply is not among the best --top_k',
    'repeated': 'the same was there before',
    'too long': 'no whole answer fits into max_tokens',
    'template heading': 'a message contains a heading of the template',
    'cannot be encoded': 'a text that no ids can stand for',
    'half a surrogate pair': 'a text that no ids can stand for',
    'empty output': 'there is nothing to learn',
    'empty instruction': 'there is no question'}


@dataclass(frozen=True)
class Config:
    folder: str = 'data/oasst'  # with the token files; report.html goes there
    seed: int = 1337            # of the conversations that are shown


# ---- the look, of this page and of evaluate.py's ----

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent);
  --soft: color-mix(in srgb, currentColor 6%, transparent) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem }
h2 { font-size: 1.15rem; margin-top: 2.5rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right }
td:first-child, th:first-child { text-align: left; padding-left: 0; min-width: 9rem }
@media (max-width: 40rem) { table { font-size: .85rem } td, th { padding: .3rem .4rem } }
footer, .note { color: color-mix(in srgb, currentColor 70%, transparent); font-size: .9rem }
"""


def document(title, parts, style=''):
    """A whole HTML page of the parts, one below the other."""
    head = ('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>{html.escape(title)}</title><style>{STYLE}{style}</style>')
    return '\n'.join([f'<!doctype html><html lang="en"><head>{head}</head><body>', *parts, '</body></html>\n'])


OWN_STYLE = """
:root { --learned: light-dark(#c3ecd2, #14532f); --bar: light-dark(#2a9d5c, #3fb878); --rest: light-dark(#cfd6dd, #47525e);
  --edge: color-mix(in srgb, currentColor 14%, transparent) }
h1 { margin-bottom: .2rem }
h1 + .note { margin-top: 0; overflow-wrap: anywhere }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1.5rem 0 }
.figures div { background: var(--soft); border-radius: .6rem; padding: .7rem .9rem }
.figures b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums }
.figures span { font-size: .85rem; opacity: .75 }
svg { display: block; width: 100%; height: 13rem; border-bottom: 1px solid var(--line) }
rect { fill: var(--rest) }
rect.on { fill: var(--bar) }
g:hover { opacity: .75 }
.axis { position: relative; height: 1.6rem; font-size: .8rem; opacity: .75; font-variant-numeric: tabular-nums }
.axis span { position: absolute; transform: translateX(-50%); padding-top: .2rem }
.axis span:first-child { transform: none }
.axis span[style*=':100'] { transform: translateX(-100%) }
.key { display: inline-block; width: .85em; height: .85em; border-radius: .2em; vertical-align: -.05em; margin-right: .4em;
  background: var(--rest) }
.key.on { background: var(--bar) }
.key.learned { background: var(--learned); outline: 1px solid var(--line) }
.key:not(:first-child) { margin-left: .6em }
table { width: 100% }
td { vertical-align: baseline }
td small { display: block; opacity: .7; font-size: .85em; max-width: 34rem }
td:last-child, th:last-child { padding-right: 0 }
td:has(.bar) { width: 34%; vertical-align: middle }
.bar { display: block; background: var(--soft); border-radius: .3rem }
.bar span { display: block; height: .55rem; border-radius: .3rem; background: var(--bar); min-width: 2px }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 0 3rem; align-items: start }
@media (max-width: 40rem) { td:first-child, th:first-child { min-width: 0 } td:has(.bar) { width: 22% } }
details { border-top: 1px solid var(--line); padding: .7rem 0 }
summary { cursor: pointer; font-size: .85rem; opacity: .75; font-variant-numeric: tabular-nums }
.ids { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; padding: .5rem 0 }
.ids > * { font: inherit; text-decoration: none; box-shadow: inset 1px 0 var(--edge); padding: .1em 0; border-radius: .15em }
.ids b { background: var(--learned) }
.ids .tag { font: .8em/1 ui-monospace, monospace; border: 1px solid var(--line); box-shadow: none; border-radius: .4em;
  padding: .1em .35em; margin: 0 .15em; unicode-bidi: isolate }
.ids s { text-decoration: none; opacity: .4 }
"""


# ---- the parts ----

def share(part, whole):
    """A share as text."""
    return f'{part / whole:.1%}' if whole else '–'


def figures(pairs):
    """Large numbers with what they count."""
    return '<div class="figures">' + ''.join(f'<div><b>{value}</b><span>{name}</span></div>' for value, name in pairs) + '</div>'


def table(rows, heads=()):
    """A table; its cells are HTML."""
    head = f'<thead><tr>{"".join(f"<th>{name}</th>" for name in heads)}</tr></thead>' if heads else ''
    body = ''.join(f'<tr>{"".join(f"<td>{cell}</td>" for cell in row)}</tr>' for row in rows)
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def shares(pairs, whole, reasons=None):
    """A table of names and numbers, the largest first, with the share of the whole, and a bar for that or the reason."""
    rows = []
    for name, n in sorted(pairs, key=lambda pair: -pair[1]):
        why = f'<small>{html.escape(reasons.get(name, ""))}</small>' if reasons else ''
        bar = () if reasons else (f'<span class="bar"><span style="width:{100 * n / max(1, whole):.2f}%"></span></span>',)
        rows.append((html.escape(name) + why, f'{n:,}', share(n, whole), *bar))
    return table(rows, ('', 'conversations', 'share', '')[:3 if reasons else 4])


def nice_numbers():
    """1, 2, 5, 10, 20, 50 …"""
    return (n * 10 ** k for k in range(18) for n in (1, 2, 5))


def histogram(lengths, supervised):
    """How many conversations are how long, as SVG; the coloured part of a bar is the share of their tokens that is supervised."""
    longest = int(lengths.max())
    end = min(longest, max(1, int(np.quantile(lengths, 0.995) * 1.5)))  # a few far longer ones stand in the last bar
    width = next(w for w in nice_numbers() if end // w < BARS)
    n_bars = end // width + 1
    at = np.minimum(lengths // width, n_bars - 1)
    counts, tokens, learned = (np.bincount(at, weights, n_bars) for weights in (None, lengths, supervised))
    parts = []
    for i, (n, total, part) in enumerate(zip(counts, tokens, learned)):
        if n:
            to = longest if i == n_bars - 1 else (i + 1) * width - 1
            parts.append(f'<g><title>{i * width:,} to {to:,} tokens: {int(n):,} conversations, {part / total:.0%} supervised</title>')
            for kind, height in (('off', 100 * n / counts.max()), ('on', 100 * n / counts.max() * part / total)):
                parts.append(f'<rect class="{kind}" x="{i + .06:.2f}" y="{100 - height:.2f}" width=".88" height="{height:.2f}"/>')
            parts.append('</g>')
    step = next(s for s in nice_numbers() if n_bars * width / s < 6)
    ticks = ''.join(f'<span style="left:{at / n_bars / width:.2%}">{at:,}</span>' for at in range(0, n_bars * width + 1, step))
    top = int(counts.argmax())
    remark = f'The highest bar: {int(counts[top]):,} conversations of {top * width:,} to {(top + 1) * width - 1:,} tokens.'
    if longest >= n_bars * width:
        remark += f' In the last one stand all longer ones, up to {longest:,}.'
    svg = f'<svg viewBox="0 0 {n_bars} 100" preserveAspectRatio="none" role="img" aria-label="How many are how long">{"".join(parts)}</svg>'
    return f'{svg}<div class="axis">{ticks}</div>' + note(
        '<span class="key on"></span>the share of their tokens that is supervised <span class="key"></span>the rest. ' + remark)


# What a browser would not show, or would turn round the rest of the line by; a line's end is shown and made.
_VISIBLE = {c: chr(0x2400 + c) for c in range(32)} | {10: '<s>↵</s>\n', 9: '<s>→</s>\t', 127: '␡'} | {
    c: f'<s>U+{c:04X}</s>' for c in (0x200e, 0x200f, *range(0x202a, 0x202f), *range(0x2066, 0x206a))}


def shown_tokens(ids, mask, tokenizer):
    """The conversation token by token, as HTML: supervised ones as <b>, others as <i>, tags as such.

    Tokens that only together make a character stand in one element; its title has the ids.
    """
    special = {i: piece for piece, i in tokenizer.special.items()}
    parts, held, decoder = [], [], codecs.getincrementaldecoder('utf-8')('replace')

    def put(text, more=''):
        kind, title = 'b' if held[0][1] else 'i', ' '.join(str(i) for i, _ in held)
        parts.append(f'<{kind}{more} title="{title}">{html.escape(text).translate(_VISIBLE)}</{kind}>')
        held.clear()

    for i, supervised in zip(ids.tolist(), mask.tolist()):
        if held and (i in special or supervised != held[0][1]):  # half a character ends here
            put(decoder.decode(b'', final=True))
            decoder.reset()
        held.append((i, supervised))
        if i in special:
            put(special[i], ' class="tag"')
        elif (text := decoder.decode(tokenizer.decode_bytes([i]))) and not decoder.getstate()[0]:
            put(text)
    if held:
        put(decoder.decode(b'', final=True))
    return ''.join(parts)


def conversations(split, tokenizer, seed):
    """SHOWN conversations of the split, drawn by seed."""
    chosen = np.random.default_rng(seed).choice(len(split), min(SHOWN, len(split)), replace=False)
    parts = []
    for i in sorted(chosen.tolist()):
        ids, mask = split[i]
        parts.append(f'<details open><summary>{split.name} {i:,} · {len(ids):,} tokens, {int(mask.sum()):,} supervised</summary>'
                     f'<div class="ids" dir="auto">{shown_tokens(ids, mask, tokenizer)}</div></details>')
    return ''.join(parts)


# ---- the page ----

def section(title, *parts):
    """A heading and what stands under it."""
    return f'<h2>{html.escape(title)}</h2>' + ''.join(parts)


def beside(*sections):
    """Sections side by side, where there is room."""
    return '<div class="two">' + ''.join(f'<div>{part}</div>' for part in sections) + '</div>'


def note(text):
    """A remark; the text is HTML."""
    return f'<p class="note">{text}</p>'


def page(folder, seed):
    """The page about a prepared folder, as text. UserError for a folder that is none."""
    meta, e = tokenfile.read_meta(folder), lambda value: html.escape(str(value))
    tokenizer = tokenizers.from_state({'tags': True, **meta['tokenizer']})
    splits = [tokenfile.Split([folder], name, vocab_size=tokenizer.vocab_size) for name in meta['splits']]
    splits = [split for split in splits if len(split)]
    if not splits:
        raise UserError(f'{folder} holds no conversations. Prepare it again.')
    lengths, supervised = (np.concatenate([getattr(split, name) for split in splits]) for name in ('lengths', 'n_supervised'))
    kept, seen, n_tokens = len(lengths), meta.get('seen', len(lengths)), int(lengths.sum())
    source, options = meta.get('source', {}), meta.get('options', {})
    name = source.get('name') or os.path.basename(os.path.abspath(folder))
    about = [source.get('licence') and f"licence {source['licence']}", source.get('url'), f"template {meta['template']}",
             f"vocabulary {meta['tokenizer']['name']}"]
    parts = [f'<h1>{e(name)}</h1>', note(e(' · '.join(part for part in about if part))), figures([
        (f'{kept:,}', f'conversations kept of {seen:,}'), (f'{n_tokens:,}', 'tokens'),
        (share(int(supervised.sum()), n_tokens), 'of the tokens are supervised'),
        (f'{int(np.median(lengths)):,}', 'tokens, the median'), (f'{int(lengths.max()):,}', 'tokens, the longest')])]
    parts.append(section('How long they are, in tokens', histogram(lengths, supervised)))

    held = [(size, int((lengths - 1 <= size).sum())) for size in (128, 256, 512, 1024)]
    held = [(f'{size:,}\u00a0positions', n) for i, (size, n) in enumerate(held) if not i or held[i - 1][1] < kept]
    rows = [(e(split.name), f'{len(split):,}', f'{split.lengths.sum():,}', share(split.n_supervised.sum(), split.lengths.sum()))
            for split in splits]
    rule = f"By {meta.get('split_rule', 'a rule that is not noted')}, seed {meta.get('seed', '–')}."
    parts.append(beside(section('What a row can hold', shares(held[::-1], kept)),
                        section('Splits', table(rows, ('', 'conversations', 'tokens', 'supervised')), note(e(rule)))))

    dropped = [(reason, n) for reason, n in meta.get('dropped', {}).items() if n]
    also = {'truncated': 'kept ones lost turns at their end, to fit max_tokens', 'broken_lines': 'lines of the source were broken'}
    parts.append(section('What was left out', shares(dropped, seen, REASONS) if dropped else '<p>No conversation.</p>',
                         *(note(f'{meta[key]:,} {what}.') for key, what in also.items() if meta.get(key))))

    languages = sorted(meta.get('languages', {}).items(), key=lambda pair: -pair[1])
    if others := sum(n for _, n in languages[12:]):
        languages[12:] = [('others', others)]
    counts = [(e(what.strip()), f'{n:,}') for what, n in meta.get('counts', {}).items()]
    parts.append(beside(section('Languages', shares(languages, kept) if languages else '<p>The source does not say.</p>'),
                        section('What the source held', table(counts))))

    how = ['<span class="key learned"></span>what the assistant must produce, and is learned. The rest is only read.',
           'An answer that several threads share is learned in one of them.' if options.get('turns') == 'all' else '',
           f'A hairline stands between tokens; their ids show when pointed at. Drawn with seed {seed}.']
    parts.append(section(f'{min(SHOWN, len(splits[0]))} conversations, token by token', note(' '.join(how)),
                         conversations(splits[0], tokenizer, seed)))
    parts.append(f"<footer><p>{e(', '.join(f'{key}={value!r}' for key, value in options.items()))}</p></footer>")
    return document(f'{name}: what the model will learn', parts, OWN_STYLE)


def write(folder, seed):
    """Write FOLDER/report.html; its path."""
    path = os.path.join(folder, 'report.html')
    try:
        text = page(folder, seed)
        with open(path, 'w', encoding='utf-8', errors='xmlcharrefreplace') as file:
            file.write(text)
    except OSError as error:
        raise UserError(f'could not write {path}: {error.strerror}.') from None
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:  # a stranger's meta.json
        raise UserError(f'meta.json in {folder} cannot be shown ({type(error).__name__}: {error}). Prepare it again.') from None
    return path


def main(argv):
    """The script."""
    config = configurator.load(Config, argv)
    print(f'what the model will learn, to look at: {write(config.folder, config.seed)}')


if __name__ == '__main__':
    configurator.run(main)
