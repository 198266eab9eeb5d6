"""The demo's base: prose about 195 countries, from scratch, on one CPU core.

    python demo/prepare.py
    python train.py config/demo_base.py
"""
out_dir = 'out/demo-base'
init_from = 'scratch'
data_dir = '.'
dataset = 'demo/prose'

# 0.5 M parameters, 0.2 M of them the embedding of 2,048 tokens.
n_layer = 3
n_head = 4
n_embd = 96

# 8 rows of 128 positions a step: in the same time, many small steps learn more.
block_size = 128
batch_size = 8
gradient_accumulation_steps = 1

# 1,250 * 8 * 128 = 1.3 M tokens, 2.4 passes.
max_iters = 1250
eval_interval = 1250
log_interval = 250

learning_rate = 3e-3
warmup_iters = 100
weight_decay = 0.1

# At this width bfloat16 spends more on conversions than it saves.
dtype = 'float32'
