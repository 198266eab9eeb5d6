"""Back to turns: from ids, from the text of --stdout, from chat messages.

    python -c "from core import readback; print(readback.from_text('<conversation>…'))"
"""
import re

from core.conversation import TAG_NAMES, TEMPLATES, Turn, encode

ROLES = ('user', 'assistant')
ESCAPED_TAG = re.compile(rf'<\\(\\*)({TAG_NAMES})')


def decode(ids, mask, tokenizer, template='xml'):
    """The turns that `encode` made these from; ValueError for other ids."""
    ids = [int(i) for i in ids]
    mask = [bool(m) for m in mask]
    form = TEMPLATES[template]
    read = read_exchanges if '{text}' in form.user[-1] else read_messages
    try:
        turns = read(ids, mask, tokenizer, form)
        whole = encode(turns, tokenizer, template)[0].tolist()
        # One that was cut ends in an answer, whose text may have other ids by itself.
        is_cut = ids and mask[-1] and ids[-1] not in tokenizer.special.values()
        begins = tokenizer.decode_bytes(whole).startswith(tokenizer.decode_bytes(ids))
        if whole == ids or is_cut and begins:
            return turns
    # An unknown id, half a character or a forged heading.
    except (KeyError, ValueError):
        pass
    raise ValueError(f'not a conversation of the template {template!r}: the ids {ids[:20]} …')


def read_messages(ids, mask, tokenizer, form):
    """A special token ends each message; the roles take turns."""
    ends = {tokenizer.special[form.user[-1]], tokenizer.special[form.assistant[-1]]}
    turns = []
    text = []
    for token, learned in zip(ids, mask):
        if token in ends:
            role = ROLES[len(turns) % 2]
            text = tokenizer.decode_bytes(text).decode()
            turns.append(Turn(role, text, supervised=role == 'user' or learned))
            text = []
        elif token not in tokenizer.special.values():
            text.append(token)
    if text:
        turns.append(Turn('assistant', tokenizer.decode_bytes(text).decode()))
    return turns


def read_exchanges(ids, mask, tokenizer, form):
    """<|endoftext|> ends an exchange. The mask says where its answer begins."""
    turns = []
    start = 0
    while start < len(ids):
        answer_start = mask.index(True, start)
        end = [*ids, tokenizer.end_of_text].index(tokenizer.end_of_text, start)
        request = tokenizer.decode_bytes(ids[start:answer_start]).decode()
        answer = tokenizer.decode_bytes(ids[answer_start:end]).decode()
        turns.append(read_request(request, form))
        turns.append(Turn('assistant', answer[len(form.lead):]))
        start = end + 1
    return turns


def read_request(request, form):
    """The user's turn that this prompt was made from."""
    forms = form.user
    # Without headings, text and context cannot be told apart.
    if form.headings:
        forms = form.user_with_context + forms
    for part in forms:
        # The form as a regular expression, with a group for each thing in braces.
        pattern = re.sub(r'\\{\w+\\}', '(.*)', re.escape(part))
        found = re.fullmatch(pattern, request, re.DOTALL)
        if found:
            return Turn('user', *found.groups())
    raise ValueError('not a prompt of this template')


def from_text(text):
    """The conversations in text that `conversation.to_text` wrote."""
    found = []
    for whole in re.findall('<conversation>(.*?)</conversation>', text, re.DOTALL):
        turns = []
        for role, body in re.findall(r'<(user|assistant)>(.*?)</\1>', whole, re.DOTALL):
            turns.append(Turn(role, ESCAPED_TAG.sub(r'<\1\2', body)))
        found.append(turns)
    return found


def from_messages(messages):
    """The turns of [{'role': …, 'content': text or None}, …].

    Messages of the same role in a row are joined by a blank line. System messages, for which
    no template has a place, go before the first user's text.
    """
    turns = []
    system = ''
    for message in messages:
        role = message['role']
        content = message['content'] or ''
        if role in ('system', 'developer'):
            system += f'{content}\n\n'
        elif turns and turns[-1].role == role:
            turns[-1] = Turn(role, f'{turns[-1].text}\n\n{content}')
        else:
            turns.append(Turn(role, content))
    for i, turn in enumerate(turns):
        if turn.role == 'user':
            turns[i] = Turn('user', system + turn.text)
            return turns
    raise ValueError('there is no message of a user')
