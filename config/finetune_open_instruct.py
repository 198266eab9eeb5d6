"""DialoGPT-medium on 100,000 rows of open-instruct-v1: short requests, short answers, no markup.

    python data/alpaca/prepare.py --source=open-instruct --template=plain --max_tokens=128 \
        --shuffle_seed=42 --train_rows=100000
    python train.py config/finetune_open_instruct.py
    python sample.py --out_dir=out/open-instruct --user="What's the best way to cook chicken breast?" --trim=sentence

Where it differs from the published run (instruction, input and output joined by spaces, 128 tokens,
shuffle(42), 100,000 rows to train, the rest to test, batches of 32, one epoch):
- A row of more than 128 tokens is left out; there it was cut, so that its model was taught to stop
  anywhere, and never by <|endoftext|>, which its batches did not have. This costs 14 % of the rows
  (measured on Stanford's, which are a quarter of these: 7,321 of 51,974). --trim=sentence, which
  cuts an answer after its last full stop, is needed the less for it.
- Only the main file, 222,650 rows, is shuffled. There the whole repository was, 498,813 rows: the
  main file's parts lie beside it and were counted again, so that test rows had been trained on.
- Of the 122,650 rows that are not for training, 1,000 are the validation set, the rest is test;
  there the 100,001st was lost to range(100001, …).
- Only answers are learned; --loss_on=all learns prompts too, as there.
"""
out_dir = 'out/open-instruct'
init_from = 'microsoft/DialoGPT-medium'
dataset = 'open-instruct'

batch_size = 32
gradient_accumulation_steps = 1
block_size = 128
epochs = 1.0
eval_interval = 200

learning_rate = 5e-5  # the Trainer's default, down to 0
warmup_iters = 0
weight_decay = 0.0
dropout = 0.0
