"""The demo's data: true to its facts, and nothing held out is learned."""
import json

import pytest

from core import conversation
from core import tokenizer as vocabularies
from core.tokenfile import Split, read_meta
from demo import prepare, quiz

CONFIG = prepare.Config(n_texts=600, n_conversations=10_000)
FACTS = prepare.read_facts()
WORDINGS = prepare.read_wordings()
NEVER_ASKED = prepare.choose_never_asked(FACTS, CONFIG)
PROSE = prepare.make_prose(FACTS, WORDINGS, CONFIG)


@pytest.fixture(scope='module')
def conversations():
    return prepare.make_conversations(FACTS, NEVER_ASKED, WORDINGS, CONFIG)


def test_the_table_has_every_country_once():
    for key in ('name', 'capital', 'domain'):
        assert len({row[key] for row in FACTS}) == len(FACTS) == 195, key
    for row in FACTS:
        assert all(row[key] for key in row if key != 'article'), row
        assert row['article'] in ('', 'the') and len(row['domain']) == 3, row
    capitals = {row['name']: row['capital'] for row in FACTS}
    for country, capital in {'Australia': 'Canberra', 'Brazil': 'Brasília', 'Burundi': 'Gitega',
                             'Kazakhstan': 'Astana', 'Switzerland': 'Bern'}.items():
        assert capitals[country] == capital


def test_a_sentence_has_the_article_and_a_capital_letter():
    row, = [row for row in FACTS if row['name'] == 'Netherlands']
    assert prepare.fill('{country} is in {region}.', row) == 'The Netherlands is in Western Europe.'
    assert prepare.fill('where is {country}?', row) == 'Where is the Netherlands?'


def test_no_conversation_holds_a_never_asked_country_together_with_its_capital(conversations):
    names = [(prepare.words(row['name']), prepare.words(row['capital'])) for row in NEVER_ASKED]
    met = set()
    for turns in conversations:
        text = prepare.words(' '.join(turn.text for turn in turns))
        for pair in names:
            found = {name for name in pair if name in text}
            assert len(found) < 2, text
            met |= found
    assert len(met) == 2 * 40  # but each stands in some, or the model could not know the name


def test_all_other_countries_are_asked_about_in_both_directions(conversations):
    answers = {turn.text for turns in conversations for turn in turns if turn.role == 'assistant'}
    for row in FACTS:
        for kind in prepare.DIRECTIONS:
            answer = prepare.fill(WORDINGS['ask'][kind]['answer'], row)
            assert (answer in answers) == (row not in NEVER_ASKED), answer


@pytest.mark.parametrize('which', ['quiz', 'val'])
def test_no_held_out_wording_stands_in_a_training_text(conversations, which):
    texts = PROSE + [turn.text for turns in conversations for turn in turns]
    learned = '\n'.join(prepare.words(text) for text in texts)
    for q in prepare.make_quiz(FACTS, NEVER_ASKED, WORDINGS, which):
        assert prepare.words(q['question']) not in learned, q


def test_every_text_of_prose_names_the_capital_twice():
    for i, text in enumerate(PROSE):
        row = FACTS[i % len(FACTS)]
        assert text.count(row['capital']) >= 2 and row['country'][1:] in text, text
        assert '{' not in text


def test_the_never_asked_follow_the_seed_and_do_not_give_the_answer_away():
    assert prepare.choose_never_asked(FACTS, CONFIG) == NEVER_ASKED
    assert prepare.choose_never_asked(FACTS, prepare.Config(seed=2)) != NEVER_ASKED
    for row in NEVER_ASKED:
        assert not set(row['name'].lower().split()) & set(row['capital'].lower().split()), row


def test_what_is_written_reads_back(tmp_path):
    prepare.main([f'--out_dir={tmp_path}', '--n_texts=600', '--n_conversations=600'])
    vocabulary = vocabularies.from_state(read_meta(tmp_path / 'chat')['tokenizer'])
    assert vocabulary.vocab_size <= 2048

    ids, mask = Split([tmp_path / 'prose'], 'val')[7]
    assert mask.all() and ids[-1] == vocabulary.end_of_text
    assert vocabulary.decode(ids[:-1]) in prepare.make_prose(
        FACTS, WORDINGS, prepare.Config(n_texts=600))

    ids, mask = Split([tmp_path / 'chat'], 'val')[0]
    answer = [int(i) for i, supervised in zip(ids, mask) if supervised]
    assert conversation.answer_text(answer, vocabulary).endswith('.')

    with open(tmp_path / 'quiz.jsonl', encoding='utf-8') as file:
        questions = [json.loads(line) for line in file]
    groups = [q['group'] for q in questions]
    assert groups.count('never asked, forward') == groups.count('never asked, backward') == 200
    assert groups.count('held-out wording, forward') == 155 * 5
    for q in questions:
        assert set(q) == {'question', 'before', 'answer', 'wanted', 'group'}
        assert q['wanted'] in q['answer'], q


def test_an_answer_counts_if_it_is_exact_and_ended_by_itself():
    questions = 4 * [{'group': 'a, forward', 'answer': 'Yes.'}] + [{'group': 'b', 'answer': 'No.'}]
    answers = [('Yes.', True), ('Yes.', False), ('Yes', True), ('No.', True), ('No.', True)]
    assert quiz.exact(questions, answers, 'a') == 25
    assert quiz.exact(questions, answers, 'b') == 100
