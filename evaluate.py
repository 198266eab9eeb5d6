"""Questions in, answers and scores out, for any model."""
import conversation
from model import generate


def answer_all(opened, template, questions, max_new_tokens=64, temperature=0.0, seed=1337, batch_size=128):
    """The answer texts of a model to each list of turns in questions, in their order.

    Prompts of similar length are answered together; greedy answers are what they would be alone.
    """
    tokenizer, stops = opened.tokenizer, conversation.stop_ids(opened.tokenizer, template)
    prompts = [conversation.prompt(turns, tokenizer, template) for turns in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        group = order[start:start + batch_size]
        for tokens in generate(opened.model, [prompts[i] for i in group], max_new_tokens, temperature=temperature,
                               seed=seed, stops=stops):
            for i, token in zip(group, tokens):
                if token is not None:
                    found[i].append(token)
    return [conversation.answer_text(ids, tokenizer, template) for ids in found]
