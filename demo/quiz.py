"""Asking a model the questions of quiz.jsonl."""
import json
import os

from core import checkpoint, conversation
from core.conversation import Turn
from core.generate import Sampling, generate

HERE = os.path.dirname(os.path.abspath(__file__))


def read_questions():
    """The questions that demo/prepare.py has written."""
    with open(os.path.join(HERE, 'quiz.jsonl'), encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def open_model(folder):
    """The checkpoint in a folder, ready to be asked."""
    opened = checkpoint.open_model(folder)
    opened.model.eval()
    return opened


def write_on(opened, prompts, stops=(), batch_size=256):
    """What the model greedily puts after each prompt, a list of ids: at most 32 ids."""
    found = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start:start + batch_size]
        answers = [[] for _ in batch]
        for tokens in generate(opened.model, batch, 32, Sampling(temperature=0.0), stops=stops):
            for answer, token in zip(answers, tokens):
                if token is not None:
                    answer.append(token)
        found += answers
    return found


def ask(opened, questions, template):
    """The model's answers: (text, whether it ended by itself) for each question."""
    prompts = []
    for q in questions:
        turns = [Turn('user', q['question'])]
        prompts.append(conversation.prompt(turns, opened.tokenizer, template))
    stops = conversation.stop_ids(opened.tokenizer, template)
    answers = []
    for ids in write_on(opened, prompts, stops):
        text = conversation.answer_text(ids, opened.tokenizer, template)
        answers.append((text, ids[-1] in stops))
    return answers


def exact(questions, answers, group):
    """How many of a group's answers are exact and ended by themselves, in percent."""
    right = []
    for q, (text, ended) in zip(questions, answers):
        if q['group'].startswith(group):
            right.append(ended and text == q['answer'])
    return 100 * sum(right) / len(right)


def completed(opened, questions, group):
    """How many of a group's answers the model completes, given all but the name, in percent."""
    names = {q['answer']: q['wanted'] for q in questions if q['group'].startswith(group)}
    prompts = []
    for answer, name in names.items():
        beginning = answer.rpartition(f' {name}')[0]
        prompts.append(opened.tokenizer.encode(beginning).tolist())
    right = []
    for ids, name in zip(write_on(opened, prompts), names.values()):
        right.append(opened.tokenizer.decode(ids).startswith(f' {name}'))
    return 100 * sum(right) / len(right)
