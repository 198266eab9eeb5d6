"""gpt2-medium on the 1,100 instructions of Raschka's "Build a Large Language Model".

    python data/alpaca/prepare.py --source=instruction-data --split=85/10/5
    python train.py config/finetune_instruction_data.py
    python sample.py --init_from=resume --user="What is an antonym of 'complicated'?"

The smallest real run here. For the same two passes the book (chapter 7) reports
0.86 minutes on an A100, 1.8 on an L4 and 16 on the CPU of an M3 MacBook Air.
With little memory: --init_from=gpt2.

As published (the book and its two teaching versions) / here
- 935/55/110 entries by position, two passes, AdamW at 5e-5, no schedule, no loss
  on padding / the same.
- One first sentence for all prompts / Stanford's other one if there is an input.
- Loss on prompts, too (val_loss 0.66) / on responses. As published:
  --loss_on=all. Prompts are four fifths of the tokens, and easy: do not compare.
- Batches of 8 padded entries / rows of 512 positions, which hold 8.4 on average.
- Split by position, 4 prompts of val and 2 of test stand in train, too. Prepare
  without --split, and none does.
"""
out_dir = 'out/instruction-data'
init_from = 'gpt2-medium'
dataset = 'instruction-data'

# The 935 entries fill 111 rows: one row is a step, 222 steps in all.
batch_size = 1
gradient_accumulation_steps = 1
block_size = 512
epochs = 2.0
# three times a pass
eval_interval = 37

learning_rate = 5e-5
decay_lr = False
warmup_iters = 0
weight_decay = 0.1
beta2 = 0.999
grad_clip = 0.0
dropout = 0.0
