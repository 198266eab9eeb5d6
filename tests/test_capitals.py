"""The demo's data: facts in order, and what is held out nowhere in what is learned."""
import json
import os

import pytest

from core import conversation
from core import tokenfile
from core import tokenizer
from demo import prepare

CONFIG = prepare.Config(rounds=3)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """A folder that prepare.py has written, with few rounds."""
    folder = str(tmp_path_factory.mktemp('capitals'))
    prepare.main([f'--out_dir={folder}', '--rounds=3'])
    return folder


def trees(folder):
    with open(os.path.join(folder, 'trees.jsonl'), encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def test_the_table_has_every_country_once():
    places = prepare.read_capitals()
    assert len(places) == 195 and len({p.country for p in places}) == len({p.capital for p in places}) == 195
    assert all(p.country and p.capital and p.article in ('', 'the') for p in places)
    known = {p.country: p.capital for p in places}
    for country, capital in {'France': 'Paris', 'Japan': 'Tokyo', 'Australia': 'Canberra', 'Brazil': 'Brasília',
                             'Kazakhstan': 'Astana', 'Burundi': 'Gitega', 'Myanmar': 'Naypyidaw'}.items():
        assert known[country] == capital


def test_a_question_of_each_direction_and_its_answer():
    places = {p.country: p for p in prepare.read_capitals()}
    france, netherlands = (prepare.Pair(places[name], 'forward') for name in ('France', 'Netherlands'))
    assert prepare.fill("what's the capital of {x}?", france.given) == "What's the capital of France?"
    assert netherlands.answer == 'The capital of the Netherlands is Amsterdam.'
    assert prepare.Pair(places['France'], 'reverse').answer == 'Paris is the capital of France.'


def test_at_least_three_wordings_of_each_direction_are_held_out_whole():
    for direction, wordings in prepare.QUIZ.items():
        learned = {prepare.plain(body) for body in (*prepare.bodies(direction)[0], *prepare.SENTENCES[direction])}
        assert len(wordings) >= 3 and not learned & {prepare.plain(wording) for wording in wordings}
        assert not set(wordings) & set(prepare.VAL[direction])  # what chose the settings is not asked


def test_no_question_of_the_quiz_is_learned_not_even_with_words_around_it():
    learned = '\n'.join(prepare.plain(text) for text in prepare.texts(prepare.training(prepare.Config(rounds=20))))
    for q in prepare.quiz():
        if q['kind'] != 'follow-up':
            assert prepare.plain(q['question']) not in learned, q


def test_a_held_out_pair_is_learned_in_its_other_direction_alone():
    learned, held_out = prepare.split_pairs(CONFIG)
    assert len(held_out) == 16 and not set(learned) & set(held_out)
    answers = set(prepare.texts(prepare.training(CONFIG)))
    for pair in held_out:
        other = pair._replace(direction='reverse' if pair.direction == 'forward' else 'forward')
        assert pair.answer not in answers and other.answer in answers
    assert all(pair.answer in answers for pair in learned)


def test_the_same_seed_gives_the_same_data_and_another_seed_another():
    one, again, other = (prepare.training(prepare.Config(rounds=1, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other


def test_the_trees_go_through_the_reader_of_oasst_without_a_loss(prepared):
    meta = tokenfile.read_meta(prepared)
    assert not sum(meta['dropped'].values()) and not meta['truncated'] and not meta['broken_lines']
    assert meta['counts']['trees'] == len(trees(prepared)) == 3 * (2 * 195 - 16) + 4 * (2 * 195 - 16)
    bpe = tokenizer.from_state(meta['tokenizer'])
    assert 256 < len(bpe.tokens) <= 2000
    split = tokenfile.Split([prepared], 'val')
    asked = {prepare.plain(e.question) for e in prepare.validation(CONFIG)}
    for i in range(0, len(split), 97):
        turns = conversation.decode(*split[i], bpe)
        assert prepare.plain(turns[0].text) in asked


def test_the_quiz_asks_every_pair_in_every_held_out_wording():
    questions = prepare.quiz()
    kinds = {kind: [q for q in questions if q['kind'] == kind] for kind in ('held-out phrasing', 'held-out pair', 'follow-up')}
    assert {kind: len(found) for kind, found in kinds.items()} == {'held-out phrasing': 374 * 5, 'held-out pair': 16 * 5, 'follow-up': 374}
    assert sum(map(len, kinds.values())) == len(questions)
    for q in questions:
        assert q['country'] in q['answer'] and q['capital'] in q['answer'].replace('..', '.') + '.'
        assert len(q['before']) == (2 if q['kind'] == 'follow-up' else 0)
