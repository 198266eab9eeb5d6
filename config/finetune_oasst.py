"""gpt2-medium on OpenAssistant: questions and first answers, as tagged conversations.

    python data/oasst/prepare.py
    python train.py config/finetune_oasst.py
    python sample.py --init_from=resume --user="What's the capital of France?"
    python evaluate.py --models=gpt2-medium,out/oasst --dataset=oasst

Memory on a GPU: 355e6 parameters * 16 bytes = 5.7 GB, and the backward pass takes
up to 7 GB. Under 16 GB: --batch_size=1 --gradient_accumulation_steps=32, the same
step. On a CPU: config/finetune_oasst_cpu.py.

As published (the blog post behind this project) / here
- gpt2-medium, the tags, the root of a tree with each direct reply / the same.
- oasst1 in all languages / oasst2 in English, without deleted and rejected
  messages. As published: --source=oasst1 --lang=all.
- Tags as plain text, each on its own line / single tokens, nothing between them.
- Loss on every token / on the answers. As published: --loss_on=all.
- Conversations run on into each other / each is isolated, and longer ones cut.
- No loss was published. Ours is not known: no weights could be downloaded.
"""
out_dir = 'out/oasst'
init_from = 'gpt2-medium'
dataset = 'oasst'

# 4 rows * 8 micro-batches * 1024 positions: about 32,000 tokens a step
batch_size = 4
gradient_accumulation_steps = 8
block_size = 1024

# Small sets are learned in two passes; a third mostly overfits.
epochs = 2.0
eval_interval = 50
patience = 3

learning_rate = 3e-5  # nanoGPT's for fine-tuning
warmup_iters = 20
weight_decay = 0.1
dropout = 0.0
