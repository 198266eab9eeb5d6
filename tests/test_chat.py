"""The chat page in headless Chromium, whose requests are answered by script."""
import json
import re

import pytest

from chat_page import chromium, say
from conftest import ROOT

expect = pytest.importorskip('playwright.sync_api', reason='playwright is not installed').expect
URL = 'http://localhost/'  # nobody listens there
TUNED = {'id': 'out/oasst', 'role': 'tuned', 'window': 1024, 'template': 'xml',
         'description': 'gpt2-medium tuned on OpenAssistant', 'examples': ['Why?', 'How?'],
         'defaults': {'temperature': 0.7, 'max_tokens': 256}}
UNTUNED = {**TUNED, 'id': 'gpt2-medium', 'role': 'compare', 'description': 'as published'}
PARIS = 'The capital of France is Paris.'
END = [{'choices': [{'delta': {}, 'finish_reason': 'stop'}]},
       {'choices': [], 'usage': {'prompt_tokens': 9, 'completion_tokens': 7}}]


@pytest.fixture(scope='module')
def browser():
    with chromium() as browser:
        yield browser


class Script:
    """Opens the page and answers it. Errors of its script and foreign requests fail the test.

    replies: {model id: pieces of text}. A dict among them is sent as it is, None breaks the
    connection, and (status, message) is an error.
    """

    def __init__(self, browser):
        self.browser = browser
        self.models = [TUNED]
        self.replies = {'out/oasst': PARIS, 'gpt2-medium': ' France?'}
        self.key = ''    # the API key that is expected
        self.keys = []   # what has been sent for it
        self.requests = []
        self.errors = []

    def open(self, **options):
        page = self.browser.new_page(**options)
        page.on('pageerror', lambda error: self.errors.append(error))
        page.on('dialog', lambda dialog: dialog.accept('secret'))
        page.route(re.compile('^(?!data:|blob:)'), self.answer)
        page.goto(URL)
        done(page, 0)
        return page

    def answer(self, route):
        path = route.request.url.removeprefix(URL)
        key = route.request.headers.get('authorization')
        if path == '':
            route.fulfill(path=f'{ROOT}/web/chat.html')
        elif path == 'v1/models':
            self.keys.append(key)
            status = 200 if key.endswith(self.key) else 401
            route.fulfill(status=status, json={'data': self.models})
        elif path == 'v1/chat/completions':
            self.requests.append(route.request.post_data_json)
            self.reply(route, self.replies[self.requests[-1]['model']])
        else:
            self.errors.append(path)

    def reply(self, route, reply):
        if reply is None:
            route.abort()
        elif isinstance(reply, tuple):
            route.fulfill(status=reply[0], json={'error': {'message': reply[1]}})
        else:
            body = ''
            for piece in [*reply, *END]:
                if isinstance(piece, str):
                    piece = {'choices': [{'delta': {'content': piece}, 'finish_reason': None}]}
                body += f'data: {json.dumps(piece)}\n\n'
            # The connection breaks at None.
            route.fulfill(body=body.split('data: null')[0])


@pytest.fixture
def script(browser):
    script = Script(browser)
    yield script
    assert not script.errors


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
    """The texts of the messages of a request."""
    return [message['content'] for message in request['messages']]


def test_enter_sends_and_the_answer_is_shown_as_it_is(script):
    answer = 'The  capital\n\n    is Paris.  '
    script.replies['out/oasst'] = answer
    page = script.open()
    box = page.get_by_label('Message')
    for key in (' ', 'W', 'h', 'o', 'Shift+Enter', ' ', 'i', 's', '?', 'Enter'):
        # Enter with isComposing ends an input method, as Japanese needs one, and sends nothing.
        box.dispatch_event('keydown', {'key': 'Enter', 'isComposing': True})
        assert script.requests == []
        page.keyboard.press(key)
    done(page)
    assert texts(page) == [answer] and box.input_value() == ''
    assert page.locator('.question').text_content() == ' Who\n is?'
    assert re.fullmatch(r'7 tokens · [\d.]+ tokens/s', page.locator('.foot span').text_content())
    assert page.locator('#announce').text_content() == f'out/oasst: {answer}'  # read aloud
    assert script.requests == [{
        'model': 'out/oasst', 'messages': [{'role': 'user', 'content': ' Who\n is?'}],
        'temperature': 0.7, 'max_tokens': 256, 'truncation': 'auto',
        'stream': True, 'stream_options': {'include_usage': True}}]


def test_two_models_side_by_side_each_with_its_own_answers(script, tmp_path):
    script.models = [TUNED, UNTUNED]
    page = script.open()
    ask(page, 'France? 🙂 <b>', 2)
    assert page.locator('article .name').all_text_contents() == ['out/oasst', 'gpt2-medium']
    script.replies['gpt2-medium'] = (429, 'full')  # it is not told of this question again
    ask(page, 'And Peru?', 4)
    script.replies['gpt2-medium'] = 'no.'
    ask(page, 'And Chile?', 6)
    with page.expect_download() as download:
        press(page, 'Export')
    lines = download.value.path().read_text().splitlines()
    exported = {line['model']: said(line) for line in map(json.loads, lines)}
    assert exported == {
        'out/oasst': ['France? 🙂 <b>', PARIS, 'And Peru?', PARIS, 'And Chile?', PARIS],
        'gpt2-medium': ['France? 🙂 <b>', ' France?', 'And Chile?', 'no.']}
    for request in script.requests[4:]:
        assert said(request) == exported[request['model']][:-1]


def test_a_reload_keeps_the_chats_the_settings_and_the_api_key(script):
    script.key = 'secret'
    page = script.open()
    page.get_by_label('Temperature').fill('0')
    page.get_by_label('Length').fill('12')
    ask(page, 'France?')
    page.reload()
    done(page)
    ask(page, 'And Japan?', 2)
    last = script.requests[-1]
    assert said(last) == ['France?', PARIS, 'And Japan?']
    assert (last['temperature'], last['max_tokens']) == (0, 12)
    assert script.keys == ['Bearer', 'Bearer secret', 'Bearer secret']
    press(page, 'New chat')
    press(page, 'Why?')  # an example
    done(page)
    assert said(script.requests[-1]) == ['Why?']
    press(page, 'New chat')
    press(page, 'France?')
    done(page, 2)
    press(page, 'Delete')
    expect(page.locator('.choices').last.locator('button')).to_have_count(1)


@pytest.mark.parametrize('reply, text, error', [
    ((429, '16 wait.'), '', '16 wait.'),
    (['The', {'error': {'message': 'the model failed.'}}], 'The', 'the model failed.'),
    (['The', None], 'The', 'The connection broke before the answer ended.'),
    (None, '', 'The server does not answer. Is serve.py running?')])
def test_an_error_is_shown_and_retry_asks_again(script, reply, text, error):
    script.replies['out/oasst'] = reply
    page = script.open()
    ask(page, 'France?')
    expect(page.locator('.answer .error')).to_have_text(error)
    assert texts(page) == [text]
    assert page.locator('#announce').text_content() == f'out/oasst: {error}'
    script.replies['out/oasst'] = PARIS
    press(page, 'Retry')
    expect(page.locator('.answer .error')).to_be_empty()
    done(page)
    assert script.requests[0] == script.requests[1]
    script.replies['out/oasst'] = (500, 'broken')  # a Retry that brings nothing takes nothing
    press(page, 'Retry')
    expect(page.locator('.answer .error')).to_have_text('broken')
    assert texts(page) == [PARIS]


def test_what_is_written_stays_text_code_is_set_apart_and_a_phone_shows_it_all(script):
    attack = '<img src=x onerror="document.title=1"><script>document.title=2</script></p><b>'
    name = f'a{attack}'
    answer = f'{attack}{"a" * 300}\n```python\n{attack}{"y" * 300}\n```\nand ```x```.'
    script.models = [{**TUNED, 'id': name, 'description': attack + 'tuned ' * 40}, UNTUNED]
    script.replies[name] = answer
    page = script.open(viewport={'width': 390, 'height': 844}, is_mobile=True, has_touch=True,
                       permissions=['clipboard-read', 'clipboard-write'])
    ask(page, attack, 2)
    assert page.locator('.question').text_content() == attack
    assert page.locator('.text pre').all_text_contents() == [f'{attack}{"y" * 300}\n', 'x']
    size = page.evaluate("""() => [document.documentElement.scrollWidth,
        document.documentElement.scrollHeight, document.getElementById('log').scrollWidth]""")
    assert size == [390, 844, 390]  # there is no scrolling sideways
    page.get_by_role('button', name='Copy').first.click()
    assert page.evaluate('navigator.clipboard.readText()') == answer
    script.replies[name] = (400, attack)
    say(page, attack)
    expect(page.locator('.answer .error').nth(2)).to_have_text(attack)
    assert page.locator('img, b').count() == 0 and page.title() == f'{name} beside gpt2-medium'
