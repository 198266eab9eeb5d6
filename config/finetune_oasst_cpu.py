"""The OpenAssistant recipe for a laptop: distilgpt2, rows of 512 positions.

    python data/oasst/prepare.py --max_tokens=513
    python train.py config/finetune_oasst_cpu.py
    python sample.py --init_from=resume --user="What's the capital of France?"

513 tokens fill 512 positions: the last one is only predicted. How this differs
from the published run: see config/finetune_oasst.py.
"""
out_dir = 'out/oasst-cpu'
init_from = 'distilgpt2'
dataset = 'oasst'

# 4 rows * 4 micro-batches * 512 positions: about 8,000 tokens a step
batch_size = 4
gradient_accumulation_steps = 4
block_size = 512

max_iters = 300
eval_interval = 50
log_interval = 1

# Higher than for the large model: a step sees a quarter of the tokens.
learning_rate = 5e-5
warmup_iters = 10
