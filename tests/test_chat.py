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
    contexts = []
    faults = []

    def requested(request):
        if not request.url.startswith((stub.url, 'data:', 'blob:')):
            faults.append(request.url)

    def open_page(**options):
        context = browser.new_context(**{'viewport': {'width': 1000, 'height': 700}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on('pageerror', lambda error: faults.append(f'error in the script: {error}'))
        page.on('request', requested)
        page.on('dialog', lambda dialog: dialog.accept('secret'))
        page.goto(stub.url)
        done(page, 0)
        return page
    yield open_page
    for context in contexts:
        context.close()
    assert not faults


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
    say(page, ' What\n  is it?')
    expect(page.locator('.foot span')).to_have_text('writing…')
    expect(page.locator('.text')).to_have_text('The capital is')
    stub.go.set()
    done(page)
    answer = 'The  capital\n\n    is Paris.  '
    assert texts(page) == [answer]
    assert page.locator('.question').text_content() == ' What\n  is it?'
    assert re.fullmatch(r'7 tokens · [\d.]+ tokens/s', page.locator('.foot span').text_content())
    assert page.locator('#announce').text_content() == f'out/oasst: {answer}'  # read aloud
    assert stub.requests == [{
        'model': 'out/oasst', 'messages': [{'role': 'user', 'content': ' What\n  is it?'}],
        'temperature': 0.7, 'max_tokens': 256, 'truncation': 'auto',
        'stream': True, 'stream_options': {'include_usage': True}}]


@pytest.mark.parametrize('how', ['Escape', 'reload'])
def test_stopping_closes_the_connection(open_page, stub, how):
    stub.replies['out/oasst'] = ['One, two', None, ', three']
    page = open_page()
    say(page, 'Count')
    expect(page.locator('.text')).to_have_text('One, two')
    if how == 'Escape':
        page.keyboard.press('Escape')
    else:
        page.reload()
    assert stub.left.wait(30)
    done(page)
    assert texts(page) == ['One, two']
    assert page.locator('.foot span').text_content() == 'stopped'
    stub.replies['out/oasst'] = ['five']
    ask(page, 'Go on', 2)
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
    assert {line['model']: said(line) for line in lines} == {
        'out/oasst': ['France? 🙂 <b>', ANSWER, 'And Peru?', ANSWER, 'And Chile?', ANSWER],
        'gpt2-medium': ['France? 🙂 <b>', ' France?', 'And Chile?', 'no.']}
    for request in stub.requests[4:]:
        line, = [line for line in lines if line['model'] == request['model']]
        assert said(request) == said(line)[:-1]


def test_a_reload_keeps_the_chat_the_settings_and_the_api_key(open_page, stub):
    stub.key = 'secret'
    page = open_page()
    stub.key = None  # it would ask again, and be answered again
    page.get_by_label('Temperature').fill('0')
    page.get_by_label('Length').fill('12')
    ask(page, 'France?')
    page.reload()
    done(page)
    assert texts(page) == [ANSWER] and page.locator('.question').text_content() == 'France?'
    ask(page, 'And Japan?', 2)
    for request in stub.requests:
        assert (request['temperature'], request['max_tokens']) == (0, 12)
    assert said(stub.requests[1]) == ['France?', ANSWER, 'And Japan?']
    assert stub.keys == ['Bearer', 'Bearer secret', 'Bearer secret']


def test_earlier_chats_stay_until_they_are_deleted(open_page, stub):
    page = open_page()
    for text in ('France?', 'Japan?'):
        ask(page, text)
        press(page, 'New chat')
        expect(page.locator('article')).to_have_count(0)
    page.reload()
    older = page.locator('.choices').last.locator('button')
    expect(older).to_have_text(['Japan?', 'France?'])
    press(page, 'France?')
    done(page)
    press(page, 'Delete')
    expect(older).to_have_text(['Japan?'])
    press(page, "What's the capital of France?")  # an example
    done(page)
    assert said(stub.requests[-1]) == ["What's the capital of France?"]


def test_code_is_set_apart_and_answers_can_be_copied(open_page, stub):
    answer = 'See:\n\n```python\nprint(1)\n```\nand ```x```.'
    stub.replies['out/oasst'] = list(answer)
    page = open_page(permissions=['clipboard-read', 'clipboard-write'])
    ask(page, 'Code!')
    assert page.locator('.text pre').all_text_contents() == ['print(1)\n', 'x']
    press(page, 'Copy')
    assert page.evaluate('navigator.clipboard.readText()') == answer


ERRORS = [  # the reply, the text that is kept, the error that is shown
    ((429, '16 wait. Try again in a moment.'), '', '16 wait. Try again in a moment.'),
    (['The', {'error': {'message': 'the model failed.'}}], 'The', 'the model failed.'),
    (['The', OSError()], 'The', 'The connection broke before the answer ended.'),
    ([OSError()], '', 'The server does not answer. Is serve.py running?')]


def test_an_error_is_shown_and_retry_asks_again(open_page, stub):
    page = open_page()
    for n, (reply, text, error) in enumerate(ERRORS, 1):
        stub.replies['out/oasst'] = reply
        say(page, 'France?')
        expect(page.locator('.answer .error').last).to_have_text(error)
        done(page, n)
        assert texts(page)[-1] == text
        assert page.locator('#announce').text_content() == f'out/oasst: {error}'
        stub.replies['out/oasst'] = PARIS
        press(page, 'Retry')
        expect(page.locator('.answer .error').last).to_be_empty()
        done(page, n)
        assert texts(page)[-1] == ANSWER and stub.requests[-1] == stub.requests[-2]
    stub.replies['out/oasst'] = (500, 'broken')  # a Retry that brings nothing takes nothing
    press(page, 'Retry')
    expect(page.locator('.answer .error').last).to_have_text('broken')
    assert texts(page)[-1] == ANSWER


def test_what_is_written_stays_text(open_page, stub):
    attack = '<img src=x onerror="document.title=1"><script>document.title=2</script></p><b>'
    name = f'a{attack}'
    stub.models = [{**TUNED, 'id': name, 'description': attack}]
    stub.replies = {name: [attack, '```', attack]}
    page = open_page()
    ask(page, attack)
    assert texts(page) == [attack + attack]
    assert page.locator('.question').text_content() == attack
    stub.replies = {name: (400, attack)}
    say(page, attack)
    expect(page.locator('.answer .error').last).to_have_text(attack)
    press(page, 'New chat')
    assert page.locator('img, b').count() == 0 and page.title() == name


def test_a_phone_shows_all_without_scrolling_sideways(open_page, stub):
    stub.models = [{**TUNED, 'description': 'tuned ' * 40}, UNTUNED]
    stub.replies = {'out/oasst': ['a' * 300], 'gpt2-medium': ['```x = 1  # ' + 'y' * 300]}
    page = open_page(viewport={'width': 390, 'height': 844}, is_mobile=True, has_touch=True)
    ask(page, 'w' * 200, 2)
    size = page.evaluate("""() => [document.documentElement.scrollWidth,
        document.documentElement.scrollHeight, document.getElementById('log').scrollWidth]""")
    assert size == [390, 844, 390]


def test_everything_can_be_done_with_the_keyboard(open_page, stub):
    page = open_page()
    box = page.get_by_label('Message')
    for key in ('o', 'n', 'e', 'Shift+Enter', 't', 'w', 'o', 'Enter'):
        # Enter with isComposing ends an input method, as Japanese needs one, and sends nothing.
        box.dispatch_event('keydown', {'key': 'Enter', 'isComposing': True})
        assert stub.requests == []
        page.keyboard.press(key)
    done(page)
    expect(box).to_be_focused()
    assert said(stub.requests[0]) == ['one\ntwo'] and box.input_value() == ''
    order = []
    for _ in range(4):
        page.keyboard.press('Shift+Tab')
        order.append(page.evaluate('document.activeElement.id || document.activeElement.innerText'))
    assert order == ['Retry', 'Copy', 'log', 'delete']


def test_who_scrolls_up_to_read_stays_there(open_page, stub):
    lines = ''.join(f'{i}\n' for i in range(60))
    stub.replies['out/oasst'] = [lines, None, lines, 'end']
    page = open_page()
    log = page.locator('#log')
    say(page, 'Count')
    expect(page.locator('.text')).to_contain_text('58 59')
    # It has followed.
    assert log.evaluate('log => log.scrollHeight - log.scrollTop - log.clientHeight') < 2
    log.evaluate('log => { log.scrollTop = 200; }')
    stub.go.set()
    done(page)
    assert log.evaluate('log => log.scrollTop') == 200 and texts(page)[0].endswith('end')
