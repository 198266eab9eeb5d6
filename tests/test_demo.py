"""The demo's data: true to its facts, and nothing held out is learned."""
from collections import Counter

import pytest

from conftest import read_back
from core import tokenizer as vocabularies
from core.tokenfile import Split, read_meta
from demo import prepare
from formats import quiz

CONFIG = prepare.Config(n_texts=600, n_conversations=10_000)
FACTS = prepare.read_facts()
WORDINGS = prepare.read_wordings()
NEVER_ASKED = prepare.choose_never_asked(FACTS, CONFIG.seed)
PROSE = prepare.make_prose(FACTS, WORDINGS, CONFIG)


@pytest.fixture(scope='module')
def conversations():
    return prepare.make_conversations(FACTS, NEVER_ASKED, WORDINGS, CONFIG)


def test_no_conversation_holds_a_never_asked_country_together_with_its_capital(conversations):
    pairs = [(prepare.words(row['name']), prepare.words(row['capital'])) for row in NEVER_ASKED]
    met = set()
    for turns in conversations:
        text = prepare.words(' '.join(turn.text for turn in turns))
        for pair in pairs:
            found = {name for name in pair if name in text}
            assert len(found) < 2, text
            met |= found
    assert len(met) == 2 * 40  # but each stands in some, or the model could not know the name
    # All others are asked about in both directions.
    answers = {turns[1].text for turns in conversations}
    for row in FACTS:
        for kind in prepare.DIRECTIONS:
            answer = prepare.fill(WORDINGS['ask'][kind]['answer'], row)
            assert (answer in answers) == (row not in NEVER_ASKED), answer


def test_no_held_out_wording_stands_in_a_training_text(conversations):
    texts = PROSE + [turn.text for turns in conversations for turn in turns]
    learned = '\n'.join(prepare.words(text) for text in texts)
    for which in ('quiz', 'val'):
        for q in prepare.make_quiz(FACTS, NEVER_ASKED, WORDINGS, which):
            if q['group'] != 'to complete':
                assert prepare.words(q['question']) not in learned, q


def test_what_is_written_reads_back(tmp_path):
    prepare.main([f'--out_dir={tmp_path}', '--n_texts=600', '--n_conversations=600'])
    vocabulary = vocabularies.from_state(read_meta(tmp_path / 'chat')['tokenizer'])
    ids, mask = Split([tmp_path / 'prose'], 'train')[199]
    assert len(read_back(tmp_path / 'chat', 'val')) == 400
    assert mask.all() and vocabulary.decode(ids) in [f'{text}<|endoftext|>' for text in PROSE]
    questions = quiz.read(tmp_path / 'quiz.jsonl')
    groups = Counter(question.group for question in questions)
    assert groups['never asked, forward'] == groups['never asked, backward'] == 200
    assert groups['held-out wording, forward'] == 155 * 5 and groups['to complete'] == 80
    assert all(q.wanted in q.answer or q.group == 'to complete' for q in questions)
