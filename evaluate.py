"""Questions in, answers and scores out, for any model."""
import torch

import conversation
from model import generate


def answer_all(opened, template, questions, max_new_tokens=64, temperature=0.0, seed=1337, batch_size=256):
    """The answer texts of a model to each list of turns in questions, in their order.

    Prompts of equal length are answered together, so that no padding is needed and every answer is
    what it would be alone.
    """
    tokenizer, stops = opened.tokenizer, conversation.stop_ids(opened.tokenizer, template)
    prompts = [conversation.prompt(turns, tokenizer, template) for turns in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [[] for _ in prompts]
    while order:
        length = len(prompts[order[0]])
        group = [i for i in order[:batch_size] if len(prompts[i]) == length]
        order = order[len(group):]
        still_open = set(range(len(group)))
        idx = torch.tensor([prompts[i] for i in group], device=opened.model.device)
        for tokens in generate(opened.model, idx, max_new_tokens, temperature=temperature, seed=seed):
            for j, token in enumerate(tokens.tolist()):
                if j in still_open:
                    found[group[j]].append(token)
                    still_open -= {j} if token in stops else set()
            if not still_open:
                break
    return [conversation.answer_text(ids, tokenizer, template) for ids in found]
