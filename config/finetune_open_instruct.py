"""DialoGPT-medium on 100,000 rows of open-instruct-v1: short answers, no markup.

    python data/alpaca/prepare.py --source=open-instruct --template=plain \
        --max_tokens=128 --shuffle_seed=42 --train_rows=100000
    python train.py config/finetune_open_instruct.py
    python sample.py --init_from=resume --user="Should I invest in stocks?" \
        --trim=sentence --temperature=0 --max_new_tokens=64

As published ("GPT-2 Instruct") / here
- DialoGPT-medium; instruction, input and output joined by spaces; 128 tokens;
  shuffle 42, 100,000 rows; one epoch of batches of 32, 5e-5 falling to 0, no
  weight decay; answers cut at the last full stop / the same.
- Linear decay / cosine decay.
- 498,813 rows, parts counted twice, so that test rows had been trained on / the
  main file's 222,650.
- Loss on every token, never on <|endoftext|> / on answers and their end. Prompts
  as well: --loss_on=all.
- Padded / packed: 17 rows hold about the 32 examples of a published step.
- Greedy answers of 64 tokens with the prompt / of 64 without it.
- No loss was published. Ours is not known: no weights could be downloaded.
"""
out_dir = 'out/open-instruct'
init_from = 'microsoft/DialoGPT-medium'
dataset = 'open-instruct'

# 17 rows * 1.9 of Stanford's examples: about 32 a step
batch_size = 17
gradient_accumulation_steps = 1
block_size = 128
epochs = 1.0
eval_interval = 500

learning_rate = 5e-5
warmup_iters = 0
weight_decay = 0.0
beta2 = 0.999
dropout = 0.0
