"""The chat page in a real browser, headless Chromium, beside a server that answers by script."""
import json
import re

import pytest

from chat_page import CHROMIUM, PARIS, TUNED, UNTUNED, Stub, chromium, contrasts, say

expect = pytest.importorskip('playwright.sync_api', reason='playwright is not installed').expect
expect.set_options(timeout=30_000)  # of a machine with other things to do


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
    """open_page(**options of the browser's context) → the page, open; what it should not have done fails the test."""
    contexts, faults = [], []

    def watch(page):
        page.on('pageerror', lambda error: faults.append(f'error in the script: {error}'))
        page.on('console', lambda message: message.type in ('error', 'warning') and
                not message.text.startswith('Failed to load resource') and faults.append(message.text))  # what it says of a 429
        page.on('request', lambda request: request.url.startswith((stub.url, 'data:', 'blob:')) or faults.append(request.url))

    def open_page(script=None, **options):
        contexts.append(browser.new_context(**{'viewport': {'width': 1000, 'height': 700}, **options}))
        contexts[-1].on('page', watch)
        if script:
            contexts[-1].add_init_script(script)
        page = contexts[-1].new_page()
        page.goto(stub.url)
        expect(page.locator('#title')).not_to_have_text('Chat')  # it knows the models
        return page
    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def done(page, n=1):
    """Wait until n answers stand there and none is being written."""
    expect(page.locator('article .answer')).to_have_count(n)
    expect(page.locator('[aria-busy=true]')).to_have_count(0)
    expect(page.get_by_role('button', name='Send')).to_be_visible()


def texts(page):
    return page.locator('article .text').evaluate_all('all => all.map(one => one.textContent)')


def roles(request):
    return [(message['role'], message['content']) for message in request['messages']]


def test_an_answer_grows_as_it_comes(open_page, stub):
    stub.replies['out/oasst'] = ['The  capital\n\n', '    is', None, ' Paris.  ']
    page = open_page()
    say(page, ' What\n  is it?')
    expect(page.locator('.foot')).to_have_text('writing…')
    expect(page.locator('.text')).to_have_text('The capital is')
    stub.go.set()
    done(page)
    assert texts(page) == ['The  capital\n\n    is Paris.  '] and page.locator('.question').text_content() == ' What\n  is it?'
    assert page.locator('.text').evaluate('p => getComputedStyle(p).whiteSpaceCollapse') == 'preserve'
    assert page.locator('.foot').text_content() == '7 tokens · 41.3 tokens/s'
    assert page.locator('#announce').text_content() == 'out/oasst: The  capital\n\n    is Paris.  '  # read out once, whole
    [request] = stub.requests
    assert request == {'model': 'out/oasst', 'messages': [{'role': 'user', 'content': ' What\n  is it?'}], 'temperature': 0.7,
                       'max_tokens': 256, 'truncation': 'auto', 'stream': True, 'stream_options': {'include_usage': True}}


@pytest.mark.parametrize('how', ['Escape', 'button', 'New chat', 'reload'])
def test_stopping_closes_the_connection(open_page, stub, how):
    stub.replies['out/oasst'] = ['One, two', None, ', three']
    page = open_page()
    say(page, 'Count')
    expect(page.locator('.text')).to_have_text('One, two')
    if how == 'Escape':
        page.keyboard.press('Escape')
    elif how == 'reload':
        page.reload()
    else:
        page.get_by_role('button', name='Stop' if how == 'button' else how).click()
    assert stub.left.wait(30)
    if how == 'New chat':
        page.get_by_role('button', name='Bring back').click()
    done(page)
    assert texts(page) == ['One, two'] and page.locator('.foot').text_content() == 'stopped'
    stub.replies['out/oasst'] = ['five']
    say(page, 'Go on')
    done(page, 2)
    assert roles(stub.requests[-1]) == [('user', 'Count'), ('assistant', 'One, two'), ('user', 'Go on')]


def test_retry_asks_the_last_question_again(open_page, stub):
    page = open_page()
    for text, n in (('France?', 1), ('Again?', 2)):
        say(page, text)
        done(page, n)
    stub.replies['out/oasst'] = ['Lyon.']
    page.get_by_role('button', name='Retry').click()
    expect(page.locator('.text').last).to_have_text('Lyon.')
    done(page, 2)
    assert stub.requests[2] == stub.requests[1] and texts(page) == ['The capital of France is Paris.', 'Lyon.']
    stub.replies['out/oasst'] = (500, [], {'message': 'broken'})  # a Retry that brings nothing takes nothing
    page.get_by_role('button', name='Retry').click()
    expect(page.locator('.answer .error').last).to_contain_text('broken. Retry')
    assert texts(page)[1] == 'Lyon.'


def test_two_models_side_by_side_each_with_its_own_answers(open_page, stub):
    stub.models = [UNTUNED, TUNED]
    page = open_page()
    say(page, 'France?')
    done(page, 2)
    say(page, 'And Japan?')
    done(page, 4)
    assert page.locator('article .name').all_text_contents() == ['out/oasst', 'gpt2-medium'] * 2
    sent = {request['model']: roles(request) for request in stub.requests[2:]}
    assert sent == {name: [('user', 'France?'), ('assistant', ''.join(stub.replies[name])), ('user', 'And Japan?')]
                    for name in ('out/oasst', 'gpt2-medium')}
    left, right = (page.locator('.answer').nth(i).bounding_box() for i in (2, 3))
    assert left['y'] == right['y'] and left['x'] + left['width'] < right['x'] and left['width'] == right['width']
    page.set_viewport_size({'width': 390, 'height': 844})
    above, below = (page.locator('.answer').nth(i).bounding_box() for i in (2, 3))
    assert above['y'] + above['height'] < below['y'] and above['x'] == below['x']
    stub.replies['gpt2-medium'] = []  # no words: as turns must alternate, it is not told of this question again
    for text, n in (('And Peru?', 6), ('And Chile?', 8)):
        say(page, text)
        done(page, n)
    sent = {request['model']: [text for _, text in roles(request)] for request in stub.requests[6:]}
    assert 'And Peru?' in sent['out/oasst'] and 'And Peru?' not in sent['gpt2-medium'] and len(sent['gpt2-medium']) == 5


def test_a_reload_keeps_chat_settings_and_draft_and_another_tab_has_them_too(open_page, stub):
    page = open_page()
    other = page.context.new_page()
    other.goto(page.url)
    page.bring_to_front()
    page.get_by_label('Temperature').fill('0')
    expect(page.locator('#degrees')).to_have_text('greedy')
    page.get_by_label('Length').fill('12')
    say(page, 'France?')
    done(page)
    assert (stub.requests[0]['temperature'], stub.requests[0]['max_tokens']) == (0, 12)
    done(other)
    assert texts(other) == ['The capital of France is Paris.']
    other.close()
    page.get_by_label('Message').fill('a dra')
    page.reload()
    done(page)
    assert texts(page) == ['The capital of France is Paris.'] and page.locator('.question').text_content() == 'France?'
    assert page.get_by_label('Message').input_value() == 'a dra'
    say(page, 'And Japan?')
    done(page, 2)
    assert (stub.requests[1]['temperature'], stub.requests[1]['max_tokens']) == (0, 12)
    assert roles(stub.requests[1])[:2] == [('user', 'France?'), ('assistant', 'The capital of France is Paris.')]


def test_broken_contents_of_the_storage_begin_a_new_chat(open_page, stub):
    page = open_page("""const planted = window.origin !== 'null' && sessionStorage.getItem('planted');
        if (planted) { localStorage.setItem('serve.py', planted); sessionStorage.clear(); }""")
    for kept in ('no JSON', 'null', '7', '[]', '{"exchanges": 3, "temperature": "hot", "max_tokens": {}, "draft": 5}',
                 '{"exchanges": [null], "temperature": 99, "max_tokens": -1}', '{"exchanges": [{"user": "a"}], "previous": {}}',
                 '{"exchanges": [{"user": "a", "answers": {"m": {"text": 1}}}]}', '{"exchanges": [{"user": {}, "answers": {}}]}'):
        page.evaluate("kept => sessionStorage.setItem('planted', kept)", kept)
        page.reload()
        expect(page.get_by_role('heading', name='Ask the model something')).to_be_visible()
        say(page, 'France?')
        done(page)
        request = stub.requests.pop()
        assert 0 <= request['temperature'] <= 2 and 1 <= request['max_tokens'] <= 1023, kept


@pytest.mark.parametrize('script', [
    "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('denied', 'SecurityError'); }})",
    "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }"])
def test_without_storage_the_page_says_so_and_works(open_page, script):
    page = open_page(script)
    say(page, 'France?')
    done(page)
    assert texts(page) == ['The capital of France is Paris.']
    expect(page.get_by_role('alert')).to_contain_text('Export before you leave')


def test_new_chat_can_be_taken_back(open_page, stub):
    page = open_page()
    expect(page.get_by_role('button', name='Bring back')).to_have_count(0)
    say(page, 'France?')
    done(page)
    for _ in range(2):  # a New chat of a new chat loses nothing either
        page.get_by_role('button', name='New chat').click()
    assert texts(page) == []
    page.reload()
    page.get_by_role('button', name='Bring back').click()
    done(page)
    assert texts(page) == ['The capital of France is Paris.']
    page.get_by_role('button', name='New chat').click()
    page.get_by_role('button', name="What's the capital of France?").click()  # an example
    done(page)
    assert roles(stub.requests[-1]) == [('user', "What's the capital of France?")]


def test_export_holds_every_model_with_its_messages_and_settings(open_page, stub, tmp_path):
    stub.models, stub.finish = [TUNED, UNTUNED], 'length'
    page = open_page()
    say(page, 'France? 🙂 <b>')
    done(page, 2)
    stub.replies['gpt2-medium'] = (429, [], {'message': 'full'})
    say(page, 'Japan?')
    done(page, 4)
    assert page.locator('.foot').first.text_content().endswith('…(length limit)')
    with page.expect_download() as download:
        page.get_by_role('button', name='Export').click()
    assert re.fullmatch(r'chat-\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.json', download.value.suggested_filename)
    download.value.save_as(tmp_path / 'chat.json')
    exported = json.loads((tmp_path / 'chat.json').read_text())
    question, other = {'role': 'user', 'content': 'France? 🙂 <b>'}, {'role': 'user', 'content': 'Japan?'}
    answer = {'finish_reason': 'length', 'completion_tokens': 7, 'temperature': 0.7, 'max_tokens': 256}
    paris = {'role': 'assistant', 'content': 'The capital of France is Paris.'}
    assert exported['conversations'] == [
        {'model': 'out/oasst', 'description': TUNED['description'], 'answers': [answer] * 2,
         'messages': [question, paris, other, paris]},
        {'model': 'gpt2-medium', 'description': UNTUNED['description'], 'answers': [answer],
         'messages': [question, {'role': 'assistant', 'content': ' France?'}, other]}]


ERRORS = [
    ((429, [('Retry-After', '3')], {'message': '16 wait'}), '', '16 wait. Too many are asking at once: Retry in 3 s.'),
    ((429, [], {'message': '16 wait.'}), '', '16 wait. Too many are asking at once: Retry in a moment.'),
    ((500, [], {'message': 'the model failed'}), '', 'the model failed. Retry; the terminal of serve.py may say more.'),
    ((502, [], None), '', 'The server answered 502. Retry; the terminal of serve.py may say more.'),
    ((404, [], {'message': 'no such model'}), '', 'no such model. Reload the page: the server may have another model by now.'),
    ((400, [], {'message': 'too long', 'code': 'context_length_exceeded'}), '', 'too long. Write less, or start a New chat.'),
    (['The', {'error': {'message': 'the model failed'}}], 'The', 'the model failed. Retry; the terminal of serve.py may say more.'),
    (['The', OSError()], 'The', 'The connection broke before the answer ended. Retry.'),
    ([OSError()], '', 'The server does not answer. Start serve.py again, then Retry.')]


def test_an_error_says_what_to_do_and_retry_does_it(open_page, stub):
    page = open_page()
    for n, (reply, text, error) in enumerate(ERRORS, 1):
        stub.replies['out/oasst'] = reply
        say(page, 'France?')
        expect(page.locator('.answer .error').last).to_have_text(error)
        done(page, n)
        assert texts(page)[-1] == text and page.locator('#announce').text_content() == f'out/oasst: {error}'
        stub.replies['out/oasst'] = PARIS
        page.get_by_role('button', name='Retry').click()
        expect(page.locator('.answer .error').last).to_be_empty()
        done(page, n)
        assert texts(page)[-1] == 'The capital of France is Paris.'


def test_the_page_finds_a_server_that_comes_back(open_page, stub):
    page = open_page()
    stub.server_close()
    say(page, 'France?')
    expect(page.locator('.answer .error').last).to_contain_text('Start serve.py again')
    page.route('**/v1/models', lambda route: route.abort())
    with Stub(stub.server_port):
        page.reload()
        expect(page.get_by_role('alert')).to_contain_text('Is serve.py running?')
        page.unroute('**/v1/models')
        expect(page.get_by_role('alert')).to_be_empty()
        page.get_by_role('button', name='Retry').click()
        expect(page.locator('.text')).to_have_text('The capital of France is Paris.')


def test_what_is_written_stays_text(open_page, stub):
    attack = '<img src=x onerror="document.title=\'hacked\'"><script>document.title="hacked"</script></p><b>'
    stub.models = [{**TUNED, 'id': f'a{attack}', 'description': attack}]
    stub.replies = {f'a{attack}': [attack]}
    page = open_page()
    say(page, attack)
    done(page)
    assert texts(page) == [attack] and page.locator('.question').text_content() == attack
    page.reload()
    done(page)
    stub.replies = {f'a{attack}': (400, [], {'message': attack})}
    say(page, attack)
    expect(page.locator('.answer .error').last).to_contain_text(attack)
    assert page.locator('img, b').count() == 0 and page.title() == f'a{attack}'


def test_a_phone_shows_all_without_scrolling_sideways(open_page, stub):
    stub.models = [{**TUNED, 'description': 'tuned ' * 40}, {**UNTUNED, 'id': 'models/' + 'long' * 30}]
    stub.replies = {'out/oasst': ['a' * 300], stub.models[1]['id']: ['x = 1  # ' * 40]}
    page = open_page(viewport={'width': 390, 'height': 844}, is_mobile=True, has_touch=True)
    for n in (0, 2):
        if n:
            say(page, 'w' * 200)
            done(page, n)
        root = page.locator('html')
        assert root.evaluate('root => [root.scrollWidth, root.scrollHeight]') == [390, 844]
        outside = page.locator('body *:not(.hidden)').evaluate_all("""all => all.filter(one => one.checkVisibility() &&
            (one.getBoundingClientRect().right > 390 || one.getBoundingClientRect().left < 0)).map(one => one.outerHTML)""")
        assert outside == [] and page.locator('#log').evaluate('log => log.scrollWidth <= log.clientWidth')


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_contrast(open_page, stub, scheme):
    page = open_page(color_scheme=scheme)
    seen = contrasts(page)
    stub.replies['out/oasst'] = ['The', {'error': {'message': 'broken'}}]
    say(page, 'France?')
    expect(page.locator('.answer .error').last).to_contain_text('broken')
    page.get_by_role('button', name='Keys').click()
    seen += contrasts(page)
    assert len(seen) > 30 and [pair for pair in seen if pair[0] < 4.5] == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 128")
    assert dark == (scheme == 'dark')


def test_everything_can_be_done_with_the_keyboard(open_page, stub):
    page = open_page()
    box, keys = page.get_by_label('Message'), page.keyboard
    expect(box).to_be_focused()
    keys.press('ArrowUp')  # nothing to bring back yet
    keys.type('one')
    keys.press('Shift+Enter')
    keys.type('two')
    assert box.input_value() == 'one\ntwo' and stub.requests == []
    keys.press('Enter')
    done(page)
    expect(box).to_be_focused()
    assert roles(stub.requests[0]) == [('user', 'one\ntwo')] and box.input_value() == ''
    keys.press('Enter')  # nothing to send
    keys.press('ArrowUp')
    assert box.input_value() == 'one\ntwo' and len(stub.requests) == 1
    keys.press('ArrowUp')  # in a text it moves the cursor
    keys.type('!')
    assert box.input_value() in ('one!\ntwo', '!one\ntwo')
    keys.press('Shift+Tab')
    expect(page.get_by_role('button', name='Retry')).to_be_focused()
    keys.press('Enter')
    expect(box).to_be_focused()
    done(page)
    assert len(stub.requests) == 2
    keys.press('Escape')  # nothing to stop
    order = []
    for _ in range(9):  # all around, over the browser's own
        keys.press('Tab')
        order.append(page.evaluate("""() => { const {id, textContent, tagName} = document.activeElement;
            return [tagName === 'BODY' ? '' : id || textContent, getComputedStyle(document.activeElement).outlineStyle]; }"""))
    assert order == [[name, 'solid' if name else 'none'] for name in
                     ('send', 'temperature', 'limit', '', 'new', 'export', 'Keys', 'log', 'Retry')]
    page.get_by_role('button', name='Keys').press('Enter')
    expect(page.get_by_role('heading', name='Keys')).to_be_visible()
    keys.press('Escape')
    expect(page.get_by_role('heading', name='Keys')).to_be_hidden()
    for name in ('New chat', 'Export'):
        page.get_by_role('button', name=name).press('Enter')
        expect(box).to_be_focused()


def test_the_enter_that_ends_an_input_method_sends_nothing(open_page, stub):
    page = open_page()
    devtools = page.context.new_cdp_session(page)
    devtools.send('Input.imeSetComposition', {'text': 'にほん', 'selectionStart': 3, 'selectionEnd': 3})
    devtools.send('Input.dispatchKeyEvent', {'type': 'rawKeyDown', 'key': 'Enter', 'code': 'Enter', 'windowsVirtualKeyCode': 229})
    page.get_by_label('Message').dispatch_event('keydown', {'key': 'Enter', 'isComposing': True})
    devtools.send('Input.insertText', {'text': '日本'})
    assert page.get_by_label('Message').input_value() == '日本' and stub.requests == []
    page.keyboard.press('Enter')
    done(page)
    assert roles(stub.requests[0]) == [('user', '日本')]


def test_who_scrolls_up_to_read_stays_there(open_page, stub):
    lines = ''.join(f'{i}\n' for i in range(60))
    stub.replies['out/oasst'] = [lines, None, lines, 'end']
    page = open_page()
    boxes = lambda: [page.locator(one).bounding_box() for one in ('header', '#log', '#input', '.settings')]  # noqa: E731
    before = boxes()
    say(page, 'Count')
    expect(page.locator('.text')).to_contain_text('58 59')
    from_end = 'log => Math.round(log.scrollHeight - log.scrollTop - log.clientHeight)'
    log = page.locator('#log')
    assert log.evaluate(from_end) <= 1 and boxes() == before  # it has followed, and the frame has not moved
    log.evaluate('log => { log.scrollTop = 200; }')
    stub.go.set()
    done(page)
    assert log.evaluate('log => log.scrollTop') == 200 and texts(page)[0].endswith('end')
    say(page, 'Again')  # who asks wants to see
    done(page, 2)
    assert log.evaluate(from_end) <= 1
