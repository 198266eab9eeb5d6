"""gpt2-medium on the 1,100 instructions of Raschka's "Build a Large Language Model".

    python data/alpaca/prepare.py --source=instruction-data --split=85/10/5
    python train.py config/finetune_instruction_data.py
    python sample.py --init_from=resume --user="What is an antonym of 'complicated'?"

The smallest real run here. For the same two passes the book (chapter 7) reports 0.86
minutes on an A100, 1.8 on an L4 and 16 on the CPU of an M3 MacBook Air. With little
memory: --init_from=gpt2.

As published (the book, and the two teaching versions made from it) / here
- The same: 935/55/110 entries by position, two passes, AdamW at 5e-5 with weight
  decay 0.1 and no schedule, no loss on padding, the first <|endoftext|> learned.
- One first sentence for all prompts / Stanford's other one where there is an input.
- Loss on prompts and responses (val_loss 0.66) / on responses. As published:
  --loss_on=all. Prompts are the easy four fifths of the tokens: do not compare.
- Batches of 8 padded entries / rows of 512 positions, which hold 8.4 on average.
- AdamW's beta2 0.999, no clipping / the same, set below.
- Split by position, 4 entries of val and 2 of test have prompts that stand in train as
  well. Prepare without --split, and a hash of the prompt decides: none has.
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
