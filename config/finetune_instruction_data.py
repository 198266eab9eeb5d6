"""gpt2-medium on the 1,100 instructions of Raschka's "Build a Large Language Model", chapter 7.

    python data/alpaca/prepare.py --source=instruction-data --split=85/10/5
    python train.py config/finetune_instruction_data.py
    python sample.py --out_dir=out/instruction-data --user="What is an antonym of 'complicated'?"

The smallest real run here: the book reports 0.86 minutes on an A100, 1.8 on an L4 and 16 on the CPU
of an M3 MacBook Air for the same two passes, and val_loss 0.66. Little memory: --init_from=gpt2.

Where it differs from the book: an entry with an input gets Stanford's sentence for that case (the
book has one sentence for both), and only responses are learned. With --loss_on=all it learns prompts
too, as the book does; both ignore padding, of which there is none here, and learn the first
<|endoftext|>. The two val_loss cannot be compared: prompts are the easy four fifths of the tokens.

The split is the book's, 935/55/110 by position. In it the prompts of 4 entries of val and of 2 of test
stand in train as well. Prepared without --split, a hash of the prompt decides and none does.
"""
out_dir = 'out/instruction-data'
init_from = 'gpt2-medium'
dataset = 'instruction-data'

# A row of 512 positions holds 8.4 of the conversations: the book's batch of 8. The 935 fill 111 rows.
batch_size = 1
gradient_accumulation_steps = 1
block_size = 512
max_iters = 2 * 111
eval_interval = 37  # three times a pass

# the book's: the rate does not change
learning_rate = 5e-5
decay_lr = False
warmup_iters = 0
weight_decay = 0.1
dropout = 0.0
