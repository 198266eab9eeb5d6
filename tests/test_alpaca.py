"""Instruction data: golden ids, quirks, splits, the streamed array, and the three recipes end to end."""
import hashlib
import http.server
import json
import os
import resource
import threading
import tracemalloc

import numpy as np
import pytest
import tiktoken

from core import conversation
from core import tokenfile
from configurator import UserError
from conftest import ROOT, SHARED
from data import download
from data.alpaca import prepare

WORDS = 'red green blue one two three sun moon star river mountain sea'.split()
ROWS = [{'instruction': f'Name a thing that is {WORDS[i % 12]} and {WORDS[i * 5 % 7]}', 'input': '',
         'output': f'It is {i}.'} for i in range(100)]


@pytest.fixture
def run(tmp_path, vocabulary):
    """run(rows or text, flag=value, …) -> meta.json of the folder tmp_path/data/mine, prepared in this process."""
    def prepare_rows(rows, **flags):
        path = tmp_path / 'rows.json'
        path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding='utf-8')
        flags = {'tokenizer': vocabulary, 'input': path, 'out_dir': tmp_path / 'data' / 'mine', **flags}
        prepare.main([f'--{key}={value}' for key, value in flags.items()])
        return tokenfile.read_meta(str(flags['out_dir']))
    return prepare_rows


def conversations(folder, split, bpe, template='alpaca'):
    """The conversations of a split, read back from its ids."""
    opened = tokenfile.Split([str(folder)], split)
    return [conversation.decode(*opened[i], bpe, template) for i in range(len(opened))]


def real(name):
    """The path of a published file; skips where it is not there."""
    path = os.path.join(SHARED, 'data', 'alpaca', name)
    if not os.path.exists(path):
        pytest.skip(f'{name} is not in {os.path.dirname(path)}')
    return path


# What is learned stands after the two bars.
WITH_INPUT = '''\
Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.

### Instruction:
Identify the correct spelling of the following word.

### Input:
Ocassion

### Response:
||The correct spelling is 'Occasion.'<|endoftext|>'''
WITHOUT_INPUT = '''\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
What is an antonym of 'complicated'?

### Response:
||An antonym of 'complicated' is 'simple'.<|endoftext|>'''


def check_golden(ids, mask, text):
    """The ids are those of the whole text, and the mask is 1 from the bars to the end."""
    prompt, response = text.split('||')
    bpe = tiktoken.get_encoding('gpt2')
    expected = bpe.encode(prompt + response, allowed_special='all')
    assert ids.tolist() == expected
    assert mask.tolist() == [0] * len(bpe.encode(prompt)) + [1] * len(bpe.encode(response, allowed_special='all'))
    assert ids[-1] == 50256 and ids.tolist().count(50256) == 1


def test_golden_ids(run, tmp_path, gpt2):
    """The two Stanford prompts, written out; the first end-of-text is learned and nothing follows it."""
    rows = [{'instruction': 'Identify the correct spelling of the following word.', 'input': 'Ocassion',
             'output': "The correct spelling is 'Occasion.'"},
            {'instruction': "What is an antonym of 'complicated'?", 'input': '',
             'output': "An antonym of 'complicated' is 'simple'."}]
    run(rows, tokenizer='gpt2', val_fraction=0)
    split = tokenfile.Split([str(tmp_path / 'data' / 'mine')], 'train')
    check_golden(*split[0], WITH_INPUT)
    check_golden(*split[1], WITHOUT_INPUT)
    batch = tokenfile.make_batch(split, [0, 1])
    assert (batch.targets == 50256).sum() == 2 and (batch.idx == 50256).sum() == 0


def test_the_book(run, tmp_path, capsys, gpt2):
    """The 1,100: 935/55/110 by position, its leaks counted; by hash there are none."""
    meta = run(ROWS, tokenizer='gpt2', input=real('instruction-data.json'), split='85/10/5')
    sizes = {name: counts['conversations'] for name, counts in meta['splits'].items()}
    assert sizes == {'train': 935, 'val': 55, 'test': 110} and meta['seen'] == meta['kept'] == 1100
    assert meta['prompts'] == {'rows_repeating_a_prompt': 25, 'also_in_train': {'val': 4, 'test': 2}}
    assert meta['source']['licence'] == 'Apache-2.0' and meta['source']['name'] == 'instruction-data'
    assert 'in train too of 4 rows of val and 2 rows of test' in capsys.readouterr().out
    split = tokenfile.Split([str(tmp_path / 'data' / 'mine')], 'train')
    check_golden(*split[50], WITH_INPUT)
    check_golden(*tokenfile.Split([str(tmp_path / 'data' / 'mine')], 'test')[999 - 935], WITHOUT_INPUT)
    meta = run(ROWS, tokenizer='gpt2', input=real('instruction-data.json'), test_fraction=0.1)
    assert meta['prompts'] == {'rows_repeating_a_prompt': 25, 'also_in_train': {'val': 0, 'test': 0}}
    assert 60 < meta['splits']['test']['conversations'] < 160


def test_stanford(run, tmp_path, capsys, gpt2):
    """All 52,002 rows: every one kept or dropped for a reason, in less than 10 s of two cores."""
    before = [sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    meta = run(ROWS, tokenizer='gpt2', input=real('alpaca_data.json'))
    after = [sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    assert sum(after) - sum(before) < 20, 'seconds of all cores'
    assert meta['seen'] == 52002 and meta['dropped'] == {'empty output': 28, 'too long': 2}
    assert meta['kept'] == 52002 - 30 and meta['counts'] == {'rows': 52002, '  input that means none': 676}
    assert meta['source']['licence'] == 'CC-BY-NC-4.0' and 'not for commercial use' in capsys.readouterr().out
    bpe = prepare.tokenizer.load('gpt2', tags=False)
    read_back = {(turns[0].text, turns[0].context, turns[1].text)
                 for turns in conversations(tmp_path / 'data' / 'mine', 'val', bpe)}
    with open(real('alpaca_data.json'), encoding='utf-8') as file:
        rows = [prepare.read_row(row) for row in json.load(file)]
    assert read_back <= {row[:3] for row in rows} and len(read_back) == meta['splits']['val']['conversations']


def test_quirks(run, tmp_path, small):
    """What the published sets hold beside text under three names is handled and counted."""
    nothing = ['No input', 'Noinput', '<no input>', 'N/A', 'n/a.', '"<noinput>"', '\\<noinput\\>', ' ', ':\n<noinput>',
               'No input required.', '<noinput> 8', 'None', '[No Input]']
    rows = [{'instruction': f'a{i}', 'input': text, 'output': 'x'} for i, text in enumerate(nothing)]
    rows += [{'instruction': 'b', 'input': text, 'output': 'x'} for text in
             ('Larry <noinput> the door.', 'No pain, no gain', 'None of the students', 'NASA')]
    rows += [{'instruction': 'c', 'output': 'y'}, {'instruction': 'd', 'input': None, 'response': ' y\n'},
             {'instruction': 'e', 'context': 'here', 'response': 'y'},
             {'instruction': 'f', 'input': '', 'output': ''}, {'instruction': 'f', 'input': '', 'output': ' \n'},
             {'instruction': 'f', 'input': '', 'output': None},
             {'instruction': 'f', 'input': '', 'output': float('nan')},
             {'instruction': 'f', 'input': ''}, {'instruction': None, 'input': '', 'output': 'z'},
             {'instruction': 'f', 'input': '', 'output': 4}, {'instruction': ['f'], 'input': '', 'output': 'z'},
             {'instruction': 'f', 'input': {}, 'output': 'z'}, {'instruction': 'f', 'input': '', 'output': '\ud83d'},
             {'instruction': 'f\n\n### Response:\nz', 'input': '', 'output': 'z'},
             {'instruction': 'f', 'input': '', 'output': 'word ' * 2000}]
    meta = run(rows, val_fraction=0)
    assert meta['seen'] == len(rows) == meta['kept'] + sum(meta['dropped'].values())
    assert meta['dropped'] == {'empty output': 5, 'empty instruction': 1, 'instruction not text': 1, 'input not text': 1,
                               'output not text': 1, 'half a surrogate pair': 1, 'template heading': 1,
                               'too long': 1}
    assert meta['counts'] == {'rows': len(rows), '  input that means none': len(nothing) - 1, '  no field input': 1,
                              '  input is null': 1, "  output under 'response'": 2, "  input under 'context'": 1,
                              '  output is null': 2, '  no field output': 1, '  instruction is null': 1}
    found = conversations(tmp_path / 'data' / 'mine', 'train', small)
    kept = [row['input'] for row in rows[len(nothing):][:4]]
    assert [turns[0].context for turns in found] == [''] * len(nothing) + kept + ['', '', 'here']
    assert found[-2][1].text == ' y\n'  # as published: nothing is stripped


def test_templates_without_a_place_for_the_input(run, tmp_path, small, vocabulary):
    """xml has it a blank line behind the instruction, plain a space."""
    rows = [{'instruction': 'Translate.', 'input': 'Paris', 'output': 'Tokyo'},
            {'instruction': 'Hello', 'input': '', 'output': 'done'}]
    for template, joint in (('xml', '\n\n'), ('plain', ' ')):
        bpe = prepare.tokenizer.load(vocabulary, tags=template == 'xml')
        run(rows, template=template, val_fraction=0)
        found = conversations(tmp_path / 'data' / 'mine', 'train', bpe, template)
        texts = [[turn.text for turn in turns] for turns in found]
        assert texts == [[f'Translate.{joint}Paris', 'Tokyo'], ['Hello', 'done']]
    ids, _ = tokenfile.Split([str(tmp_path / 'data' / 'mine')], 'train')[0]
    assert bpe.decode(ids) == 'Translate. Paris Tokyo<|endoftext|>'


def test_forms_agree(run, tmp_path):
    """An array, pretty or not, and lines, with a byte order mark or blank lines, give the same files."""
    lines = [json.dumps(row) for row in ROWS]
    forms = [json.dumps(ROWS), json.dumps(ROWS, indent=4), '\ufeff \n' + json.dumps(ROWS) + '\n', '\n'.join(lines),
             '\ufeff' + '\n\n'.join(lines) + '\n']
    assert len({json.dumps(run(form)['splits']) for form in forms}) == 1


def test_broken_rows(run, capsys):
    """A few broken lines are named and counted; more than 1 % are refused, as is a file of something else."""
    text = '\n'.join(json.dumps(ROWS[i % 100] | {'input': str(i)}) for i in range(300))
    meta = run(text + '\n{"instruction": "f\n[1]\n')
    assert meta['broken_lines'] == 2 and meta['seen'] == 300
    assert 'broken line 301: not JSON' in capsys.readouterr().err
    assert run(json.dumps(ROWS + ['x']))['broken_lines'] == 1
    assert 'broken row 101: found a str, expected an object' in capsys.readouterr().err
    with pytest.raises(UserError, match='2 of 102 lines are broken.*Nothing was written'):
        run(json.dumps(ROWS + [1, None]))
    with pytest.raises(UserError, match='no row can be used; the first has the keys prompt, answer'):
        run([{'prompt': 'f', 'answer': 'g'}] * 3)
    with pytest.raises(UserError, match=r'the first has the keys a\\nb\.'):  # in one line; found by the fuzzer
        run([{'a\nb': 'g'}])
    with pytest.raises(UserError, match='no conversation was kept of 0 seen'):
        run('[]')


@pytest.mark.parametrize('text, message', [
    ('[{"output": 1}, {"output": "x', 'row 2, at character 28: Unterminated string'),
    ('[{"output": 1}, {"output": "x"}', 'row 2, at character 32: the file ends here'),
    ('[{"output": 1} {"output": "x"}]', 'row 1, at character 16: Expecting , or ]'),
    ('[{"output": 1 "input": 2},' + ' ' * 99 + ']', "row 1, at character 15: Expecting ',' delimiter"),
    ('[{"output": 1},]', 'row 2, at character 16: Expecting value'),
    ('[{"output": "a\nb"}]', 'row 1, at character 15: Invalid control character'),
    ('[' * 99999, 'row 1, at character 2: maximum recursion depth'),
    ('[{"output": 1}][', 'something follows the end of the JSON array'),
])
def test_broken_array(run, tmp_path, text, message):
    """A broken array is refused in one line that says where, and nothing is written."""
    with pytest.raises(UserError) as error:
        run(text)
    assert message in str(error.value) and '\n' not in str(error.value) and 'Nothing was written' in str(error.value)
    assert not (tmp_path / 'data').exists()


def test_array_of_other_bytes(run, tmp_path):
    """UTF-16, for one."""
    (tmp_path / 'other.json').write_bytes(b'[{"output": "\xe9"}]')
    with pytest.raises(UserError, match='not UTF-8 from about byte 13 on'):
        run(ROWS, input=tmp_path / 'other.json')


def test_array_at_every_block_size(tmp_path, monkeypatch):
    """Wherever a block ends, the elements are those that json reads, and a cut array is refused."""
    rows = [{'a': 'x"\\é€🙂\n],[{', 'b': [1, -2.5e3, {'c': None}], 'd': ''}, 12, 0.952308, True, 'é', float('inf'), [], {}]
    path = tmp_path / 'rows.json'
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False)):
        path.write_text(text, encoding='utf-8')
        for block in (1, 2, 3, 5, 17, 1000):
            monkeypatch.setattr(prepare, 'BLOCK', block)
            assert list(prepare.read_array(path)) == rows
        for cut in range(len(text) - 1):
            path.write_text(text[:cut], encoding='utf-8')
            with pytest.raises(UserError, match='the JSON array is broken in row'):
                list(prepare.read_array(path))


def test_array_is_streamed(tmp_path):
    """20 MB in rows of 10 KB, on one line, take a few blocks of memory."""
    path = tmp_path / 'rows.json'
    path.write_text('[' + ', '.join([json.dumps({'output': 'x' * 10_000})] * 2000) + ']')
    tracemalloc.start()
    n = sum(1 for _ in prepare.read_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 2000 and peak < 8 << 20, f'{peak:,} bytes'


def test_a_long_row_is_not_read_anew_for_every_block(tmp_path, monkeypatch):
    path = tmp_path / 'rows.json'
    path.write_text('[[' + '[],' * 100_000 + '[]], 5]')  # 300 KB: 300 blocks, which come to no more than 10 readings
    n_read = []
    decode = json.JSONDecoder.raw_decode
    monkeypatch.setattr(json.JSONDecoder, 'raw_decode', lambda *arguments: n_read.append(1) or decode(*arguments))
    monkeypatch.setattr(prepare, 'BLOCK', 1000)
    assert list(prepare.read_array(path)) == [[[]] * 100_001, 5] and len(n_read) < 15


def test_split_by_hash_keeps_prompts_together(run, tmp_path, small):
    """The same prompt in another case or spacing, with another answer, stands in the same split."""
    rows = [{'instruction': text, 'input': '', 'output': f'{text} {i}'} for i in range(3) for row in ROWS
            for text in (row['instruction'], row['instruction'].upper().replace(' ', '  '))]
    meta = run(rows, val_fraction=0.3, test_fraction=0.2)
    folder = tmp_path / 'data' / 'mine'
    prompts = {name: {prepare.normalised_prompt(prepare.Row(turns[0].text, '', '', '', []))
                      for turns in conversations(folder, name, small)} for name in meta['splits']}
    assert all(prompts.values()) and sum(map(len, prompts.values())) == len(set.union(*prompts.values()))
    assert meta['prompts']['also_in_train'] == {'val': 0, 'test': 0} and meta['split_rule'].startswith('hash')
    again = run(rows + [{'instruction': 'one more', 'input': '', 'output': 'z'}], val_fraction=0.3, test_fraction=0.2)
    more = sum(again['splits'][name]['conversations'] - meta['splits'][name]['conversations'] for name in meta['splits'])
    moved = {name: {turns[1].text for turns in conversations(folder, name, small)} for name in meta['splits']}
    assert more == 1 and again['splits']['val']['conversations'] - meta['splits']['val']['conversations'] in (0, 1)
    assert not moved['train'] & moved['val']


def test_dedup(run):
    """Dropped is a row whose prompt and answer both stood before; the same prompt with another answer stays."""
    rows = [ROWS[0], ROWS[1], ROWS[0], ROWS[0] | {'output': 'other'}, ROWS[0] | {'input': '<noinput>'},
            ROWS[0] | {'instruction': ROWS[0]['instruction'].upper()}]
    meta = run(rows)
    assert meta['kept'] == 6 and meta['prompts']['rows_repeating_a_prompt'] == 4
    meta = run(rows, dedup='true')
    assert meta['dropped'] == {'repeated': 3} and meta['kept'] == 3 and meta['seen'] == 6


def test_shuffled_split(run, tmp_path, small):
    """The rows that datasets' shuffle(42) puts first are trained on, the next are val, the rest test."""
    rows = [ROWS[0] | {'output': str(i)} for i in range(100)]
    run(rows, shuffle_seed=42, train_rows=60, val_rows=10)
    order = np.random.default_rng(42).permutation(100).tolist()  # as in datasets' arrow_dataset.py, Dataset.shuffle
    assert order[:5] == [59, 21, 56, 18, 33]
    for name, part in (('train', order[:60]), ('val', order[60:70]), ('test', order[70:])):
        found = conversations(tmp_path / 'data' / 'mine', name, small)
        assert [int(turns[1].text) for turns in found] == sorted(part)
    run(rows, shuffle_seed=42, split='85/10/5')
    found = conversations(tmp_path / 'data' / 'mine', 'test', small)
    assert [int(turns[1].text) for turns in found] == sorted(order[85:95])


@pytest.mark.parametrize('flags, message', [
    ({'source': 'dolly'}, "source='dolly': expected one of alpaca, alpaca-cleaned, instruction-data, open-instruct"),
    ({'template': 'dialogpt'}, "template='dialogpt': expected one of alpaca, xml, plain"),
    ({'split': '85/10'}, "split='85/10': expected three percentages, train/test/val, that make 100"),
    ({'split': '85/10/6'}, 'that make 100'), ({'split': '90/20/-10'}, 'that make 100'),
    ({'split': '85/10/5', 'train_rows': 5}, 'two ways'), ({'shuffle_seed': 42}, 'add --split=85/10/5 or --train_rows=N'),
    ({'split': '85/10/5', 'test_fraction': 0.1}, 'test_fraction belongs to the split by hash'),
    ({'val_fraction': 0.5, 'test_fraction': 0.5}, 'together below 1'), ({'max_tokens': 4}, '16 or more'),
    ({'train_rows': -1}, 'must not be negative'), ({'train_rows': 95}, 'val_rows=1000 are more than the 100 rows'),
    ({'out_dir': ''}, 'none of the pinned files: say where'), ({'input': 'no/such.json'}, 'No such file'),
])
def test_mistakes(run, flags, message):
    """Each mistake is one sentence that says what to do."""
    with pytest.raises(UserError) as error:
        run(ROWS, **flags)
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('sha256', ['right', 'wrong'])
def test_download_of_unknown_size(tmp_path, sha256):
    """Where no exact size is pinned the hash decides."""
    body = b'[]' * 1000

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path, url = str(tmp_path / 'f.json'), f'http://127.0.0.1:{server.server_port}/f.json'
    try:
        if sha256 == 'right':
            digest = hashlib.sha256(body).hexdigest()
            assert download.download(url, path, None, digest) == download.download(url, path, None, digest) == path
            with open(path, 'rb') as file:
                assert file.read() == body
        else:
            with pytest.raises(UserError, match='gave a wrong file .sha256 .* expected 00.; it was deleted'):
                download.download(url, path, None, '00')
            assert os.listdir(tmp_path) == []
    finally:
        server.shutdown()
        server.server_close()


def test_pins_are_whole():
    """Every source is pinned to a commit and has a hash, a licence and a recipe that exists."""
    for name, pin in prepare.SOURCES.items():
        assert any(len(part) == 40 for part in pin['url'].split('/')) and len(pin['sha256']) == 64, name
        assert pin['licence'] and os.path.exists(os.path.join(ROOT, pin['next'].split()[0])), name


def save_model(folder, as_on_the_hub):
    """A tiny GPT-2 with GPT-2's vocabulary, as transformers saves it, or as DialoGPT lies on the hub."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=1024))
    model.save_pretrained(folder)
    if as_on_the_hub:
        os.remove(folder / 'model.safetensors')
        state = {key: value.clone() for key, value in model.state_dict().items()}
        causal = torch.ones(1, 1, 1024, 1024, dtype=torch.uint8).tril()
        state |= {f'transformer.h.{i}.attn.bias': causal for i in range(2)}
        torch.save(state, folder / 'pytorch_model.bin')


@pytest.mark.parametrize('name, flags', [
    ('instruction_data', {'split': '85/10/5'}), ('alpaca', {'max_tokens': 513}),
    ('open_instruct', {'template': 'plain', 'max_tokens': 128, 'shuffle_seed': 42, 'train_rows': 80, 'val_rows': 10}),
])
def test_recipe(script, tmp_path, gpt2, name, flags):
    """The recipe prepares, trains and saves on a small model of its own architecture."""
    config = os.path.join(ROOT, 'config', f'finetune_{name}.py')
    with open(config, encoding='utf-8') as file:
        dataset = next(line for line in file if line.startswith('dataset')).split("'")[1]
    (tmp_path / 'rows.json').write_text(json.dumps(ROWS))
    done = script('data/alpaca/prepare.py', '--input=rows.json', f'--out_dir=data/{dataset}',
                  *(f'--{key}={value}' for key, value in flags.items()))
    assert done.returncode == 0, done.stderr
    assert f'Next: python train.py --data_dir=data --dataset={dataset}' in done.stdout
    save_model(tmp_path / 'model', name == 'open_instruct')
    done = script('train.py', config, '--init_from=model', '--max_iters=2', '--epochs=0', '--batch_size=1',
                  '--gradient_accumulation_steps=1', '--data_dir=data', '--out_dir=out', '--device=cpu',
                  '--dtype=float32')
    assert done.returncode == 0, done.stderr
    assert 'step 2/2' in done.stdout and os.path.exists(tmp_path / 'out' / 'ckpt.pt')
