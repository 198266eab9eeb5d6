"""The chat page in a real browser, headless Chromium, beside a server that answers by script."""
import json
import re

import pytest

from chat_page import CHROMIUM, PARIS, TUNED, UNTUNED, Stub, chromium, say

expect = pytest.importorskip('playwright.sync_api', reason='playwright is not installed').expect
expect.set_options(timeout=30_000)  # for machines with other things to do
ANSWER = ''.join(PARIS)


@pytest.fixture(scope='module')
def browser():
    if not CHROMIUM:
        pytest.skip('no Chromium is installed')
    with chromium() as browser:
        yield browser


@pytest.fixture
def stub():
    with Stub() as stub:
        yield stub


@pytest.fixture
def open_page(browser, stub):
    """A function that opens the page; errors of the script and foreign requests fail the test."""
    pages = []
    errors = []
    urls = []

    def open_page(**options):
        page = browser.new_page(**options)
        pages.append(page)
        page.on('pageerror', lambda error: errors.append(error))
        page.on('request', lambda request: urls.append(request.url))
        page.on('dialog', lambda dialog: dialog.accept('secret'))
        page.goto(stub.url)
        done(page, 0)
        return page
    yield open_page
    for page in pages:
        page.close()
    foreign = [url for url in urls if not url.startswith((stub.url, 'data:', 'blob:'))]
    assert errors == foreign == []


def done(page, n=1):
    """Wait until n answers stand there, none is being written, and the models are known."""
    expect(page.locator('#title')).not_to_have_text('Chat')
    expect(page.locator('article .answer')).to_have_count(n)
    expect(page.locator('[aria-busy=true]')).to_have_count(0)
    expect(page.get_by_role('button', name='Send')).to_be_visible()


def ask(page, text, n=1):
    say(page, text)
    done(page, n)


def press(page, name):
    page.get_by_role('button', name=name, exact=True).click()


def texts(page):
    return page.locator('article .text').all_text_contents()


def said(request):
    """The texts of the messages of a request; a user's and an assistant's take turns."""
    roles = [message['role'] for message in request['messages']]
    assert roles == (['user', 'assistant'] * len(roles))[:len(roles)]
    return [message['content'] for message in request['messages']]


def test_an_answer_grows_as_it_comes(open_page, stub):
    stub.replies['out/oasst'] = ['The  capital\n\n', '    is', None, ' Paris.  ']
    page = open_page()
    box = page.get_by_label('Message')
    for key in (' ', 'W', 'h', 'o', 'Shift+Enter', ' ', 'i', 's', '?', 'Enter'):
        # Enter with isComposing ends an input method, as Japanese needs one, and sends nothing.
        box.dispatch_event('keydown', {'key': 'Enter', 'isComposing': True})
        assert stub.requests == []
        page.keyboard.press(key)
    expect(page.locator('.foot span')).to_have_text('writing…')
    expect(page.locator('.text')).to_have_text('The capital is')
    stub.go.set()
    done(page)
    answer = 'The  capital\n\n    is Paris.  '
    expect(box).to_be_focused()
    assert texts(page) == [answer] and box.input_value() == ''
    assert page.locator('.question').text_content() == ' Who\n is?'
    assert re.fullmatch(r'7 tokens · [\d.]+ tokens/s', page.locator('.foot span').text_content())
    assert page.locator('#announce').text_content() == f'out/oasst: {answer}'  # read aloud
    assert stub.requests == [{
        'model': 'out/oasst', 'messages': [{'role': 'user', 'content': ' Who\n is?'}],
        'temperature': 0.7, 'max_tokens': 256, 'truncation': 'auto',
        'stream': True, 'stream_options': {'include_usage': True}}]


@pytest.mark.parametrize('stop', [lambda page: page.keyboard.press('Escape'),
                                  lambda page: page.reload()])
def test_stopping_closes_the_connection(open_page, stub, stop):
    stub.replies['out/oasst'] = ['One, two', None, ', three']
    page = open_page()
    say(page, 'Count')
    expect(page.locator('.text')).to_have_text('One, two')
    stop(page)
    assert stub.left.wait(30)
    done(page)
    assert page.locator('.foot span').text_content() == 'stopped'
    stub.replies['out/oasst'] = ['five']
    ask(page, 'Go on', 2)
    assert texts(page) == ['One, two', 'five']
    assert said(stub.requests[-1]) == ['Count', 'One, two', 'Go on']


def test_two_models_side_by_side_each_with_its_own_answers(open_page, stub, tmp_path):
    stub.models = [TUNED, UNTUNED]
    page = open_page()
    ask(page, 'France? 🙂 <b>', 2)
    assert page.locator('article .name').all_text_contents() == ['out/oasst', 'gpt2-medium']
    stub.replies['gpt2-medium'] = (429, 'full')  # it is not told of this question again
    ask(page, 'And Peru?', 4)
    stub.replies['gpt2-medium'] = ['no.']
    ask(page, 'And Chile?', 6)
    with page.expect_download() as download:
        press(page, 'Export')
    download.value.save_as(tmp_path / 'chat.jsonl')
    lines = [json.loads(line) for line in (tmp_path / 'chat.jsonl').read_text().splitlines()]
    exported = {line['model']: said(line) for line in lines}
    assert exported == {
        'out/oasst': ['France? 🙂 <b>', ANSWER, 'And Peru?', ANSWER, 'And Chile?', ANSWER],
        'gpt2-medium': ['France? 🙂 <b>', ' France?', 'And Chile?', 'no.']}
    for request in stub.requests[4:]:
        assert said(request) == exported[request['model']][:-1]


def test_a_reload_keeps_the_chats_the_settings_and_the_api_key(open_page, stub):
    stub.key = 'secret'
    page = open_page()
    stub.key = None  # it would ask again, and be answered again
    page.get_by_label('Temperature').fill('0')
    page.get_by_label('Length').fill('12')
    ask(page, 'France?')
    page.reload()
    done(page)
    ask(page, 'And Japan?', 2)
    last = stub.requests[-1]
    assert said(last) == ['France?', ANSWER, 'And Japan?']
    assert (last['temperature'], last['max_tokens']) == (0, 12)
    assert stub.keys == ['Bearer', 'Bearer secret', 'Bearer secret']
    press(page, 'New chat')
    press(page, "What's the capital of France?")  # an example
    done(page)
    assert said(stub.requests[-1]) == ["What's the capital of France?"]
    press(page, 'New chat')
    press(page, 'France?')
    done(page, 2)
    press(page, 'Delete')
    expect(page.locator('.choices').last.locator('button')).to_have_count(1)


@pytest.mark.parametrize('reply, text, error', [
    ((429, '16 wait. Try again in a moment.'), '', '16 wait. Try again in a moment.'),
    (['The', {'error': {'message': 'the model failed.'}}], 'The', 'the model failed.'),
    (['The', OSError()], 'The', 'The connection broke before the answer ended.'),
    ([OSError()], '', 'The server does not answer. Is serve.py running?')])
def test_an_error_is_shown_and_retry_asks_again(open_page, stub, reply, text, error):
    page = open_page()
    stub.replies['out/oasst'] = reply
    ask(page, 'France?')
    expect(page.locator('.answer .error')).to_have_text(error)
    assert texts(page) == [text]
    assert page.locator('#announce').text_content() == f'out/oasst: {error}'
    stub.replies['out/oasst'] = PARIS
    press(page, 'Retry')
    expect(page.locator('.answer .error')).to_be_empty()
    done(page)
    assert stub.requests[0] == stub.requests[1]
    stub.replies['out/oasst'] = (500, 'broken')  # a Retry that brings nothing takes nothing
    press(page, 'Retry')
    expect(page.locator('.answer .error')).to_have_text('broken')
    assert texts(page) == [ANSWER]


def test_what_is_written_stays_text_code_is_set_apart_and_a_phone_shows_it_all(open_page, stub):
    attack = '<img src=x onerror="document.title=1"><script>document.title=2</script></p><b>'
    name = f'a{attack}'
    answer = f'{attack}{"a" * 300}\n```python\n{attack}{"y" * 300}\n```\nand ```x```.'
    stub.models = [{**TUNED, 'id': name, 'description': attack + 'tuned ' * 40}, UNTUNED]
    stub.replies[name] = list(answer)
    page = open_page(viewport={'width': 390, 'height': 844}, is_mobile=True, has_touch=True,
                     permissions=['clipboard-read', 'clipboard-write'])
    ask(page, attack, 2)
    assert page.locator('.question').text_content() == attack
    assert page.locator('.text pre').all_text_contents() == [f'{attack}{"y" * 300}\n', 'x']
    size = page.evaluate("""() => [document.documentElement.scrollWidth,
        document.documentElement.scrollHeight, document.getElementById('log').scrollWidth]""")
    assert size == [390, 844, 390]  # there is no scrolling sideways
    page.get_by_role('button', name='Copy').first.click()
    assert page.evaluate('navigator.clipboard.readText()') == answer
    stub.replies[name] = (400, attack)
    say(page, attack)
    expect(page.locator('.answer .error').nth(2)).to_have_text(attack)
    press(page, 'New chat')
    assert page.locator('img, b').count() == 0 and page.title() == f'{name} beside gpt2-medium'
