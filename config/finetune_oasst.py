"""gpt2-medium on OpenAssistant: question and first answers, as XML-tagged conversations.

    python data/oasst/prepare.py
    python train.py config/finetune_oasst.py
    python sample.py --out_dir=out/oasst --user="What's the capital of France?"
    python evaluate.py --models=gpt2-medium,out/oasst --dataset=oasst --quiz=capitals   # before and after

Needs about 12 GB on a GPU: 355 M parameters in float32 with gradients and AdamW's two moments are
355e6 * 16 bytes = 5.7 GB, the rest is what a micro-batch keeps for the way back. Less memory:
--batch_size=1 --gradient_accumulation_steps=32, the same step in smaller pieces.
On a CPU take config/finetune_oasst_cpu.py.
"""
out_dir = 'out/oasst'
init_from = 'gpt2-medium'
dataset = 'oasst'

# 4 rows * 8 micro-batches * 1024 positions: about 32,000 tokens a step
batch_size = 4
gradient_accumulation_steps = 8
block_size = 1024

# Two passes: small data sets of instructions are learned by then, and a third mostly overfits.
epochs = 2.0
eval_interval = 50
patience = 3

learning_rate = 3e-5  # nanoGPT's for fine-tuning
warmup_iters = 20
weight_decay = 0.1
dropout = 0.0
