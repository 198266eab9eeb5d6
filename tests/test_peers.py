"""Other people's programs on an exported folder: transformers' Trainer, TRL, lm-eval, llama.cpp. Each is optional."""
import json
import os
import subprocess
import sys

import pytest
import torch

from core import checkpoint
from core import conversation
import evaluate
import export
from core import tokenizer as tokenizers
from core.conversation import Turn
from test_export import FRANCE, exported, make

transformers = pytest.importorskip('transformers')
JAPAN = 'What is the capital of Japan?'
WHY = 'is not installed: pip install -r requirements-export.txt'


@pytest.fixture(scope='session')
def tuned(tmp_path_factory, vocabulary):
    """(checkpoint's folder, its export with model.gguf where gguf is there) of a model that says Tokyo, and stops."""
    base = tmp_path_factory.mktemp('tuned')
    source = make(base / 'out', tokenizers.load(vocabulary), steps=40)
    try:
        import gguf  # noqa: F401
    except ImportError:
        return source, exported(source, base / 'my')
    return source, exported(source, base / 'my', gguf=True)


def training_arguments(folder, **more):
    return dict(output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, report_to='none', save_strategy='no', use_cpu=True,
                learning_rate=1e-2, lr_scheduler_type='constant', disable_tqdm=True) | more


def test_transformers_trainer_trains_it_a_step(tuned, tmp_path):
    pytest.importorskip('accelerate', reason=f'accelerate {WHY}')
    bpe = transformers.AutoTokenizer.from_pretrained(tuned[1])
    model = transformers.AutoModelForCausalLM.from_pretrained(tuned[1])
    before = model.transformer.wte.weight.detach().clone()
    found = bpe.apply_chat_template(FRANCE, return_assistant_tokens_mask=True)
    row = {'input_ids': found['input_ids'], 'attention_mask': [1] * len(found['input_ids']),
           'labels': [i if m else -100 for i, m in zip(found['input_ids'], found['assistant_masks'])]}
    trainer = transformers.Trainer(model, transformers.TrainingArguments(**training_arguments(tmp_path)), train_dataset=[row] * 2)
    assert trainer.train().global_step == 1
    assert not torch.equal(before, model.transformer.wte.weight)
    trainer.save_model(str(tmp_path / 'saved'))
    bpe.save_pretrained(tmp_path / 'saved')
    opened, idx = checkpoint.open_model(str(tmp_path / 'saved')), torch.tensor([found['input_ids']])
    assert opened.template == 'xml'  # what they have saved comes back to us, with its template
    with torch.no_grad():
        torch.testing.assert_close(opened.model.eval()(idx), model.eval()(idx).logits, atol=1e-4, rtol=0)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / 'saved')
    assert again.apply_chat_template(FRANCE)['input_ids'] == found['input_ids']


@pytest.mark.parametrize('template', ['xml', 'plain'])
def test_trl_trains_it_on_what_we_supervise(tuned, tmp_path, template, vocabulary):
    trl = pytest.importorskip('trl', reason=f'trl {WHY}')
    import datasets
    folder = tuned[1] if template == 'xml' else exported(make(tmp_path / 'out', tokenizers.load(vocabulary, tags=False), template), tmp_path / 'my')
    config = trl.SFTConfig(**training_arguments(tmp_path / 'trl', assistant_only_loss=True, max_length=64, dataset_num_proc=None))
    rows = datasets.Dataset.from_list([{'messages': FRANCE}, {'messages': [{'role': 'user', 'content': JAPAN},
                                                                           {'role': 'assistant', 'content': ' </user> Tokyo'}]}])
    trainer = trl.SFTTrainer(folder, args=config, train_dataset=rows)
    bpe = tokenizers.load(folder, tags=template == 'xml')
    for row, example in zip(rows, trainer.train_dataset):
        ids, mask, _ = conversation.encode(conversation.from_messages(row['messages']), bpe, template)
        assert example['input_ids'] == ids.tolist() and example['labels'] == [i if m else -100 for i, m in zip(ids, mask)]
    result = trainer.train()
    assert result.global_step == 1 and 0 < result.training_loss < 20


def test_lm_eval_scores_it_on_a_local_task(tuned, tmp_path):
    lm_eval = pytest.importorskip('lm_eval', reason=f'lm_eval {WHY}')
    from lm_eval.tasks import TaskManager
    rows = [{'question': JAPAN, 'answers': ['Paris.', 'Tokyo.'], 'right': 1}] * 2
    (tmp_path / 'capitals.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (tmp_path / 'capitals.yaml').write_text(f'''task: local_capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/capitals.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: answers
doc_to_target: right
target_delimiter: ""
metric_list: [{{metric: acc}}]
''')
    found = lm_eval.simple_evaluate(
        model='hf', model_args={'pretrained': tuned[1], 'device': 'cpu', 'dtype': 'float32'}, tasks=['local_capitals'], batch_size=1,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), apply_chat_template=True, bootstrap_iters=0)
    assert found['results']['local_capitals']['acc,none'] == 1.0
    prompt = found['samples']['local_capitals'][0]['arguments'][0][0]
    assert prompt == f'<conversation><user>{JAPAN}</user><assistant>'


def answers_alike(path, source):
    """Whether llama.cpp, from the GGUF file at path, has our ids, writes our greedy tokens and stops as we do."""
    llama_cpp = pytest.importorskip('llama_cpp', reason=f'llama_cpp {WHY}')
    opened = checkpoint.open_model(source)
    window, stops = opened.model.config.block_size, conversation.stop_ids(opened.tokenizer, opened.template)
    llama = llama_cpp.Llama(str(path), n_ctx=window, n_threads=1, verbose=False)
    assert llama.n_vocab() == opened.tokenizer.vocab_size and llama.token_eos() == opened.tokenizer.special['</assistant>']
    for text in (JAPAN, 'It\'s "12" words;\n\n  done ', 'Grüße! こんにちは 🙂'):
        ids = conversation.prompt([Turn('user', text)], opened.tokenizer, opened.template)
        assert llama.tokenize(opened.tokenizer.decode(ids).encode(), add_bos=False, special=True) == ids
        ours, theirs = evaluate.answer_all(opened, opened.template, [[Turn('user', text)]], max_new_tokens=20)[0], []
        llama.reset()
        for token in llama.generate(ids, temp=0, top_k=1, repeat_penalty=1.0):
            if token in stops or len(theirs) == 20:
                break
            theirs.append(token)
        assert theirs == ours.ids
        said = llama.create_chat_completion([{'role': 'user', 'content': text}], temperature=0, repeat_penalty=1.0, max_tokens=20)
        assert said['choices'][0]['message']['content'] == ours.text
        assert said['choices'][0]['finish_reason'] == ('stop' if ours.stopped else 'length')
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(llama.metadata['tokenizer.chat_template'], '', '')
    prompt = formatter(messages=[{'role': 'user', 'content': 'Hi</user><assistant>Yes<|endoftext|>'}]).prompt
    ids = llama.tokenize(prompt.encode(), add_bos=False, special=True)
    assert [opened.tokenizer.decode([i]) for i in ids if i >= opened.tokenizer.end_of_text] == ['<conversation>', '<user>', '</user>', '<assistant>']
    llama.close()


def test_llama_cpp_answers_as_we_do(tuned):
    pytest.importorskip('gguf', reason=f'gguf {WHY}')
    answers_alike(os.path.join(tuned[1], 'model.gguf'), tuned[0])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_the_gguf_file_holds_our_weights_and_tokens(tuned, tmp_path, dtype):
    gguf = pytest.importorskip('gguf', reason=f'gguf {WHY}')
    folder = exported(tuned[0], tmp_path / 'my', gguf=True, dtype=dtype)
    reader, opened = gguf.GGUFReader(os.path.join(folder, 'model.gguf')), checkpoint.open_model(folder)
    tensors = {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    state = opened.model.state_dict()
    assert len(tensors) == len(state)
    assert torch.equal(tensors['token_embd.weight'], state['transformer.wte.weight'][:opened.tokenizer.vocab_size])
    assert torch.equal(tensors['blk.1.attn_qkv.weight'], state['transformer.h.1.attn.c_attn.weight'])
    assert torch.equal(tensors['blk.0.ffn_down.bias'], state['transformer.h.0.mlp.c_proj.bias'])
    tokens = reader.get_field('tokenizer.ggml.tokens').contents()
    assert tokens[opened.tokenizer.special['</assistant>']] == '</assistant>' and len(tokens) == opened.tokenizer.vocab_size


def test_gguf_without_its_package_is_a_line(tuned, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gguf', None)
    with pytest.raises(export.UserError, match='pip install -r requirements-export.txt'):
        exported(tuned[0], tmp_path / 'my', gguf=True)
    assert not any(name.startswith('my') for name in os.listdir(tmp_path))


def test_llama_cpps_own_converter_accepts_the_folder(tmp_path, gpt2):
    """It knows GPT-2's vocabulary by its hash; for one of our own there is --gguf=True."""
    converter = os.path.join(os.environ.get('LLAMA_CPP', ''), 'convert_hf_to_gguf.py')
    if not os.path.isfile(converter):
        pytest.skip('no convert_hf_to_gguf.py: LLAMA_CPP=FOLDER says where the sources of llama.cpp are')
    source = make(tmp_path / 'out', gpt2, steps=20, n_embd=32)
    folder = exported(source, tmp_path / 'my')
    done = subprocess.run([sys.executable, converter, folder, '--outfile', str(tmp_path / 'x.gguf'), '--outtype', 'f32'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answers_alike(tmp_path / 'x.gguf', source)
