"""The demo's tuned model: the base learns to answer and keeps what it knows.

    python train.py config/demo_base.py
    python train.py config/demo_tune.py
    python sample.py --out_dir=out/demo --user="What's the capital of France?"
"""
out_dir = 'out/demo'
init_from = 'out/demo-base'
data_dir = '.'

# Conversations and the base's own prose, three tokens to one: it forgets nothing.
# To see it forget: --dataset=demo/chat. The first data set decides the template.
dataset = 'demo/chat,demo/prose'

block_size = 128
batch_size = 8
gradient_accumulation_steps = 1

# 1,700 * 8 * 128 = 1.7 M tokens, 0.8 passes.
max_iters = 1700
eval_interval = 1700
log_interval = 250

learning_rate = 2e-3
warmup_iters = 100
weight_decay = 0.1

dtype = 'float32'
