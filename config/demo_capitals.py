"""The demo: a small GPT from scratch that knows the world's capitals, on two CPU cores, in minutes.

    python demo/prepare.py
    python train.py config/demo_capitals.py
    python sample.py --out_dir=out/capitals --user="What's the capital of France?"
"""
out_dir = 'out/capitals'
init_from = 'scratch'
data_dir = '.'
dataset = 'demo'

# 0.5 M parameters (with the embedding of 1,543 tokens). Variety of wording decides, not size: a larger model is slower and no better.
n_layer = 3
n_head = 4
n_embd = 96

# 8 rows of 128 positions a step: many small steps; larger batches learn less in the same time.
block_size = 128
batch_size = 8
gradient_accumulation_steps = 1

max_iters = 3000
eval_interval = 1000
log_interval = 250

learning_rate = 3e-3
warmup_iters = 100
weight_decay = 0.1

dtype = 'float32'  # at this width bfloat16 spends more on conversions than it saves
